"""The interface of a benchmark: its prompts, the questions to the judge, the fields of the answers, and the scores."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PROMPTS = Path(__file__).parents[1] / "prompts"


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt of a benchmark.

    Args:
        id: name of its images (`<id>.png`), and key of its records and comparisons.
        group: the group whose mean its score is part of; `type` is finer if the benchmark has types within groups.
        text: the prompt for the model.
        facts: the rest of the row, for the question to the judge.
        references: reference images for the model.
    """

    id: str
    group: str
    text: str
    type: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    references: tuple[Path, ...] = ()


class Verdict(BaseModel):
    """The fields of a judge's answer. The reason comes first, because judges decide better after they explain."""

    model_config = ConfigDict(extra="ignore")

    reason: str

    def scores(self) -> dict[str, float]:
        return {name: value for name, value in self.model_dump().items() if name != "reason"}


class BareVerdict(Verdict):
    """A verdict without a reason, for many short questions."""

    reason: str = Field("", exclude=True)


# From 0 to 10; neither infinite nor "not a number".
Grade = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


@dataclass(frozen=True)
class Aspect:
    """One judgement about an image: the file of its judge prompt and the fields of its answer."""

    name: str
    prompt_file: str
    verdict: type[Verdict]
    shows_references: bool = False
    # The name of its judge prompt, if several aspects share one.
    asked_with: str = ""
    # Expected length of an answer, for estimates of costs.
    answer_tokens: int = 200

    @property
    def prompt_name(self) -> str:
        return self.asked_with or self.name


def git_blob_id(data: bytes) -> str:
    """The id under which git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class PromptSource:
    """The address of the official prompts: a file at a pinned revision, with the checksum of its content.

    Attributes:
        sha256: the checksum; of a git blob where `is_blob`.
    """

    url: str
    revision: str
    sha256: str
    count: int
    is_blob: bool = False

    @property
    def hash_name(self) -> str:
        return "git blob id" if self.is_blob else "SHA-256"

    def hash(self, data: bytes) -> str:
        """The checksum of a file's content, of the kind that `sha256` has."""
        return git_blob_id(data) if self.is_blob else hashlib.sha256(data).hexdigest()

    @property
    def address(self) -> str:
        return self.url.format(revision=self.revision)


@dataclass(frozen=True)
class Measure:
    """The measure of a score, for a benchmark that can be run as several measures.

    Attributes:
        name: in words.
        published: the key of the published numbers of the same measure; None: there are none.
        why_not: why published numbers are not shown beside it.
    """

    name: str
    published: str | None
    why_not: str | None = None


class Benchmark(ABC):
    """The interface that every benchmark implements."""

    name: str
    title: str
    groups: tuple[str, ...]
    aspects: tuple[Aspect, ...]
    scale: float  # the best score
    source: PromptSource | None = None
    # The number of result.json that published ones are compared with.
    published_as: str = "score"
    # The judges that can answer; None: any judge that reads text and images.
    only_judge: str | None = None
    # The judge where none is named; None: the default of the command line.
    default_judge: str | None = None
    images_per_prompt: int = 1
    # Whether the fields of verdicts mean the same for all prompts, so that their means are reported.
    reports_fields: bool = True
    # The known prompt files by name, where there are several; the first one is the default.
    prompt_files: Mapping[str, PromptSource] = {}
    # Further overall numbers: the function of a prompt's image scores whose mean over all prompts is reported.
    prompt_numbers: Mapping[str, Callable[[Sequence[float]], float]] = {}

    @abstractmethod
    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        """A prompt from line `number` (from 1) of a prompt file in `folder`. Raises ValueError if the row is wrong."""

    @abstractmethod
    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        """The values that the judge prompt is filled with."""

    @abstractmethod
    def sample_score(self, scores: dict[str, float]) -> float:
        """An image's score from the fields of all its verdicts."""

    def aspects_of(self, prompt: BenchmarkPrompt) -> Sequence[Aspect]:
        """The judgements to make about each image of a prompt."""
        return self.aspects

    def question_about(self, prompt: BenchmarkPrompt, aspect: Aspect) -> dict[str, Any]:
        """The values that the judge prompt of one aspect is filled with."""
        return self.question(prompt)

    def image_score(self, prompt: BenchmarkPrompt, records: Sequence[dict[str, Any]]) -> float:
        """An image's score from the records of all its judgements."""
        return self.sample_score({name: value for record in records for name, value in record["scores"].items()})

    def original_images(
        self, folder: Path, prompts: Sequence[BenchmarkPrompt], per_prompt: int
    ) -> dict[tuple[str, int], Path] | None:
        """The images of a folder in the original's layout, by prompt and number; None if it has another layout."""
        return None

    def measure(self, prompts: dict[str, Any], judge: dict[str, Any]) -> Measure | None:
        """The measure of a score; None: there is only one, under the benchmark's name.

        Args:
            prompts: `official` and other facts of the prompt file.
            judge: the judge's identity.
        """
        return None

    def details(self, images: Sequence[tuple[BenchmarkPrompt, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
        """Further results from the records of the scored images; part of `result.json`."""
        return {}

    def judged_values(
        self, prompt: BenchmarkPrompt, records: Sequence[dict[str, Any]]
    ) -> dict[tuple[str, str], float]:
        """The judge's values for an image, by (field, judged item), to compare two judges."""
        return {(name, ""): value for record in records for name, value in record["scores"].items()}

    def explanation(self, prompt: BenchmarkPrompt, record: dict[str, Any]) -> str:
        """The text that the report shows for a judgement."""
        return record["reason"]

    @abstractmethod
    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        """Each overall number as weights of the groups' means; the headline is called "score"."""


def text_field(row: dict, name: str) -> str:
    """A field that must hold text."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{name}" must be a text, it is {value!r}' if name in row else f'"{name}" is missing')
    return value


def known_field(row: dict, name: str, known) -> str:
    """A field that must hold one of the names in `known`."""
    value = text_field(row, name)
    if value not in known:
        raise ValueError(f'"{name}" is {value!r}; known are {", ".join(known)}')
    return value
