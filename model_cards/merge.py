"""Joins a card that was written here with what people wrote. The whole rule:

- Of the YAML, keys that state what files say (`FACTS`) are written anew; every other key keeps a person's value, and
  lists of tags are joined.
- Of the text, what stands between the two marks is replaced and everything around it stays. A text without marks is a
  person's own: it stays whole, and the written part follows it.
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
    """A card's YAML and text.

    Raises:
        ValueError: the YAML cannot be read.
    """
    try:
        parsed = RepoCard(card, ignore_metadata_errors=False)
    except Exception as error:  # yaml's, or the card class's own
        raise ValueError(f"README.md: its YAML cannot be read: {str(error).splitlines()[0]}") from error
    return _plain(parsed), parsed.text.strip()


def own_words(card: str) -> str:
    """What a person wrote in a card: the text without the written part."""
    text = split(card)[1]
    before, after = _around(text)
    return "\n\n".join(part for part in (before, after) if part)


def merged(card: str, before: str | None) -> str:
    """`card` with what a person wrote in `before`, an earlier or a hand-written one."""
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
