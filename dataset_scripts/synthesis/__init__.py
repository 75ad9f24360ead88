"""Makes more of Echo-4o-Image with an image API: three recipes, each a chain of small steps whose results are kept.

A recipe file is read by [`load_recipe`](recipe.py); [`make_tasks`](tasks.py) decides every row before anything is paid
for; [`Synthesis`](engine.py) makes the rows through the calls it is given and writes them, in the published layout, to
the shards of a [`SynthesisFolder`](folder.py). `echo4o dataset synthesize` puts these together.
"""
