"""Checks of golden directories of BAGEL."""
