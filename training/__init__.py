"""Training of the models of :mod:`echo4o.modeling`, with Accelerate and PEFT."""
