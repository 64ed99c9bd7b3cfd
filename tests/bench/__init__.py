"""Tests of what `moerouters bench` runs."""
