"""Shapes-4o: a benchmark, and a dataset like Echo-4o-Image, of coloured shapes on images of 64 x 64 pixels.

[`grammar`](grammar.py) writes the instructions and holds out some contents, [`scene`](scene.py) gives every object its
place, [`rendering`](rendering.py) makes images, [`upstream_release`](upstream_release.py) writes the training rows,
[`detector`](detector.py) reads objects from pixels, and [`benchmark`](benchmark.py) scores held-out prompts. The
quickstart trains and scores a tiny model with it.
"""
