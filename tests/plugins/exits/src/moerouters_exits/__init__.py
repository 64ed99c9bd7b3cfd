"""Ends the interpreter when it is imported."""
