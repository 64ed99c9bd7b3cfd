"""Takes seconds to import."""
