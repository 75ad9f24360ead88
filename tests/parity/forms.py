"""The forms of golden directories, and how a directory is recognised.

A form is a package beside this module. It has one module for each kind of golden file, with a function
`check(golden, file, check)`; a module `golden_set` with the class `GoldenSet` that they read; and a module `rest` for
everything else in the directory: `check(golden, report)`, and `FILES`, the names of what it looks after.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Form(NamedTuple):
    """How a form is recognised and checked.

    Args:
        checks: beginning of a golden file's name, up to the first underscore -> the module that checks it.
        manifest: keys that `manifest.json` has in this form and in no other.
        files: names that the directory has in this form and in no other.
    """

    checks: dict[str, str]
    manifest: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()


FORMS = {
    "bagel": Form(
        checks={
            "a": "a_vit",
            "b": "b_train_forward",
            "c": "c_inference",
            "d": "d_text_generation",
            "e": "e_vae",
            "f": "f_transforms",
            "g": "g_packing",
        },
        manifest=frozenset({"special_tokens", "system_prompts", "transforms"}),
    ),
    "standard_benchmarks": Form(
        checks={"geneval": "geneval", "dpg": "dpg"},
        files=frozenset({"geneval_golden.json", "dpg_golden.json"}),
    ),
    "omnigen2": Form(
        checks={
            "a": "a_prompt",
            "b": "b_image",
            "c": "c_rope",
            "d": "d_transformer",
            "e": "e_scheduler",
            "f": "f_guidance",
            "g": "g_pipeline",
            "h": "h_chat",
            "i": "i_training",
            "j": "j_lora",
            "k": "k_edge",
        },
        manifest=frozenset({"special_tokens", "negative_prompt", "parameters"}),
    ),
    "blip3o": Form(
        checks={
            "a": "a_prompt",
            "b": "b_eva",
            "c": "c_dit",
            "d": "d_decoder",
            "e": "e_end_to_end",
            "f": "f_chat",
            "g": "g_training",
            "h": "h_vocabulary",
        },
        manifest=frozenset({"special_ids", "n_query", "checkpoint_keys"}),
        files=frozenset({"eva_clip_vision_tower"}),
    ),
}


class UnknownForm(ValueError):
    """A directory is not a golden directory of a form that is known here."""


def form_of(directory: str | Path) -> str:
    """The name of the form that a directory has.

    Raises:
        UnknownForm: it has none of them, or more than one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UnknownForm(f"{folder} is not a directory.")
    keys = _manifest_keys(folder / "manifest.json")
    names = {path.name for path in folder.iterdir()}
    fitting = [name for name, form in FORMS.items() if form.manifest <= keys and form.files <= names]
    if len(fitting) != 1:
        found = ", ".join(sorted(keys)) or "it has no manifest.json with keys"
        what = f"has several forms ({', '.join(fitting)})" if fitting else "is not a golden directory of a known form"
        raise UnknownForm(f"{folder} {what}. Known forms: {', '.join(FORMS)}. Keys of its manifest: {found}.")
    return fitting[0]


def _manifest_keys(path: Path) -> set[str]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return set()
    except ValueError as error:
        raise UnknownForm(f"{path} is not JSON: {error}") from error
    return set(content) if isinstance(content, dict) else set()
