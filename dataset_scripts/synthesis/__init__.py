"""Generates more rows for Echo-4o-Image with an image API.

[`load_recipe`](recipe.py) reads a recipe, [`make_tasks`](tasks.py) plans every row, and [`Synthesis`](engine.py) generates
the rows with the models that it is given and writes them in the published layout into a [`SynthesisFolder`](folder.py).
`echo4o dataset synthesize` combines these steps.
"""
