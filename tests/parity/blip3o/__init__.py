"""Checks of golden directories of BLIP3-o; their README.md says how they were recorded."""
