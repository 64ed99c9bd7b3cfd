"""Two routers of one module, as a plugin should be."""
