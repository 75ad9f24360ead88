"""Checks of golden data of OmniGen2."""
