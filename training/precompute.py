"""Encode the images of a dataset once and store the result: `prepare` of the backbone, row by row.

    echo4o dataset precompute DATASET --model PIPELINE --out DIR
    accelerate launch -m echo4o.training.precompute DATASET --model PIPELINE --out DIR     (several GPUs)

    DIR/cache.json                  the encoder settings (for BAGEL: VAE, image limits, patch size) and the dataset
    DIR/rows-00000003.safetensors   rows 3*n to 4*n-1 of the dataset; ids and digests in its metadata

With `--teacher`, images are generated instead and their trajectories stored (training/teacher.py).

A run that reads the cache has the losses of a run that encodes, bit for bit: everything random is still sampled in
every epoch. Files are written atomically. After an interruption the same command writes the missing files, on any number of
processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from echo4o.common import files
from echo4o.common.locks import FolderLock
from echo4o.training.backbones import backbone_of
from echo4o.training.backbones.base import Backbone, PreparedRow, WrappedPreparation
from echo4o.training.data import MAP_STYLE, open_sources
from echo4o.training.model import load_backbone
from echo4o.training.recipe import DataSource
from echo4o.training.recipe_files import parse_changes, read_recipe
from echo4o.training.row_checks import check_features, check_rows
from echo4o.training.row_images import decoded, image_bytes, undecoded
from echo4o.training.teacher import Teacher, TeacherSettings

ABOUT, VERSION = "cache.json", 1
ROWS_PER_FILE = 64  # at 1024 x 1024, 2 MB of moments per image


class RowEncoder(Protocol):
    """What `precompute` stores rows with: a backbone, or a teacher."""

    rows_at_once: int  # that `prepare` gets in one call

    def encoder_settings(self) -> dict[str, Any]: ...

    def prepare(self, rows: Sequence[dict]) -> Sequence[PreparedRow]: ...


class CacheError(ValueError):
    """The cache is incomplete, or was made with other settings or images."""


# --- settings and digests -------------------------------------------------------------------------------------


def settings_of(backbone: RowEncoder) -> dict:
    """Everything that the stored tensors depend on, apart from the images."""
    return {"version": VERSION} | backbone.encoder_settings()


def check_settings(folder: Path, stored: dict, wanted: dict) -> None:
    """Raise CacheError naming what differs."""
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if different:
        parts = "; ".join(f"{key}: {stored.get(key)} there, {wanted[key]} here" for key in different)
        raise CacheError(f"{folder} was made with other settings ({parts}): choose another folder, or remove it.")


def digest_of(row: dict) -> str:
    """A hash of the row's images as they are stored, so that a changed image is not mistaken for the cached one."""
    digest = hashlib.blake2b(digest_size=16)
    for image in [row.get("image"), *(row["reference_images"] or [])]:
        data = b"" if image is None else image_bytes(image, row["id"])
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# --- writing --------------------------------------------------------------------------------------------------------


def precompute(
    dataset,
    backbone: RowEncoder,
    out: Path,
    *,
    rank: int = 0,
    processes: int = 1,
    rows_per_file: int = ROWS_PER_FILE,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda rows: None,
) -> None:
    """Write this process's files of the cache; existing files are kept.

    Args:
        dataset: a `datasets.Dataset` with the features of Echo-4o-Image.
        wait: a barrier over all processes.
        progress: called with the number of rows done since the last call.

    Raises:
        CacheError: `out` holds a cache with other settings or of another dataset, or an image is unreadable.
    """
    dataset = undecoded(dataset)
    twice = [id for id, count in Counter(dataset["id"]).items() if count > 1]
    if twice:
        raise CacheError(
            f"{len(twice)} ids stand in more than one row, for example {twice[0]!r}: a cache holds one row per id."
        )
    about = settings_of(backbone) | {"rows": len(dataset), "rows_per_file": rows_per_file}
    about["ids"] = hashlib.blake2b("\0".join(dataset["id"]).encode(), digest_size=16).hexdigest()
    if (out / ABOUT).is_file():
        check_settings(out, read_about(out), about)
    elif rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / ABOUT, about)
    wait()
    if rank == 0:
        for left in [*out.glob(".*.partial"), *out.glob(".*.tmp")]:  # of killed runs; .tmp: of version 0.1
            left.unlink(missing_ok=True)
    wait()
    for number in range(rank, files_in(about), processes):
        first = number * rows_per_file
        rows = range(first, min(first + rows_per_file, len(dataset)))
        if not file_of(out, number).exists():
            write_rows(file_of(out, number), [dataset[i] for i in rows], backbone)
        progress(len(rows))
    wait()


