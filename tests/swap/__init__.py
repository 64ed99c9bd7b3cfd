"""Routers of transformers: tiny models that run each of them, and what is done to them."""
