"""Pictures encoded once, kept beside the dataset: VAE moments and vision patches of every row.

    echo4o dataset precompute DATASET --model PIPELINE --out DIR
    accelerate launch -m echo4o.training.precompute DATASET --model PIPELINE --out DIR     (several GPUs)

    DIR/cache.json                  what it was made with: VAE, limits, patch sizes, dataset
    DIR/rows-00000003.safetensors   rows 3*n to 4*n-1 of the dataset; ids and digests in its metadata

Moments are kept in float32 and patches as the bytes they came from, so that a run that reads them has the losses of one
that encodes, bit for bit: what is random (the latents' sampling) is still drawn in every epoch. Each file is written
under another name, brought to the disk and renamed; a run that was killed goes on with the files that are missing, on
any number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from echo4o.common import files
from echo4o.modeling.bagel.image_processor_bagel import to_rgb
from echo4o.training.data import open_sources
from echo4o.training.model import load_pipeline
from echo4o.training.recipe import Recipe
from echo4o.training.samples import Dropout, PreparedRow, SampleMaker

ABOUT, VERSION = "cache.json", 1
ROWS_PER_FILE = 64  # at 1024 x 1024, 2 MB of moments a picture


class CacheError(ValueError):
    """A cache that does not belong to what it is used with, or is not whole."""


# --- what a cache was made with -------------------------------------------------------------------------------------


def vae_hash(vae) -> str:
    """Of the VAE's encoder: configuration-independent, equal for equal weights in float32."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def settings_of(maker: SampleMaker) -> dict:
    """Everything that the stored values depend on, apart from the pictures."""
    return {
        "version": VERSION,
        "vae": vae_hash(maker.vae),
        "vae_limits": asdict(maker.vae_limits),
        "vision_limits": asdict(maker.vision_limits),
        "vit_patch": maker.vit_patch,
    }


def check_settings(folder: Path, stored: dict, wanted: dict) -> None:
    """Raise CacheError naming what differs."""
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if different:
        parts = "; ".join(f"{key}: {stored.get(key)} there, {wanted[key]} here" for key in different)
        raise CacheError(f"{folder} was made with other settings ({parts}): choose another folder, or remove it.")


def digest_of(row: dict) -> str:
    """Of a row's pictures as they are stored: a changed picture is never taken for the cached one."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in [row.get("image"), *(row["reference_images"] or [])]:
        data = b"" if picture is None else _picture_bytes(picture, row["id"])
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _picture_bytes(picture: dict, row: str) -> bytes:
    if picture.get("bytes") is not None:
        return picture["bytes"]
    try:
        return Path(picture["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise CacheError(f"row {row}: a picture cannot be read: {error}") from error


def undecoded(dataset):
    """The dataset with its pictures as bytes."""
    from datasets import Image, List

    raw = {"reference_images": List(Image(decode=False)), "image": Image(decode=False)}
    for name in raw.keys() & set(dataset.column_names):
        dataset = dataset.cast_column(name, raw[name])
    return dataset


def decoded(row: dict) -> dict:
    """The row with its pictures as PIL images."""

    def picture(stored: dict | None):
        if stored is None or isinstance(stored, PILImage.Image):
            return stored
        try:
            return to_rgb(PILImage.open(io.BytesIO(_picture_bytes(stored, row["id"]))), f"a picture of {row['id']}")
        except OSError as error:
            raise CacheError(f"row {row['id']}: a picture does not decode: {error}") from error

    references = [picture(p) for p in row["reference_images"] or []]
    return row | {"image": picture(row.get("image")), "reference_images": references}


# --- writing --------------------------------------------------------------------------------------------------------


def precompute(
    dataset,
    maker: SampleMaker,
    out: Path,
    *,
    rank: int = 0,
    processes: int = 1,
    rows_per_file: int = ROWS_PER_FILE,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write this process's files of the cache; those that are there already stay.

    Args:
        dataset: a `datasets.Dataset` with the features of Echo-4o-Image.
        wait: returns when all processes have come to it.
        progress: is told how many rows more are done.

    Raises:
        CacheError: `out` holds a cache of other settings or of another dataset, or a picture is unreadable.
    """
    dataset = undecoded(dataset)
    about = settings_of(maker) | {"rows": len(dataset), "rows_per_file": rows_per_file}
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
            write_rows(file_of(out, number), [dataset[i] for i in rows], maker)
        progress(len(rows))
    wait()


