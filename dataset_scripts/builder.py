"""Echo-4o-Image for `datasets`, straight from the published layout.

    builder = Echo4oImage(config_name="surreal_fantasy", data_dir="Echo-4o-Image")
    builder.download_and_prepare("out", file_format="parquet", num_proc=4)

`datasets` cannot resume this; `echo4o dataset build` can, and it records every rejected row.
"""

import logging
from dataclasses import dataclass

import datasets

from echo4o.dataset_scripts.features import ALL, CONFIGURATIONS, SPLIT, features
from echo4o.dataset_scripts.findings import ReadingReport
from echo4o.dataset_scripts.images import ImageVerification
from echo4o.dataset_scripts.schema import parse_map, read_plan
from echo4o.dataset_scripts.source import PublishedSource
from echo4o.dataset_scripts.upstream import ReadOptions, RowShares, read_events

log = logging.getLogger(__name__)
SHARES = 64  # that rows are dealt into for several processes


@dataclass
class Echo4oImageConfig(datasets.BuilderConfig):
    """One configuration.

    Args:
        verify: "full" decodes every image, "header" checks header and end mark.
        map: `column=field` pairs, or the path of a mapping file, for rows of unknown shape.
        max_rejected: raise ValueError if more rows are rejected; None for any number.
    """

    verify: str = "full"
    map: list[str] | str | None = None
    max_rejected: int | None = None

    def create_config_id(self, config_kwargs: dict, custom_features=None) -> str:
        """The id contains a fingerprint of the source, so a changed folder is not read from the cache."""
        plain = super().create_config_id(config_kwargs, custom_features)
        return f"{plain}-{PublishedSource(self.data_dir).fingerprint(times=True)[:16]}" if self.data_dir else plain


class Echo4oImage(datasets.GeneratorBasedBuilder):
    """Reads `data_dir`, a folder or `hf://datasets/owner/name`, in the published layout.

    With several processes each reads all archives and takes its share of the rows, so that a row finds its images
    in any archive, and duplicates are found everywhere.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = Echo4oImageConfig
    BUILDER_CONFIGS = [Echo4oImageConfig(name=name) for name in CONFIGURATIONS]
    DEFAULT_CONFIG_NAME = ALL
    DEFAULT_WRITER_BATCH_SIZE = 64
    config: Echo4oImageConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"dataset_name": "echo-4o-image"} | kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=features())

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        if not self.config.data_dir:
            raise ValueError('Echo4oImage needs data_dir, the folder or "hf://datasets/owner/name" that it reads')
        PublishedSource(self.config.data_dir).select(
            self.config.name, self._options().plan
        )  # says early what is missing
        # Streaming reads the archives once; a list here would make it read them once per share.
        shares = frozenset(range(SHARES)) if dl_manager.is_streaming else list(range(SHARES))
        return [datasets.SplitGenerator(SPLIT, gen_kwargs={"shares": shares})]

    def _options(self) -> ReadOptions:
        mapping, verify = self.config.map, ImageVerification(self.config.verify)
        if isinstance(mapping, str):
            return ReadOptions(verify=verify, plan=read_plan(mapping))
        return ReadOptions(verify=verify, row_map=parse_map(mapping) if mapping else None)

    def _generate_examples(self, shares):  # pyright: ignore[reportIncompatibleMethodOverride]  # datasets passes gen_kwargs
        report = ReadingReport()
        only = RowShares(frozenset(shares), SHARES) if len(shares) < SHARES else None
        source = PublishedSource(self.config.data_dir or "")
        for event in read_events(source, self.config.name, self._options(), only=only):
            if event.row is not None:
                report.accept(event.configuration)
                yield event.row["id"], event.row
                continue
            if event.finding is not None:
                report.add(event.finding)
            limit = self.config.max_rejected
            if limit is not None and report.rejected_total > limit:
                raise ValueError(f"more than max_rejected={limit} rows are rejected; the last: {event.finding}")
        if report.rejected_total:
            log.warning("%s. `echo4o dataset validate %s` lists them one by one.", report, self.config.data_dir)
