"""Memory before anything is loaded: of a training run, and of generating images."""
