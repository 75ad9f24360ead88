"""BAGEL as diffusers components: transformer, vision model, pipeline and conversion."""