def read_about(folder: Path) -> dict:
    try:
        return json.loads((folder / ABOUT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder} is no cache: {error}") from error


def files_in(about: dict) -> int:
    return -(-about["rows"] // about["rows_per_file"])


def file_of(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:08d}.safetensors"


def write_rows(path: Path, rows: Sequence[dict], maker: SampleMaker) -> None:
    """One file of the cache, whole or not at all."""
    tensors, index = {}, []
    for place, row in enumerate(rows):
        (made,) = maker.prepare([decoded(row)])
        if made.moments is not None:
            tensors[f"{place}.moments"] = made.moments.contiguous()
        for i, moments in enumerate(made.reference_moments):
            tensors[f"{place}.{i}.moments"] = moments.contiguous()
        grids = []
        for i, (grid, patches) in enumerate(made.reference_patches):
            tensors[f"{place}.{i}.patches"] = to_bytes(patches)
            grids.append(grid)
        entry = {"id": row["id"], "digest": digest_of(row), "grids": grids}
        index.append(entry | {"target": made.moments is not None, "references": len(made.reference_moments)})
    _write(path, lambda file: save_file(tensors, file, metadata={"rows": json.dumps(index)}))


def to_bytes(patches: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] -> uint8. [`from_bytes`] gives the same bits again, or this raises."""
    stored = ((patches * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(from_bytes(stored), patches)
    return stored


def from_bytes(stored: torch.Tensor) -> torch.Tensor:
    """uint8 -> pixels in [-1, 1], by the arithmetic of `image_processor_bagel.to_pixels`."""
    return (stored.float() / 255 - 0.5) / 0.5


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with files.replacing(path, shared=True) as work:
        write(work)


# --- reading --------------------------------------------------------------------------------------------------------


class LatentCache:
    """A whole cache, opened for reading; files are mapped, not read.

    Args:
        settings: of the [`SampleMaker`] that will use it (`settings_of`).
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, about = Path(folder), read_about(Path(folder))
        check_settings(self.folder, about, settings)
        self.places: dict[str, tuple[int, int, dict]] = {}
        missing = [n for n in range(files_in(about)) if not file_of(self.folder, n).is_file()]
        if missing:
            raise CacheError(
                f"{folder} is not finished: {len(missing)} of {files_in(about)} files are missing; "
                "run `echo4o dataset precompute` again to go on."
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

    def read(self, row: dict, maker: SampleMaker) -> PreparedRow:
        """The row, prepared. `row` may carry its pictures undecoded; then their bytes must be those of the cache."""
        number, place, entry = self.places[row["id"]]
        if isinstance(row.get("image"), dict) and digest_of(row) != entry["digest"]:
            raise CacheError(f"row {row['id']} has other pictures than when {self.folder} was made.")
        with safe_open(file_of(self.folder, number), "pt") as file:
            target = file.get_tensor(f"{place}.moments") if entry["target"] else None
            moments = [file.get_tensor(f"{place}.{i}.moments") for i in range(entry["references"])]
            patches = [from_bytes(file.get_tensor(f"{place}.{i}.patches")) for i in range(len(entry["grids"]))]
        answer = row.get("answer")
        return PreparedRow(
            id=row["id"],
            text=maker.token_ids(row["instruction"]),
            reference_moments=moments,
            reference_patches=[(tuple(grid), p) for grid, p in zip(entry["grids"], patches)],
            moments=target,
            answer=maker.token_ids(answer) if answer else None,
        )


class CachedSampleMaker(SampleMaker):
    """A [`SampleMaker`] that reads rows from a cache and encodes only those that are not in it.

    Use it with [`undecoded`] datasets: the pictures of cached rows are then never decoded.
    """

    def __init__(self, pipeline, dropout, seed: int, folder: Path):
        super().__init__(pipeline, dropout, seed)
        self.cache = LatentCache(folder, settings_of(self))

    def prepare(self, rows: Sequence[dict]) -> list[PreparedRow]:
        return [self._prepare(row) for row in rows]

    def _prepare(self, row: dict) -> PreparedRow:
        if row["id"] in self.cache:
            return self.cache.read(row, self)
        return super().prepare([decoded(row)])[0]


# --- the command ----------------------------------------------------------------------------------------------------


def run(dataset: str, model: str, out: Path, name: str | None = None, split: str = "train") -> int:
    """Precompute a dataset on all processes that Accelerate runs; the number of rows.

    Args:
        dataset, name, split: as in a recipe's `data`.
        model: pipeline folder or repository whose VAE and limits count; of its two large models only sizes are read.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise CacheError(f"{started} processes were started, but Accelerate runs {accelerator.num_processes}.")
    data = {"path": dataset, "name": name, "split": split}
    recipe = Recipe(model=model, output_dir=out, data=data, steps=1, batch_size=1)
    (rows,) = open_sources(recipe)
    pipeline = load_pipeline(recipe, empty=True)
    pipeline.vae.to(accelerator.device).requires_grad_(False)
    maker = SampleMaker(pipeline, Dropout(), seed=0)
    with tqdm(total=len(rows), desc="encoding", unit="row", disable=not accelerator.is_main_process) as bar:
        precompute(
            rows,
            maker,
            Path(out),
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
            progress=lambda n: bar.update(min(n * accelerator.num_processes, bar.total - bar.n)),
        )
    if accelerator.is_main_process:
        LatentCache(Path(out), settings_of(maker))
    return len(rows)


def main(arguments: list[str] | None = None) -> int:
    """`python -m echo4o.training.precompute`, for launchers."""
    parser = argparse.ArgumentParser(prog="echo4o dataset precompute", description="Encode a dataset's pictures once.")
    parser.add_argument("dataset")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name")
    parser.add_argument("--split", default="train")
    try:
        run(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