def read_about(folder: Path) -> dict:
    try:
        return json.loads((folder / ABOUT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder} is not a cache: {error}") from error


def files_in(about: dict) -> int:
    return -(-about["rows"] // about["rows_per_file"])


def file_of(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:08d}.safetensors"


def write_rows(path: Path, rows: Sequence[dict], backbone: RowEncoder) -> None:
    """Write one file of the cache atomically."""
    tensors, index, size = {}, [], backbone.rows_at_once
    parts = (rows[start : start + size] for start in range(0, len(rows), size))
    prepared = (result for part in parts for result in backbone.prepare([decoded(row) for row in part]))
    for position, (row, result) in enumerate(zip(rows, prepared, strict=True)):
        stored, facts = result.to_cache()
        tensors |= {f"{position}.{name}": tensor for name, tensor in stored.items()}
        index.append({"id": row["id"], "digest": digest_of(row), "tensors": sorted(stored)} | facts)
    _write(path, lambda file: save_file(tensors, file, metadata={"rows": json.dumps(index)}))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with files.replacing(path, shared=True) as work:
        write(work)


# --- reading --------------------------------------------------------------------------------------------------------


class LatentCache:
    """A complete cache, opened for reading; files are mapped, not read.

    Args:
        settings: of the backbone that will use it (`settings_of`).
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, about = Path(folder), read_about(Path(folder))
        check_settings(self.folder, about, settings)
        self.places: dict[str, tuple[int, int, dict]] = {}
        missing = [n for n in range(files_in(about)) if not file_of(self.folder, n).is_file()]
        if missing:
            raise CacheError(
                f"{folder} is not finished: {len(missing)} of {files_in(about)} files are missing; "
                "run `echo4o dataset precompute` again to continue."
            )
        for number in range(files_in(about)):
            try:
                with safe_open(file_of(self.folder, number), "pt") as file:
                    entries = json.loads(file.metadata()["rows"])
            except (OSError, SafetensorError) as error:
                raise CacheError(f"{file_of(self.folder, number)} cannot be read: {error}") from error
            for place, entry in enumerate(entries):
                self.places[entry["id"]] = (number, place, entry)

    def __contains__(self, id: str) -> bool:
        return id in self.places

    def stored(self, id: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of a row, and its facts with the digest of its images."""
        number, place, entry = self.places[id]
        with safe_open(file_of(self.folder, number), "pt") as file:
            return {name: file.get_tensor(f"{place}.{name}") for name in _tensor_names(entry)}, entry

    def read(self, row: dict, backbone: Backbone) -> PreparedRow:
        """The prepared row. Undecoded images in `row` are compared with the cache's.

        Raises:
            CacheError: the row has other images than when the cache was made.
        """
        tensors, entry = self.stored(row["id"])
        if isinstance(row.get("image"), dict) and digest_of(row) != entry["digest"]:
            raise CacheError(f"row {row['id']} has other images than when {self.folder} was made.")
        return backbone.from_cache(row, tensors, entry)


def _tensor_names(entry: dict) -> list[str]:
    if "tensors" in entry:
        return entry["tensors"]
    names = ["moments"] if entry["target"] else []  # version 0.1 did not list the names
    names += [f"{index}.moments" for index in range(entry["references"])]
    return names + [f"{index}.patches" for index in range(len(entry["grids"]))]


class CachedBackbone(WrappedPreparation):
    """Prepares rows from a cache and encodes only those that are not in it.

    Use it with [`undecoded`] datasets: the images of cached rows are then never decoded.
    """

    def __init__(self, backbone: Backbone, folder: Path):
        super().__init__(backbone)
        self.backbone, self.cache = backbone, LatentCache(folder, settings_of(backbone))
        if "teacher" in read_about(Path(folder)):
            raise CacheError(f"{folder} holds trajectories of a teacher: name it in distill.teacher, not in latents.")

    def prepare(self, rows: Sequence[dict]) -> list[PreparedRow]:
        return [self._prepare(row) for row in rows]

    def _prepare(self, row: dict) -> PreparedRow:
        if row["id"] in self.cache:
            return self.cache.read(row, self.backbone)
        return self.backbone.prepare([decoded(row)])[0]


# --- the command ----------------------------------------------------------------------------------------------------


def run(
    dataset: str,
    model: str,
    out: Path,
    name: str | None = None,
    split: str = "train",
    changes: dict[str, Any] | None = None,
    teacher: TeacherSettings | None = None,
) -> int:
    """Precompute a dataset on all processes that Accelerate runs. Returns the number of rows.

    Args:
        dataset, name, split: as in a recipe's `data`.
        model: pipeline folder or repository whose encoders are used; of its trained components only sizes are read.
        changes: settings of the recipe that will train, by dotted name, if the encoded rows depend on them.
        teacher: generate images as these settings say and store their trajectories.
    """
    first = os.environ.get("RANK", "0") == "0"
    with FolderLock(out) if first else nullcontext():
        return _run(DataSource(path=dataset, name=name, split=split), model, out, changes or {}, teacher)


def _run(
    data: DataSource, model: str, out: Path, changes: dict[str, Any], teacher: TeacherSettings | None = None
) -> int:
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise CacheError(f"{started} processes were started, but Accelerate runs {accelerator.num_processes}.")
    (rows,) = open_sources([data], targets=teacher is None)
    check_features([rows])
    assert isinstance(rows, MAP_STYLE)  # `data` is not streamed
    values: dict[str, Any] = {"model": model, "output_dir": out, "data": data, "steps": 1, "batch_size": 1}
    if teacher is not None:  # its weights are frozen, in 16 bit on a GPU
        precision = "bf16" if accelerator.device.type == "cuda" else "no"
        values |= {"tune": {"method": "lora"}, "mixed_precision": precision}
    recipe = read_recipe(values | {"backbone": backbone_of(model)}, changes)
    backbone = load_backbone(recipe, empty=teacher is None)
    check_rows([rows], backbone.pipeline.config.get("max_references"))
    for component_name, component in backbone.pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            if teacher is not None or component_name not in backbone.trained_components:
                component.to(accelerator.device).requires_grad_(False)
    encoder: RowEncoder = backbone
    if teacher is not None:
        encoder = Teacher(backbone, teacher)
        backbone.pipeline.set_progress_bar_config(disable=True)
    with tqdm(
        total=len(rows),
        desc="encoding" if teacher is None else "generating",
        unit="row",
        disable=not accelerator.is_main_process,
    ) as bar:
        precompute(
            rows,
            encoder,
            Path(out),
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
            progress=lambda n: bar.update(min(n * accelerator.num_processes, bar.total - bar.n)),
        )
    if accelerator.is_main_process:
        LatentCache(Path(out), settings_of(encoder))
    return len(rows)


def read_teacher(is_teacher: bool, given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments `changes` and `teacher` of [`run`], from options of the command line.

    Args:
        given: settings of the teacher.
        changes: of `--set`: guidance options of the teacher, or settings of a recipe.

    Raises:
        ValueError: a setting of the teacher without `--teacher`, or one that is not possible.
    """
    if not is_teacher:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} has no effect without --teacher.")
        return {"changes": changes, "teacher": None}
    try:
        return {"changes": {}, "teacher": TeacherSettings(**given, guidance=changes)}
    except ValidationError as error:
        raise ValueError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error


def main(arguments: list[str] | None = None) -> int:
    """`python -m echo4o.training.precompute`, for launchers."""
    parser = argparse.ArgumentParser(prog="echo4o dataset precompute", description="Encode a dataset's images once.")
    parser.add_argument("dataset")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name")
    parser.add_argument("--split", default="train")
    parser.add_argument("--set", dest="changes", action="append", metavar="KEY=VALUE")
    parser.add_argument("--teacher", action="store_true", help="store trajectories of generated images")
    for name in ("updates", "segments", "images-per-prompt", "batch-size", "height", "width", "seed"):
        parser.add_argument(f"--{name}", type=int)
    try:
        options: dict[str, Any] = vars(parser.parse_args(arguments))
        plain = {name: options.pop(name) for name in ("dataset", "model", "out", "name", "split")}
        changes, is_teacher = parse_changes(options.pop("changes") or []), options.pop("teacher")
        given = {name: value for name, value in options.items() if value is not None}
        run(**plain, **read_teacher(is_teacher, given, changes))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
