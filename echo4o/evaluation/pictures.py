"""Which picture belongs to which prompt; all of them are opened before anything is paid for."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from echo4o.evaluation.benchmarks.base import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 8


@dataclass(frozen=True)
class Picture:
    """A picture file and the hash of its bytes."""

    path: Path
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "Picture":
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass
class Found:
    """The pictures of a folder by (prompt id, number from 1), and why others are missing."""

    pictures: dict[tuple[str, int], Picture] = field(default_factory=dict)
    missing: dict[tuple[str, int], str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def picture_name(prompt_id: str, number: int, per_prompt: int) -> str:
    """The name without suffix: `7`, or `7_2` with several pictures per prompt."""
    return prompt_id if per_prompt == 1 else f"{prompt_id}_{number}"


def find_pictures(folder: Path, prompts: Sequence[Prompt], per_prompt: int = 1) -> Found:
    """Look for every prompt's pictures in a folder, or in its subfolder `<group>/`.

    Raises:
        ValueError: the folder is not there, or two files claim to be the same picture.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of pictures")
    files = _by_name(folder)
    found, used = Found(), set()
    for prompt in prompts:
        for number in range(1, per_prompt + 1):
            name = _plain(picture_name(prompt.id, number, per_prompt))
            candidates = files.get(("", name), []) + files.get((prompt.group, name), [])
            if len(candidates) > 1:
                names = " and ".join(str(path.relative_to(folder)) for path in sorted(candidates))
                raise ValueError(f"{folder}: {names} are two pictures for the one id {prompt.id}")
            key = (prompt.id, number)
            if not candidates:
                found.missing[key] = "there is no such file"
                continue
            used.update(candidates)
            reason = why_unreadable(candidates[0])
            if reason:
                found.missing[key] = reason
            else:
                found.pictures[key] = Picture.read(candidates[0])
    found.unexpected = sorted(str(p.relative_to(folder)) for of in files.values() for p in of if p not in used)
    return found


def _by_name(folder: Path) -> dict[tuple[str, str], list[Path]]:
    files = defaultdict(list)
    for path in [*folder.iterdir(), *folder.glob("*/*")]:
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            group = "" if path.parent == folder else path.parent.name
            files[group, _plain(path.stem)].append(path)
    return files


def _plain(name: str) -> str:
    """Numbers compare without leading zeros: 007.jpg is 7.jpg."""
    return "_".join(part.lstrip("0") or "0" if part.isdigit() else part for part in name.split("_"))


def why_unreadable(path: Path) -> str | None:
    """Why a picture cannot be decoded to its last pixel, or None if it can."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"it does not decode ({error})"
    return None


def require_all(found: Found, folder: Path, per_prompt: int) -> None:
    """Refuse a folder in which pictures are missing or broken, saying which."""
    if not found.missing:
        return
    total = len(found.missing) + len(found.pictures)
    listed = [
        f"{picture_name(prompt_id, number, per_prompt)} ({reason})"
        for (prompt_id, number), reason in list(found.missing.items())[:_SHOWN]
    ]
    more = len(found.missing) - len(listed)
    hint = ""
    if not found.pictures and found.unexpected:
        hint = f"; what lies there is called {', '.join(found.unexpected[:3])}: are there several per prompt (--pictures)?"
    raise ValueError(
        f"{folder}: {len(found.missing)} of {total} pictures are missing: {', '.join(listed)}"
        f"{f' and {more} more' if more else ''}{hint}\n"
        "add them, or give --allow-missing to score the others"
    )
