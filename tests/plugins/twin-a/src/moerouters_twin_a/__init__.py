"""Claims the name twin."""
