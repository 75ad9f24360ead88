"""What is published: the small interface that each kind of folder fills in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from echo4o.hub.remote import Hub, Remote, Source
from echo4o.hub.safety import list_files

CARD = "README.md"
SMALL_BYTES = 1_000_000_000  # weights up to here are loaded to see whether they load
Read = Callable[[], bytes]


@dataclass(frozen=True)
class Said:
    """What the one who pushes says about the thing, for its card."""

    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    results: tuple[Path, ...] = ()  # folders of `echo4o evaluate`, or their result.json
    configurations: tuple[str, ...] = ()  # of a dataset: only these


class Kind(ABC):
    """A folder of this kind.

    Args:
        folder: what is sent.
        said: what its card needs and no file says.
        run: the training run that made it.
        hub: where the repositories are that its card names.
    """

    name: str
    repo_type: str = "model"

    def __init__(self, folder: Path, said: Said, run: Path | None, hub: Hub):
        self.folder, self.said, self.run, self.hub = folder, said, run, hub

    def check_name(self, repo: str) -> None:
        """Raise ValueError when a repository of this kind cannot be called so."""
        return None

    def files(self, there: Mapping[str, Read]) -> dict[str, Source]:
        """What is sent, without the card; `there` reads what the repository holds, by path."""
        return {path: file for path, file in list_files(self.folder).items() if path != CARD}

    @abstractmethod
    def check(self) -> str:
        """Load the folder, or what can be read of a large one; what was done, in a few words.

        Raises:
            ValueError, OSError: it does not load.
        """

    def at(self, folder: Path) -> "Kind":
        """The same in another folder: what came back from the Hub."""
        return type(self)(folder, self.said, self.run, self.hub)

    def hashes(self) -> dict[str, str]:
        """The sha256 of files that were read anyway."""
        return {}

    def check_published(self) -> str:
        """The same for a folder that came from the Hub, as those who use it load it."""
        return self.check()

    @abstractmethod
    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        """Its card, without what a person wrote; `files` are those that are sent."""

    def was_pushed_to(self, names: set[str]) -> bool:
        """Whether a repository with files of these names, and of this kind, may hold an earlier version."""
        return True

    def replaces(self, path: str) -> bool:
        """Whether a file of the repository that is not sent again goes."""
        return path.endswith((".safetensors", ".json", ".py")) or path.startswith("pictures/")

    def title(self) -> str:
        """The commit's message."""
        return f"Upload the {self.name} with echo4o"

    def after(self, remote: Remote, sha: str) -> None:
        """What else is to do once the commit `sha` is made."""
        return None

    def next_command(self, repo: str) -> str:
        """What to do with it now."""
        return f'echo4o generate "a lighthouse made of glass" --model {repo}'
