"""DPG-Bench's scores as pure functions of yes/no answers (arXiv 2403.05135; github.com/TencentQQGYLab/ELLA @ 3c228f1)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from echo4o.evaluation.metrics.dpg import formula


@dataclass(frozen=True)
class DPGQuestion:
    """A question of a prompt.

    Attributes:
        id: its number within the prompt.
        category: the tuple's type, such as "attribute - color"; the part before " - " is the broad category.
        text: the question.
        parents: the questions that must be answered with yes for this one to count.
    """

    id: int
    category: str
    text: str
    parents: tuple[int, ...] = ()

    @property
    def broad_category(self) -> str:
        return broad_category(self.category)


def category_of(proposition: str) -> str:
    """The category in the column `tuple`: "attribute - color (dog, red)" is of "attribute - color"."""
    return proposition.split("(")[0].strip()


def broad_category(category: str) -> str:
    return category.split("-")[0].strip()


def is_yes(answer: str) -> bool:
    """Whether an answer counts as yes: only exactly "yes" does, as in the original."""
    return answer == "yes"


def with_dependencies(questions: Sequence[DPGQuestion], yes: Mapping[int, bool]) -> dict[int, bool]:
    """The answers after the dependency rule: in the order of rows, no if any parent is no at that moment.

    Raises:
        ValueError: a parent that decides is not a question of the prompt.
    """
    return formula.after_dependencies({question.id: question.parents for question in questions}, yes)


def image_score(questions: Sequence[DPGQuestion], yes: Mapping[int, bool]) -> float:
    """The share of questions that hold in an image, 0 to 1, after the dependency rule."""
    return formula.sample_score({question.id: question.parents for question in questions}, yes)


@dataclass(frozen=True)
class CategoryScore:
    """A category over all images: the share of its questions answered with yes, 0 to 1, and how many there are.

    Attributes:
        score: after the dependency rule.
        raw: without it.
    """

    score: float
    raw: float
    questions: int


def category_scores(
    images: Iterable[tuple[Sequence[DPGQuestion], Mapping[int, bool]]],
) -> tuple[dict[str, CategoryScore], dict[str, CategoryScore]]:
    """The broad and the detailed categories over all images, pooled over questions.

    The original pools the raw answers of each prompt's last image only.
    """
    pools: tuple[dict, dict] = (defaultdict(list), defaultdict(list))
    for questions, yes in images:
        values = with_dependencies(questions, yes)
        for question in questions:
            pair = (values[question.id], yes[question.id])
            pools[0][question.broad_category].append(pair)
            pools[1][question.category].append(pair)
    broad, detailed = (
        {name: CategoryScore(fmean(v for v, _ in of), fmean(r for _, r in of), len(of)) for name, of in pool.items()}
        for pool in pools
    )
    return broad, detailed
