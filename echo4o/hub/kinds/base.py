"""The interface that each kind of published folder implements."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from echo4o.hub.remote import Hub, Remote, Source
from echo4o.hub.safety import list_files

CARD = "README.md"
SMALL_BYTES = 1_000_000_000  # weights up to this size are loaded as a check
Read = Callable[[], bytes]


@dataclass(frozen=True)
class PushDetails:
    """Facts that the files do not state and the user passes to a push."""

    base_model: str | None = None  # Hub repository of the model that was fine-tuned
    datasets: tuple[str, ...] = ()  # Hub repositories of the training data
    results: tuple[Path, ...] = ()  # folders of `echo4o evaluate`, or their result.json files
    benchmark_datasets: tuple[str, ...] = ()  # BENCHMARK=DATASET[#TASK]: where a benchmark is on the Hub
    configurations: tuple[str, ...] = ()  # of a dataset: publish only these; empty for all


class Kind(ABC):
    """A folder to publish.

    Args:
        folder: the folder.
        details: facts for the card that the files do not state.
        run: the training run that exported the folder; None if it is not known.
        hub: reads the repositories that the card names.
    """

    name: ClassVar[str]
    repo_type: ClassVar[str] = "model"

    def __init__(self, folder: Path, details: PushDetails, run: Path | None, hub: Hub):
        self.folder, self.details, self.run, self.hub = folder, details, run, hub

    def check_name(self, repo: str) -> None:
        """Raises ValueError if a repository of this kind cannot have this name."""
        return None

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        """Returns the files to upload, without the card. `published` reads the files that the repository has, by path."""
        return {path: file for path, file in list_files(self.folder).items() if path != CARD}

    @abstractmethod
    def check(self) -> str:
        """Loads the folder, or validates the files of a large one; returns what was checked, for a message.

        Raises:
            ValueError, OSError: the folder does not load.
        """

    def at(self, folder: Path) -> Self:
        """Returns the same object for another folder, for example the download from the Hub."""
        return type(self)(folder, self.details, self.run, self.hub)

    def hashes(self) -> dict[str, str]:
        """Returns the SHA-256 hashes that are known without reading the files, by path."""
        return {}

    def check_published(self) -> str:
        """Loads a folder that was downloaded from the Hub, as its users load it; returns what was checked."""
        return self.check()

    @abstractmethod
    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        """Returns the generated card; `files` are the files to upload."""

    def was_pushed_to(self, names: set[str]) -> bool:
        """Whether a repository of this kind with these files may hold an earlier version of this folder."""
        return True

    def replaces(self, path: str) -> bool:
        """Whether a published file that the folder does not have is deleted."""
        sample_images = ("samples/", "pictures/")  # the latter is the folder of version 0.1
        return path.endswith((".safetensors", ".json", ".py")) or path.startswith(sample_images)

    def title(self) -> str:
        """Returns the message of the commit."""
        return f"Upload the {self.name} with echo4o"

    def after(self, remote: Remote, sha: str) -> None:
        """Runs after the commit `sha`, for example to set a tag."""
        return None

    def next_command(self, repo: str) -> str:
        """Returns the command to run next."""
        return f'echo4o generate "a lighthouse made of glass" --model {repo}'
