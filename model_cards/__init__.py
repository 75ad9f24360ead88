"""Templates of the cards that are published with models and datasets."""
