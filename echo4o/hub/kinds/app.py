"""Publishes the app of `echo4o serve` as a gradio Space."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from echo4o.hub.kinds.base import Kind, Read
from echo4o.hub.remote import Source
from echo4o.hub.wheel import write_wheel
from echo4o.model_cards.cards import app_card
from echo4o.modeling.pipelines import pipeline_class

SETTINGS = "echo4o_app.json"
_SCRIPT = '''"""The app of `echo4o serve` as a Space; its model and adapters are in echo4o_app.json."""

try:
    import spaces  # noqa: F401  ZeroGPU: before torch
except ImportError:
    pass

from pathlib import Path

from echo4o.serving.space import launch

if __name__ == "__main__":
    launch(Path(__file__).with_name("echo4o_app.json"))
'''


def write_app(folder: Path, model: str, lora: Sequence[tuple[str, str, float]] = ()) -> Path:
    """Write the files of a Space that serves a model of the Hub; returns the folder.

    Args:
        model: the Hub repository.
        lora: (name, Hub repository, scale) of each adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapters = [{"name": name, "source": source, "scale": scale} for name, source, scale in lora]
    (folder / "app.py").write_text(_SCRIPT)
    (folder / SETTINGS).write_text(json.dumps({"model": model, "adapters": adapters}, indent=2) + "\n")
    wheel = write_wheel(folder)
    (folder / "requirements.txt").write_text(f"./{wheel.name}\nuvicorn\npython-multipart\n")
    return folder


class AppKind(Kind):
    name = "app"
    repo_type = "space"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of echo4o_app.json."""
        return json.loads((self.folder / SETTINGS).read_text("utf-8"))

    def check(self) -> str:
        """Looks up the model and the adapters on the Hub."""
        cls = pipeline_class(self.hub.require(self.settings["model"]))
        for adapter in self.settings["adapters"]:
            self.hub.require(adapter["source"])
        return f"{self.settings['model']} is an {cls.__name__} on the Hub"

    def check_published(self) -> str:
        return f"it serves {self.settings['model']}"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        sources = [self.settings["model"], *(adapter["source"] for adapter in self.settings["adapters"])]
        return app_card(repo, sources, _gradio_version())

    def was_pushed_to(self, names: set[str]) -> bool:
        return SETTINGS in names

    def replaces(self, path: str) -> bool:
        return path.endswith((".py", ".json", ".whl"))

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        return super().files(published)

    def next_command(self, repo: str) -> str:
        return f"echo4o serve --model {self.settings['model']}"


def _gradio_version() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return "6.31.0"  # the version that the tests run with
