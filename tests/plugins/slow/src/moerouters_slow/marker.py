"""Loaded only if the plugin has been imported."""

SUMMARY = "Worth the wait."
