"""Finds the image of every prompt; all images are decoded before anything is paid for."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from echo4o.endpoints.chat_endpoint import ImageFile
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 8


@dataclass
class FoundImages:
    """The images of a folder by (prompt id, number from 1), and why others are missing."""

    images: dict[tuple[str, int], ImageFile] = field(default_factory=dict)
    missing: dict[tuple[str, int], str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def image_name(prompt_id: str, number: int, per_prompt: int) -> str:
    """The file name without suffix: `7`, or `7_2` with several images per prompt."""
    return prompt_id if per_prompt == 1 else f"{prompt_id}_{number}"


def find_images(
    folder: Path, prompts: Sequence[BenchmarkPrompt], per_prompt: int = 1, benchmark: Benchmark | None = None
) -> FoundImages:
    """Find every prompt's images in a folder, in its subfolder `<group>/`, or in the benchmark's original layout.

    Raises:
        ValueError: the folder is missing, or two files have the name of one image.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of images")
    original = benchmark.original_images(folder, prompts, per_prompt) if benchmark else None
    if original is not None:
        return _of_paths(original, prompts, per_prompt)
    files = _by_name(folder)
    found, used = FoundImages(), set()
    for prompt in prompts:
        for number in range(1, per_prompt + 1):
            name = _plain(image_name(prompt.id, number, per_prompt))
            candidates = files.get(("", name), []) + files.get((prompt.group, name), [])
            if len(candidates) > 1:
                names = " and ".join(str(path.relative_to(folder)) for path in sorted(candidates))
                raise ValueError(f"{folder}: {names} are two images for the one id {prompt.id}")
            key = (prompt.id, number)
            if not candidates:
                found.missing[key] = "there is no such file"
                continue
            used.update(candidates)
            reason = why_unreadable(candidates[0])
            if reason:
                found.missing[key] = reason
            else:
                found.images[key] = ImageFile.read(candidates[0])
    found.unexpected = sorted(str(p.relative_to(folder)) for paths in files.values() for p in paths if p not in used)
    return found


def _of_paths(paths: dict[tuple[str, int], Path], prompts: Sequence[BenchmarkPrompt], per_prompt: int) -> FoundImages:
    found = FoundImages()
    for key in ((prompt.id, number) for prompt in prompts for number in range(1, per_prompt + 1)):
        reason = why_unreadable(paths[key]) if key in paths else "there is no such file"
        if reason:
            found.missing[key] = reason
        else:
            found.images[key] = ImageFile.read(paths[key])
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
    """Why an image cannot be used: it does not decode to its last pixel, or its range is unknown; None if it can."""
    from echo4o.modeling.common.image_files import open_image

    try:
        open_image(path, "it")
    except ValueError as error:
        return str(error)
    return None


def require_all(found: FoundImages, folder: Path, per_prompt: int) -> None:
    """Raise ValueError if images of the folder are missing or broken; the message names them."""
    if not found.missing:
        return
    total = len(found.missing) + len(found.images)
    listed = [
        f"{image_name(prompt_id, number, per_prompt)} ({reason})"
        for (prompt_id, number), reason in list(found.missing.items())[:_SHOWN]
    ]
    more = len(found.missing) - len(listed)
    hint = ""
    if not found.images and found.unexpected:
        hint = f"; the folder holds {', '.join(found.unexpected[:3])}: are there several per prompt (--pictures)?"
    raise ValueError(
        f"{folder}: {len(found.missing)} of {total} images are missing: {', '.join(listed)}"
        f"{f' and {more} more' if more else ''}{hint}\n"
        "add them, or give --allow-missing to score the others"
    )
