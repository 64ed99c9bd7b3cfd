"""Tensor operations without any knowledge of routers: one operation a file, the torch reference beside it."""
