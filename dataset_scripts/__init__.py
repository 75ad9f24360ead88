"""The Echo-4o-Image dataset: reading the upstream release, building and writing it."""
