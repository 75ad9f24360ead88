"""Reads reference images from a folder with one subfolder per subject type, or a dataset with a column of types."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from echo4o.dataset_scripts.images import check_image
from echo4o.dataset_scripts.source import IMAGE_SUFFIXES
from echo4o.dataset_scripts.synthesis.recipe import ReferencesSettings


@dataclass(frozen=True)
class ReferenceImage:
    """A reference image: its subject type, what it shows, its source and its location."""

    kind: str
    label: str
    source: str
    place: tuple[str] | tuple[str, int, int]  # a file; or a shard, its row group and the row in it


@dataclass
class ReferenceImages:
    """The reference images of a source by type. Images are read when a row uses them."""

    by_type: dict[str, tuple[ReferenceImage, ...]]
    column: str
    _checked: set[ReferenceImage] = field(default_factory=set)

    @property
    def fingerprint(self) -> str:
        names = [image.source for images in self.by_type.values() for image in images]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def count(self, kind: str) -> int:
        """Returns the number of images of a type."""
        return len(self.by_type.get(kind, ()))

    def read(self, image: ReferenceImage) -> bytes:
        """Returns the file of an image."""
        if len(image.place) == 1:
            return Path(image.place[0]).read_bytes()
        file, group, row = image.place
        return _of_shard(file, group, row, self.column)

    def check(self, image: ReferenceImage) -> None:
        """Raises ValueError if the image cannot be decoded."""
        if image in self._checked:
            return
        checked = check_image(self.read(image))
        if checked.reason is not None:
            raise ValueError(f"the reference image {image.source} cannot be used: {checked.reason}: {checked.detail}")
        self._checked.add(image)


def open_references(config: ReferencesSettings) -> ReferenceImages:
    """Lists the images of every type.

    Raises:
        ValueError: the source does not exist, or has no image of one of the types.
    """
    root = Path(config.path)
    found = _of_folders(root, config) if root.is_dir() and not any(root.rglob("*.parquet")) else _of_dataset(config)
    for kind, values in config.types.items():
        if found.get(kind):
            continue
        raise ValueError(
            f"{config.path} has no image of the subject type {kind!r} (looked for {', '.join(values)}); it has "
            f"{', '.join(sorted(k for k in found if found[k])) or 'none of the types'}: set multi_reference.references.types"
        )
    return ReferenceImages({kind: tuple(found[kind]) for kind in config.types}, config.column)


def _of_folders(root: Path, config: ReferencesSettings) -> dict[str, list[ReferenceImage]]:
    found: dict[str, list[ReferenceImage]] = {}
    for kind, folders in config.types.items():
        for folder in folders:
            files = sorted(p for p in (root / folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            found.setdefault(kind, []).extend(
                ReferenceImage(
                    kind, _label(file, root / folder, folder), file.relative_to(root).as_posix(), (str(file),)
                )
                for file in files
            )
    return found


def _label(file: Path, folder: Path, kind: str) -> str:
    """Returns the name of a folder inside the folder of the type: `owl` for animal/owl/3.jpg."""
    steps = file.relative_to(folder).parts
    return steps[0] if len(steps) > 1 else kind


def _of_dataset(config: ReferencesSettings) -> dict[str, list[ReferenceImage]]:
    import pyarrow.parquet as pq

    from echo4o.dataset_scripts.loading import parquet_files
    from echo4o.dataset_scripts.row_groups import open_file

    kinds = {value: kind for kind, values in config.types.items() for value in values}
    found: dict[str, list[ReferenceImage]] = {}
    seen: set[str] = set()
    for file in parquet_files(config.path, config.configuration):
        with open_file(file) as stream:
            shard = pq.ParquetFile(stream)
            for name in (config.column, config.type_column):
                if name not in shard.schema_arrow.names:
                    raise ValueError(
                        f"{config.path} has no column {name!r}; it has {', '.join(shard.schema_arrow.names)}"
                    )
            for group in range(shard.num_row_groups):
                values = shard.read_row_group(group, columns=[config.type_column]).column(0).to_pylist()
                seen.update(map(str, values))
                for row, value in enumerate(values):
                    if kind := kinds.get(str(value)):
                        source = f"{Path(file).name}:{group}:{row}"
                        found.setdefault(kind, []).append(ReferenceImage(kind, str(value), source, (file, group, row)))
    if not found:
        some = ", ".join(sorted(seen)[:8])
        raise ValueError(
            f"{config.path}: no row is of the subject types {', '.join(config.types)}; its column {config.type_column} "
            f"holds {some}: say which are which in multi_reference.references.types"
        )
    return found


def _of_shard(file: str, group: int, row: int, column: str) -> bytes:
    import pyarrow.parquet as pq

    from echo4o.dataset_scripts.row_groups import open_file

    with open_file(file) as stream:
        table = pq.ParquetFile(stream).read_row_group(group, columns=[column])
    stored = table.column(0)[row].as_py()
    return (stored or {}).get("bytes") or b""
