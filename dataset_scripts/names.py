"""The names of the configurations, tasks and splits."""

TEXT_TO_IMAGE = "text_to_image"
MULTI_REFERENCE = "multi_reference"
TASKS = (TEXT_TO_IMAGE, MULTI_REFERENCE)

PARTS = ("surreal_fantasy", "multi_reference", "instruction_following")
ALL = "all"  # the same files as the parts, not a copy of them
CONFIGURATIONS = (*PARTS, ALL)
SPLIT = "train"


def parts_of(configuration: str) -> tuple[str, ...]:
    """The parts that a configuration reads.

    Raises:
        ValueError: an unknown configuration.
    """
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"configuration is {configuration!r}; allowed are {', '.join(CONFIGURATIONS)}")
    return PARTS if configuration == ALL else (configuration,)
