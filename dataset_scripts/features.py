"""The columns of Echo-4o-Image."""

from datasets import Features, Image, List, Value

from echo4o.dataset_scripts.names import (
    ALL,
    CONFIGURATIONS,
    MULTI_REFERENCE,
    PARTS,
    SPLIT,
    TASKS,
    TEXT_TO_IMAGE,
    parts_of,
)

__all__ = [
    "ALL",
    "CONFIGURATIONS",
    "MULTI_REFERENCE",
    "PARTS",
    "SPLIT",
    "TASKS",
    "TEXT_TO_IMAGE",
    "features",
    "parts_of",
]


def features() -> Features:
    """The features of every configuration.

    ``id`` is derived from the content, ``category`` is the upstream ``type``, ``source`` says where the row was read,
    and ``metadata`` is JSON (or null) with whatever else is known.
    """
    return Features(
        {
            "id": Value("string"),
            "instruction": Value("string"),
            "task": Value("string"),
            "category": Value("string"),
            "reference_images": List(Image()),
            "image": Image(),
            "source": Value("string"),
            "metadata": Value("string"),
        }
    )
