"""Assumptions about a GPU that both plans share."""

RESERVE = 1.5e9  # bytes: CUDA context and cuBLAS workspaces; assumed, not measured here
USABLE = 0.95  # of a GPU's memory; fragmentation takes the rest
NF4_BYTES = 0.5 + 4 / 64  # per value: four bits, and a float32 scale for 64 values
