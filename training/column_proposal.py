"""Proposes `data.columns` for a dataset of the Hub or a folder, from its features and first rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from echo4o.training.columns import FIELDS
from echo4o.training.recipe import RecipeError

# Names that public datasets use, in the order of preference.
_NAMES = {
    "id": ("id", "__key__", "key", "uid", "image_id", "idx"),
    "instruction": (
        "instruction", "edit_instruction", "edit_prompt", "prompt", "caption", "question", "text", "txt", "description",
        "json.caption", "json.prompt", "json.instruction",
    ),
    "image": (
        "image", "output_image", "target_image", "edited_image", "target", "output", "result", "photo", "picture", "img",
        "jpg", "png", "webp", "image_url", "url", "image_path", "file_name",
    ),
    "reference_images": (
        "reference_images", "input_images", "source_image", "input_image", "original_image", "source", "input", "mask",
        "mask_image", "control_image", "conditioning_image",
    ),
    "answer": ("answer", "answers", "response", "completion"),
}  # fmt: skip
ROWS = 3  # that are shown


def inspect_columns(path: str, name: str | None = None, split: str = "train") -> str:
    """The columns of a dataset, its first rows, and the proposed mapping as a part of a recipe.

    Raises:
        RecipeError: the dataset cannot be opened.
    """
    features, rows = _open(path, name, split)
    lines = [f"{path}, split {split}:", ""]
    width = max(map(len, features))
    for column, feature in features.items():
        examples = [_shown(row.get(column)) for row in rows]
        lines.append(f"  {column:<{width}}  {feature:<14}  {' | '.join(examples)}")
    mapping = propose(features, rows)
    missing = [field for field in ("instruction", "image") if field not in mapping]
    data = {"path": path} | ({"name": name} if name else {}) | ({"split": split} if split != "train" else {})
    lines += ["", "Proposed for a recipe:", "", yaml.safe_dump({"data": data | {"columns": mapping}}, sort_keys=False)]
    if missing:
        lines.append(f"No column looks like {' or '.join(missing)}: name one yourself.")
    if "id" not in mapping:
        lines.append("There is no column of ids: hashes of the rows are used, which read all images once.")
    if any(_is_address(row.get(mapping.get("image", ""))) for row in rows):
        lines.append("Images are addresses: set allow_urls: true to download them at every epoch.")
    return "\n".join(lines).rstrip()


def propose(features: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A mapping from field to column.

    Args:
        features: column -> kind of its values: "image", "images", "text", "binary" or another word.
        rows: some rows, images not decoded.
    """
    known = dict(features)
    for row in rows:
        known |= {
            f"{c}.{k}": _kind(v) for c, value in row.items() if isinstance(value, dict) for k, v in value.items()
        }
    mapping: dict[str, Any] = {}
    for field in FIELDS:
        wanted = (
            ("image", "images", "binary", "text") if field in ("image", "reference_images") else ("text", "number")
        )
        found = [name for name in _NAMES[field] if known.get(name) in wanted and name not in mapping.values()]
        if field == "reference_images":
            found = [name for name in found if known[name] in ("image", "images", "binary")]
            if found:
                mapping[field] = found[0] if len(found) == 1 else found
        elif found:
            mapping[field] = found[0]
    if "image" not in mapping:  # the only column of images, whatever its name
        images = [name for name, kind in features.items() if kind == "image"]
        if len(images) == 1 and images[0] != mapping.get("reference_images"):
            mapping["image"] = images[0]
    if "instruction" not in mapping:  # the only column of texts
        texts = [name for name, kind in features.items() if kind == "text" and name not in mapping.values()]
        if len(texts) == 1:
            mapping["instruction"] = texts[0]
    return mapping


def _open(path: str, name: str | None, split: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    import datasets

    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(path)
            dataset: Any = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            dataset = dataset.to_iterable_dataset()
        else:
            dataset = datasets.load_dataset(path, name, split=split, streaming=True)
        raw = dataset.decode(False) if dataset.features else dataset
        rows = [dict(row) for row in raw.take(ROWS)]
    except Exception as error:  # the readers of `datasets` raise exceptions of any type
        text = (str(error).strip().splitlines() or [repr(error)])[0]
        raise RecipeError(f"{path} cannot be opened: {text}") from error
    if not rows:
        raise RecipeError(f"{path} has no rows in split {split}.")
    if not dataset.features:
        return {column: _kind(value) for column, value in rows[0].items()}, rows
    return {column: _feature_kind(feature) for column, feature in dataset.features.items()}, rows


def _feature_kind(feature: Any) -> str:
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, (datasets.List, list)):
        inner = _feature_kind(feature.feature if isinstance(feature, datasets.List) else feature[0])
        return "images" if inner in ("image", "binary") else f"list of {inner}"
    if isinstance(feature, datasets.Value):
        kinds = {"string": "text", "large_string": "text", "binary": "binary", "large_binary": "binary"}
        return kinds.get(feature.dtype, "number" if "int" in feature.dtype else feature.dtype)
    if isinstance(feature, dict):
        return "image" if set(feature) == {"bytes", "path"} else "struct"
    return type(feature).__name__


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "image" if set(value) == {"bytes", "path"} else "struct"
    if isinstance(value, list):
        return "images" if value and _kind(value[0]) in ("image", "binary") else "list"
    return {str: "text", bytes: "binary", int: "number"}.get(type(value), type(value).__name__)


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _shown(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return f"{len(value['bytes']):,} bytes" if value["bytes"] else str(value["path"])
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value[:2])}{', ...' if len(value) > 2 else ''}]"
    text = str(value).replace("\n", " ")
    return text if len(text) <= 40 else f"{text[:37]}..."
