"""The models, as they are published beside their weights. Imports no other room of the package."""
