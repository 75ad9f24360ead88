"""The rule for names of Hub repositories, as owner/name."""

import re

# What `huggingface_hub.utils.validate_repo_id` allows, but always with an owner. A test compares the two.
_NAME = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b")


def is_repository_name(text: str) -> bool:
    """Whether a text can name a Hub repository (owner/name); a folder may have the same name."""
    return _NAME.fullmatch(text) is not None and "--" not in text and ".." not in text and not text.endswith(".git")


def require_repository_name(text: str) -> str:
    """Return the text. Raises ValueError if it cannot name a Hub repository."""
    if not is_repository_name(text):
        raise ValueError(
            f"{text!r} is not the name of a Hub repository: write owner/name, with letters, digits, '-', '_' and '.' "
            "(not '--' or '..', not at the start or the end, and not .git at the end)"
        )
    return text
