"""Moving tokens to experts and back: a plan as data, then one back-end a file."""
