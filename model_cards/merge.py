"""Merges a generated card with an earlier card that people may have edited.

- YAML: the keys in `FACTS` take the generated value. Every other key keeps its earlier value, and tags are merged.
- Text: the part between the two markers is replaced and the text around it is kept. A text without markers was written
  by hand: it is kept, and the generated part follows it.
"""

from huggingface_hub import RepoCard
from huggingface_hub.repocard_data import CardData

BEGIN = "<!-- echo4o: written by echo4o, replaced at the next push; write above or below -->"
END = "<!-- echo4o: end -->"
FACTS = {
    "library_name", "pipeline_tag", "base_model", "base_model_relation", "datasets", "model-index", "widget",
    "configs", "dataset_info", "size_categories", "sdk", "app_file",
}  # fmt: skip


def split(card: str) -> tuple[dict, str]:
    """Splits a card into its YAML and its text.

    Raises:
        ValueError: the YAML cannot be parsed.
    """
    try:
        parsed = RepoCard(card, ignore_metadata_errors=False)
    except Exception as error:  # of yaml, or of the card class
        raise ValueError(f"README.md: its YAML cannot be read: {str(error).splitlines()[0]}") from error
    return _plain(parsed), parsed.text.strip()


def own_words(card: str) -> str:
    """Returns the hand-written text of a card: everything outside the generated part."""
    text = split(card)[1]
    before, after = _around(text)
    return "\n\n".join(part for part in (before, after) if part)


def merged(card: str, before: str | None) -> str:
    """Returns the generated `card` with the hand-written YAML and text of `before`, the earlier card."""
    if not before:
        return card
    new, text = split(card)
    old, old_text = split(before)
    data = new | {key: value for key, value in old.items() if key not in FACTS}
    if tags := [*new.get("tags", []), *(t for t in _list(old.get("tags")) if t not in new.get("tags", []))]:
        data["tags"] = tags
    above, below = _around(old_text)
    body = "\n\n".join(part for part in (above, text, below) if part)
    return f"---\n{CardData(**data)}\n---\n\n{body}\n"


def _around(text: str) -> tuple[str, str]:
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        return text.strip(), ""
    return text[:start].strip(), text[end + len(END) :].strip()


def _plain(card: RepoCard) -> dict:
    return card.data.to_dict()


def _list(value) -> list:
    return value if isinstance(value, list) else [value] if value else []
