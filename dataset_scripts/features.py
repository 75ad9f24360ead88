"""The columns of Echo-4o-Image and the names of its configurations."""

from datasets import Features, Image, List, Value

TEXT_TO_IMAGE = "text_to_image"
MULTI_REFERENCE = "multi_reference"
TASKS = (TEXT_TO_IMAGE, MULTI_REFERENCE)

PARTS = ("surreal_fantasy", "multi_reference", "instruction_following")
ALL = "all"  # the same files as the parts, not a copy of them
CONFIGURATIONS = (*PARTS, ALL)


def parts_of(configuration: str) -> tuple[str, ...]:
    """The parts that a configuration reads.

    Raises:
        ValueError: an unknown configuration.
    """
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"configuration is {configuration!r}; allowed are {', '.join(CONFIGURATIONS)}")
    return PARTS if configuration == ALL else (configuration,)


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
