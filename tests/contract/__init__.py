"""Probe routers from the whole field, and the tests that every one of them passes: what the contract can carry."""
