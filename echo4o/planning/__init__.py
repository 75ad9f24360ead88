"""Memory estimates of training runs and image generation, before anything is loaded."""
