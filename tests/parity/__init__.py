"""Compares echo4o with measured outputs of the original BAGEL: `python -m tests.parity DIR`."""
