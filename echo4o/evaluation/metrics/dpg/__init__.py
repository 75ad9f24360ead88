"""A metric for `evaluate.load`; see the module of the same name."""
