"""Estimates the calls, cost and time of a synthesis before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from echo4o.dataset_scripts.synthesis.recipe import ModelSettings, SynthesisRecipe
from echo4o.dataset_scripts.synthesis.rows import PlannedRow

# Input and output tokens of a call, estimated from the prompts of wording.py and of the judge. Those of images count only
# if the recipe prices images by their tokens.
_TOKENS = {"text": (220, 60), "image": (60, 1100), "edit": (1500, 1100), "judge": (1400, 150)}


@dataclass(frozen=True)
class PlannedCalls:
    """The number of calls of one model: if everything passes at once, and at most, as the gates allow."""

    role: str
    model: str
    least: int
    most: int
    usd: float | None  # of one call; None if the recipe has no price
    seconds: float


@dataclass(frozen=True)
class SynthesisPlan:
    """The rows by part and the calls by model."""

    rows: dict[str, int]
    calls: tuple[PlannedCalls, ...]
    concurrency: int
    per_minute: int | None
    repeats: int  # rows with the same content as an earlier row

    def cost(self, most: bool = False) -> float | None:
        """Returns the cost in USD (with `most`, the upper bound); None if a price is missing."""
        total = 0.0
        for calls in self.calls:
            if calls.usd is None:
                return None
            total += (calls.most if most else calls.least) * calls.usd
        return total

    def unpriced(self) -> list[str]:
        """Returns the settings of the missing prices."""
        return [f"models.{calls.role}.price" for calls in self.calls if calls.usd is None]

    def seconds(self, most: bool = False) -> float:
        """Returns the duration in seconds: that of the busiest model, because all models work in parallel."""

        def duration(calls: PlannedCalls) -> float:
            number = calls.most if most else calls.least
            parallel = number * calls.seconds / self.concurrency
            return max(parallel, number * 60 / self.per_minute if self.per_minute else 0.0)

        return max(map(duration, self.calls), default=0.0)

    def lines(self) -> list[str]:
        """Returns the plan as lines of text."""
        parts = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        lines = [f"{sum(self.rows.values()):,} rows: {parts}"]
        if self.repeats:
            lines.append(
                f"{self.repeats:,} of them have the same content as an earlier row: use longer lists of words, or fewer rows"
            )
        for calls in self.calls:
            price = "no price in the recipe" if calls.usd is None else f"about {calls.usd:.4f} USD each"
            lines.append(f"{calls.role}: {calls.model}: {calls.least:,} to {calls.most:,} calls, {price}")
        cost = self.cost()
        if cost is None:
            lines.append(f"cost: unknown; set {', '.join(self.unpriced())}, from your provider's price list")
        else:
            lines.append(
                f"cost, at the recipe's prices: about {cost:.2f} USD if every answer passes at once, "
                f"{self.cost(most=True):.2f} at most"
            )
        lines.append(f"time: about {_time(self.seconds())}, {_time(self.seconds(most=True))} at most")
        return lines


def make_plan(recipe: SynthesisRecipe, tasks: Sequence[PlannedRow]) -> SynthesisPlan:
    """Returns the plan for these rows, which are those not decided yet."""
    gates, models = recipe.gates, recipe.models
    rows = {part: sum(task.part == part for task in tasks) for part in recipe.rows}
    properties = {thing for task in tasks for thing in task.sketch.get("objects", ())}  # requested once each
    following = recipe.instruction_following
    sentences = rows.get("surreal_fantasy", 0) + rows.get("multi_reference", 0)
    if following is not None and following.paraphrase:
        sentences += rows.get("instruction_following", 0)
    text = len(properties) + sentences
    edits = rows.get("multi_reference", 0)
    images = sum(rows.values()) - edits
    attempts = gates.pictures
    planned = [_calls("text", models.text, text, text * gates.answers)]
    if models.edit is None:
        planned.append(_calls("image", models.image, images + edits, (images + edits) * attempts))
    else:
        planned += [_calls("image", models.image, images, images * attempts)]
        planned += [_calls("edit", models.edit, edits, edits * attempts)]
    if gates.verify and models.judge is not None:
        judged = images + edits
        planned.append(_calls("judge", models.judge, judged, judged * attempts * gates.answers))
    calls = tuple(calls for calls in planned if calls.most)
    repeats = sum(task.repeats for task in tasks)
    return SynthesisPlan(rows, calls, recipe.rate.concurrency, recipe.rate.per_minute, repeats)


def _calls(role: str, model: ModelSettings, least: int, most: int) -> PlannedCalls:
    return PlannedCalls(role, model.name, least, most, guess(role, model), model.seconds)


def guess(role: str, model: ModelSettings) -> float | None:
    """Estimates the cost of one call in USD; None if the recipe has no price."""
    if model.is_local:
        return 0.0
    return model.price.usd(*_TOKENS[role]) if model.price.known else None


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
