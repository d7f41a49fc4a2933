"""Data, the loop and its entries."""
