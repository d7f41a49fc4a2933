"""Side-by-side measurements; every one writes tidy rows."""
