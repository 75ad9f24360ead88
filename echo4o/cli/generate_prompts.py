"""``echo4o generate --prompts FILE``: many prompts, each with its own settings. An interrupted run resumes."""

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from echo4o.cli.frame import finish, say
from echo4o.cli.generate_images import GenerationRequest, ImageGenerator, require_writable
from echo4o.cli.generate_options import LoadingOptions, OutputOptions, SamplingOptions
from echo4o.common.json_lines import JsonLines
from echo4o.common.locks import FolderLock

RECORD, SHEET = "images.jsonl", "sheet.png"
_KEYS = {"prompt": str, "seed": int, "image": (str, list), "num_images": int}
_SETTINGS: dict[str, Any] = {
    "steps": int,
    "guidance_scale": (int, float),
    "image_guidance_scale": (int, float),
    "height": int,
    "width": int,
    "think": bool,
}


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file, with the defaults of the command line filled in.

    Args:
        image: paths of the reference images, relative to the prompt file.
    """

    prompt: str
    seeds: tuple[int, ...]
    image: tuple[Path, ...]
    settings: dict[str, Any]


def generate_file(
    file: Path,
    model: str,
    seed: int,
    num_images: int,
    sampling: SamplingOptions,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """Generate the images of a prompt file into a folder: 0001.png, 0002.png, ..., a record, and a contact sheet.

    Raises ValueError, naming the line, before anything is generated: for a line that cannot be read, and for a folder
    with images of other prompts or settings.
    """
    from echo4o.cli.generate import write_sheet

    folder = output.out or Path("echo4o-images")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file; with --prompts it is a folder")
    lines = read_prompts(file, seed, num_images, sampling)
    generator = ImageGenerator(model, loading, metadata=not output.no_metadata)
    requests = [_request(line, file, number) for number, line in enumerate(lines, start=1)]
    for request in requests:
        generator.check(request)
    files = _files(folder, requests)
    require_writable([folder / RECORD])
    record = JsonLines(folder / RECORD)
    done = {value["file"]: value for value in record}
    with FolderLock(folder), record.appending() as append:
        for number, (request, own) in enumerate(zip(requests, files, strict=True), start=1):
            if _is_done(generator, request, own, done):
                continue
            say(f"[{number}/{len(requests)}] {request.prompt}")
            generator.write(request, own)
            for index, path in enumerate(own):
                append({"file": path.name} | generator.describe(request, index).to_json())
    every = [path for own in files for path in own]
    captions = [request.prompt for request, own in zip(requests, files, strict=True) for _ in own]
    write_sheet(every, captions, folder / SHEET)
    say(f"{len(every)} images and a contact sheet:")
    finish(folder, shlex.join(["echo4o", "generate", "--like", str(every[0]), "--model", model]))


def read_prompts(file: Path, seed: int, num_images: int, sampling: SamplingOptions) -> list[PromptLine]:
    """The lines of a prompt file: texts, or JSON objects with `prompt` and settings. Empty lines do not count.

    Image n of the file (from 0) has the seed `seed + n`, unless its line names one.
    """
    try:
        texts = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file}: not UTF-8 ({error})") from error
    lines, first = [], seed
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        value = _value(text, f"{file}, line {number}")
        count = value.get("num_images", num_images)
        own = value.get("seed", first)
        settings = {f.name: value.get(f.name, getattr(sampling, f.name)) for f in fields(sampling)}
        images = value.get("image", [])
        paths = tuple(file.parent / path for path in ([images] if isinstance(images, str) else images))
        seeds = tuple(range(own, own + count))
        lines.append(PromptLine(value["prompt"], seeds, paths, SamplingOptions(**settings).settings()))
        first += count
    if not lines:
        raise ValueError(f"--prompts {file}: there is no prompt in it")
    return lines


def _value(text: str, place: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"prompt": text.strip()}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    known = _KEYS | _SETTINGS
    for name, item in value.items():
        if name not in known:
            raise ValueError(f"{place}: unknown key {name!r}; known are {', '.join(known)}")
        if not isinstance(item, known[name]) or (isinstance(item, bool) and name != "think"):
            raise ValueError(f"{place}: {name} is {item!r}")
    if not value.get("prompt", "").strip():
        raise ValueError(f"{place}: the prompt is missing or empty")
    for name in ("num_images", "steps", "height", "width"):
        if value.get(name, 1) < 1:
            raise ValueError(f"{place}: {name} is {value[name]}, and must be at least 1")
    if value.get("seed", 0) < 0:
        raise ValueError(f"{place}: seed is {value['seed']}, and must be at least 0")
    if not all(isinstance(path, str) for path in value.get("image", [])):
        raise ValueError(f"{place}: image is not a path or a list of paths")
    return value


def _request(line: PromptLine, file: Path, number: int) -> GenerationRequest:
    from echo4o.cli.generate import open_images

    try:
        references = open_images(list(line.image))
    except ValueError as error:
        raise ValueError(f"{file}, prompt {number}: {str(error).removeprefix('--image ')}") from error
    return GenerationRequest(line.prompt, line.seeds, line.settings, tuple(references))


def _files(folder: Path, requests: list[GenerationRequest]) -> list[list[Path]]:
    """The files of every request: 0001.png, or 0001-1.png, 0001-2.png, ... for several images."""
    digits = max(4, len(str(len(requests))))
    names = []
    for number, request in enumerate(requests, start=1):
        stem = f"{number:0{digits}d}"
        count = len(request.seeds)
        names.append([folder / (f"{stem}-{i}.png" if count > 1 else f"{stem}.png") for i in range(1, count + 1)])
    return names


def _is_done(generator: ImageGenerator, request: GenerationRequest, files: list[Path], done: dict[str, dict]) -> bool:
    """Whether all images of a request are written and recorded.

    Raises ValueError if a file is recorded with another prompt, seed, setting, model or adapter.
    """
    compared = ("prompt", "seeds", "settings", "references", "model", "adapters", "loading")
    for index, path in enumerate(files):
        known = done.get(path.name)
        if known is None or not path.is_file():
            return False
        wanted = json.loads(json.dumps(generator.describe(request, index).to_json()))
        for name in compared:
            if known.get(name) != wanted[name]:
                raise ValueError(f"{path} was generated with another {name}: use another --out, or delete the folder")
    return True
