"""What a recipe will ask for, cost and take, before anything is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from echo4o.dataset_scripts.synthesis.recipe import ModelSettings, SynthesisRecipe
from echo4o.dataset_scripts.synthesis.rows import PlannedRow

# Tokens of a call: asked with and answered, as the prompts of wording.py and the judge's come out. Those of pictures count
# only where the recipe prices pictures by their tokens.
_TOKENS = {"text": (220, 60), "image": (60, 1100), "edit": (1500, 1100), "judge": (1400, 150)}


@dataclass(frozen=True)
class PlannedCalls:
    """The calls of one model: if everything passes at once, and if everything is asked as often as the gates allow."""

    role: str
    model: str
    least: int
    most: int
    usd: float | None  # of one call; None: the recipe names no price
    seconds: float


@dataclass(frozen=True)
class SynthesisPlan:
    """The rows by part and the calls by model."""

    rows: dict[str, int]
    calls: tuple[PlannedCalls, ...]
    concurrency: int
    per_minute: int | None
    repeats: int  # rows that ask for the same as an earlier one

    def cost(self, most: bool = False) -> float | None:
        """USD, or None where a price is missing."""
        if any(calls.usd is None for calls in self.calls):
            return None
        return sum((calls.most if most else calls.least) * calls.usd for calls in self.calls)

    def unpriced(self) -> list[str]:
        return [f"models.{calls.role}.price" for calls in self.calls if calls.usd is None]

    def seconds(self, most: bool = False) -> float:
        """The busiest model decides: all of them work at once."""

        def of(calls: PlannedCalls) -> float:
            number = calls.most if most else calls.least
            at_once = number * calls.seconds / self.concurrency
            return max(at_once, number * 60 / self.per_minute if self.per_minute else 0.0)

        return max(map(of, self.calls), default=0.0)

    def lines(self) -> list[str]:
        """For a person."""
        parts = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        lines = [f"{sum(self.rows.values()):,} rows: {parts}"]
        if self.repeats:
            lines.append(
                f"{self.repeats:,} of them ask for the same as an earlier row: give longer lists of words, or fewer rows"
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
    """The plan of these rows (those that are not made yet)."""
    gates, models = recipe.gates, recipe.models
    rows = {part: sum(task.part == part for task in tasks) for part in recipe.rows}
    properties = {thing for task in tasks for thing in task.sketch.get("objects", ())}  # each is asked for once
    following = recipe.instruction_following
    sentences = rows.get("surreal_fantasy", 0) + rows.get("multi_reference", 0)
    if following is not None and following.paraphrase:
        sentences += rows.get("instruction_following", 0)
    text = len(properties) + sentences
    edits = rows.get("multi_reference", 0)
    pictures = sum(rows.values()) - edits
    again = gates.pictures
    found = [_calls("text", models.text, text, text * gates.answers)]
    if models.edit is None:
        found.append(_calls("image", models.image, pictures + edits, (pictures + edits) * again))
    else:
        found += [_calls("image", models.image, pictures, pictures * again)]
        found += [_calls("edit", models.edit, edits, edits * again)]
    if gates.verify:
        judged = pictures + edits
        found.append(_calls("judge", models.judge, judged, judged * again * gates.answers))
    calls = tuple(calls for calls in found if calls.most)
    repeats = sum(task.repeats for task in tasks)
    return SynthesisPlan(rows, calls, recipe.rate.concurrency, recipe.rate.per_minute, repeats)


def _calls(role: str, model: ModelSettings, least: int, most: int) -> PlannedCalls:
    return PlannedCalls(role, model.name, least, most, guess(role, model), model.seconds)


def guess(role: str, model: ModelSettings) -> float | None:
    """About what one call costs in USD; None where the recipe does not say."""
    if model.is_local:
        return 0.0
    return model.price.usd(*_TOKENS[role]) if model.price.known else None


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
