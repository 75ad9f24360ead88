"""Utilities that all rooms share: durable files, JSON lines, configuration, Hub names, sizes, thumbnails.

It imports nothing else of the project and no heavy library.
"""
