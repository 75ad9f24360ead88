"""What every part of the project stands on: durable files, JSON lines, configuration, Hub names, sizes, thumbnails.

It imports nothing else of the project and no heavy library.
"""
