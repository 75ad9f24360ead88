"""Publishes a metric of the `evaluate` library: a Gradio Space that `evaluate.load("owner/name")` loads."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import evaluate  # a line of its own: `import datasets, evaluate` breaks evaluate.load

from echo4o.hub.kinds.base import Kind, Read
from echo4o.hub.remote import Remote, Source
from echo4o.hub.safety import list_files
from echo4o.model_cards.cards import metric_card

REQUIREMENTS = "requirements.txt"


class MetricKind(Kind):
    name = "metric"
    repo_type = "space"

    @cached_property
    def script(self) -> Path:
        """The module that defines the metric; `evaluate.load` loads it."""
        files = [
            f for f in sorted(self.folder.glob("*.py")) if re.search(r"\(evaluate\.Metric\)", f.read_text("utf-8"))
        ]
        if len(files) != 1:
            raise ValueError(
                f"{self.folder} must have one module that defines an evaluate.Metric; it has {len(files)}"
            )
        return files[0]

    def check_name(self, repo: str) -> None:
        if repo.split("/")[-1] != self.script.stem:  # evaluate.load("owner/metric") loads metric.py
            raise ValueError(f"{repo}: the Space must have the name of its script, {self.script.stem}")

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        files: dict[str, Source] = {
            path: file for path, file in list_files(self.folder).items() if path.endswith(".py")
        }
        files.pop("__init__.py", None)  # belongs to the package, not to the metric
        files[REQUIREMENTS] = f"evaluate=={evaluate.__version__}\ndatasets\n".encode()
        return files

    def check(self) -> str:
        """Loads the metric with `evaluate.load`."""
        self._metric()
        return "evaluate.load loads it"

    def _metric(self) -> evaluate.EvaluationModule:
        return evaluate.load(str(self.script))

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        metric = self._metric()
        example = re.search(r"^ *>>> (metric\.compute.*)$", metric.inputs_description, re.M)
        if not example:
            raise ValueError(f"{self.script}: its inputs_description has no example `>>> metric.compute(...)`")
        if not metric.description.strip():
            raise ValueError(f"{self.script}: its description is empty")
        title = metric.description.split()[0]
        return metric_card(repo, title, metric.description, metric.citation, list(metric.features), example[1])

    def was_pushed_to(self, names: set[str]) -> bool:
        return self.script.name in names  # otherwise it is another app

    def replaces(self, path: str) -> bool:
        return path.endswith(".py")

    def after(self, remote: Remote, sha: str) -> None:
        remote.move_tag(f"v{evaluate.__version__}", sha)  # the revision that evaluate.load requests

    def next_command(self, repo: str) -> str:
        return f"python -c 'import evaluate; print(evaluate.load(\"{repo}\").inputs_description)'"
