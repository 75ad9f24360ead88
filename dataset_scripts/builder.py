"""``Echo4oImage``: the published Echo-4o-Image as a ``datasets`` builder."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.builder import Key

from echo4o.dataset_scripts.features import ALL, CONFIGURATIONS, PARTS, features, parts_of
from echo4o.dataset_scripts.report import Report
from echo4o.dataset_scripts.upstream import PartFiles, find_parts, read_part

logger = datasets.utils.logging.get_logger(__name__)
SHOWN_FINDINGS = 5


@dataclass
class Echo4oImageConfig(datasets.BuilderConfig):
    """One configuration: the parts that it reads from ``data_dir``."""

    parts: tuple[str, ...] = PARTS

    def create_config_id(self, config_kwargs: dict, custom_features=None) -> str:
        """The usual id with the state of the files in it: a folder that has changed is not read from the cache."""
        plain = super().create_config_id(config_kwargs, custom_features)
        if not self.data_dir or not Path(self.data_dir).is_dir():
            return plain
        return f"{plain}-{_state(self.data_dir)}"


def _state(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


class Echo4oImage(datasets.GeneratorBasedBuilder):
    """Echo-4o-Image from a local copy of the release: ``Echo4oImage("surreal_fantasy", data_dir=folder)``.

    The configurations are ``surreal_fantasy``, ``multi_reference``, ``instruction_following`` and ``all``, which reads
    the files of the three. Rows that cannot be used are warned about, with their number and reasons; they are listed
    by :func:`echo4o.dataset_scripts.upstream.read_upstream`.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = Echo4oImageConfig
    BUILDER_CONFIGS = [Echo4oImageConfig(name=name, parts=parts_of(name)) for name in CONFIGURATIONS]
    DEFAULT_CONFIG_NAME = ALL
    # Pictures are of the order of a megabyte: the default of a thousand rows would hold them all in memory.
    DEFAULT_WRITER_BATCH_SIZE = 100

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="Echo-4o-Image (arXiv 2508.09987)", features=features())

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        if not self.config.data_dir:
            raise ValueError(
                f"Echo4oImage({self.config.name!r}) needs data_dir, the folder of the release; {self.config.data_dir!r} "
                'was given. Example: Echo4oImage("all", data_dir="Echo-4o-Image")'
            )
        found = find_parts(os.path.expanduser(self.config.data_dir), self.config.parts)
        # A list is what datasets divides among processes.
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"parts": list(found.values())})]

    def _generate_shards(self, parts: list[PartFiles]) -> Iterator[str]:
        yield from (str(part.rows[0]) for part in parts)

    def _generate_examples(self, parts: list[PartFiles]) -> Iterator[tuple[Key, dict[str, Any]]]:
        for shard, files in enumerate(parts):
            report = Report()
            for number, row in enumerate(read_part(files, report)):
                yield Key(shard, number), row
            _warn(files.part, report)


def _warn(part: str, report: Report) -> None:
    if report.findings:
        shown = "\n  ".join(map(str, report.findings[:SHOWN_FINDINGS]))
        more = len(report.findings) - SHOWN_FINDINGS
        logger.warning(f"{part}: {report}\n  {shown}" + (f"\n  and {more} more" if more > 0 else ""))
