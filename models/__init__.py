"""The decoder, its layers and its files."""
