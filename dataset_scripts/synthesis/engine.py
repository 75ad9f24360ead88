"""Makes the planned rows: instruction, gates, picture, gates, verdict; each ends once, accepted or rejected."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from echo4o.dataset_scripts.contamination import PromptIndex
from echo4o.dataset_scripts.images import CheckedImage
from echo4o.dataset_scripts.synthesis.calls import (
    CallRefused,
    CallUnanswered,
    ImageCheck,
    ModelCalls,
    RunEnded,
    UnusableAnswer,
)
from echo4o.dataset_scripts.synthesis.folder import SynthesisFolder, suffix_of
from echo4o.dataset_scripts.synthesis.gates import (
    GateReason,
    ImageGates,
    InstructionGates,
    RowRejected,
    instructions_of,
)
from echo4o.dataset_scripts.synthesis.recipe import SynthesisRecipe
from echo4o.dataset_scripts.synthesis.rows import Instruction, PlannedRow, RowSteps
from echo4o.dataset_scripts.synthesis.tasks import Chain

_REFUSED = {"text": GateReason.TEXT_REFUSED, "judge": GateReason.JUDGE_REFUSED, "endpoint": GateReason.BAD_REQUEST}
# When nothing but these comes, row after row, it is not the rows.
_FRUITLESS = (GateReason.UNDECODABLE, GateReason.WRONG_SIZE, GateReason.NO_VERDICT)
# A picture that is rejected for one of these may be drawn again.
_AGAIN = (GateReason.UNDECODABLE, GateReason.WRONG_SIZE, GateReason.DUPLICATE_PICTURE, GateReason.NOT_VERIFIED)


@dataclass
class SynthesisOutcome:
    """What became of the planned rows, over all runs into the folder."""

    planned: int
    accepted: Counter = field(default_factory=Counter)  # by part
    rejected: Counter = field(default_factory=Counter)  # by reason
    open: dict[str, str] = field(default_factory=dict)  # row -> why it has no end yet
    remarks: Counter = field(default_factory=Counter)  # of this run

    @classmethod
    def of(cls, tasks: Sequence[PlannedRow], folder: SynthesisFolder) -> "SynthesisOutcome":
        """Counts the planned rows that the folder already accepted or rejected."""
        outcome = cls(len(tasks))
        for task in tasks:
            if task.id in folder.accepted:
                outcome.accepted[task.part] += 1
            elif task.id in folder.rejected:
                outcome.rejected[folder.rejected[task.id]["reason"]] += 1
        return outcome

    @property
    def decided(self) -> int:
        """Number of rows that are accepted or rejected."""
        return self.accepted.total() + self.rejected.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected.items()))
        text = f"{self.planned} rows planned, {self.accepted.total()} accepted, {self.rejected.total()} rejected"
        text += f" ({reasons})" if reasons else ""
        left = self.planned - self.decided
        text += f", {left} not made yet" if left else ""
        return text + "".join(f"; {count} x {remark}" for remark, count in sorted(self.remarks.items()))


class Synthesis:
    """A run over the rows that have no end yet."""

    def __init__(
        self,
        recipe: SynthesisRecipe,
        chains: dict[str, Chain],
        tasks: Sequence[PlannedRow],
        calls: ModelCalls,
        folder: SynthesisFolder,
        prompts: PromptIndex | None = None,
        on_progress: Callable[[SynthesisOutcome], object] = lambda outcome: None,
    ):
        self.recipe, self.chains, self.tasks = recipe, chains, tasks
        self.calls, self.folder, self.on_progress = calls, folder, on_progress
        self.fingerprint = recipe.fingerprint()
        self.instructions = InstructionGates.of(recipe.gates, prompts)
        self.instructions.taken |= instructions_of(folder.accepted.values())
        self.pictures = ImageGates(recipe, {name: folder.look_of(name) for name in folder.accepted})
        self._failures: list[Exception] = []
        self._fruitless = 0  # pictures in a row that could not even be judged
        self.outcome = SynthesisOutcome.of(tasks, folder)

    async def run(self) -> SynthesisOutcome:
        """Make the rows, as many at once as the rate allows. When the calls end the run, what is open stays open."""
        waiting = iter([task for task in self.tasks if not self.folder.is_decided(task.id)])

        async def work() -> None:
            for task in waiting:
                try:
                    await self._make(task)
                except RunEnded:
                    return
                except CallUnanswered as error:
                    self.outcome.open[task.id] = str(error)
                except Exception as error:  # the other rows come to the end of what they paid for
                    self._failures.append(error)
                if self._failures:
                    return
                self.on_progress(self.outcome)

        # One row has one call open at a time: twice as many rows keep both text and image model busy.
        await asyncio.gather(*(work() for _ in range(2 * self.recipe.rate.concurrency)))
        if self._failures:
            raise self._failures[0]
        if self.instructions.contaminated:
            self.outcome.remarks["instruction near a benchmark prompt"] += self.instructions.contaminated
        return self.outcome

    async def _make(self, task: PlannedRow) -> None:
        steps = RowSteps(task, self.calls, self.folder.keep_step, self.recipe.gates.answers)
        text, last = "", _LastImage()
        try:
            made = await self._instruct(task, steps)
            text = made.text
            self.instructions.check(task.id, text)
            picture, drawn = await self._draw(task, made, steps, last)
        except RowRejected as rejected:
            self.instructions.release(task.id, text)
            self._reject(task, steps, rejected, text, last.picture)
            return
        except BaseException:
            self.instructions.release(task.id, text)
            raise
        self._accept(task, made, steps, picture, drawn)

    async def _instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        try:
            made = await self.chains[task.part].instruct(task, steps)
        except UnusableAnswer as error:
            raise RowRejected(GateReason.NO_INSTRUCTION, str(error)) from None
        except CallRefused as error:
            raise RowRejected(_REFUSED[error.by], str(error)) from None
        self.outcome.remarks.update(made.remarks)
        return made

    async def _draw(
        self, task: PlannedRow, made: Instruction, steps: RowSteps, last: "_LastImage"
    ) -> tuple[CheckedImage, int]:
        """The first picture that passes every gate, and the how manieth it is."""
        failed = None
        for attempt in range(1, self.recipe.gates.pictures + 1):
            try:
                last.picture = await self.calls.draw(
                    made.text, made.references, (task.seed + attempt) % 2**31, f"{task.id} {attempt}"
                )
                picture, _ = self.pictures.check(task.part, last.picture)
                await self._verify(task, made, steps, picture.data, attempt)
                picture, seen = self.pictures.check(task.part, last.picture)  # others were accepted meanwhile
            except CallRefused as error:
                reason = _REFUSED.get(error.by, GateReason.PICTURE_REFUSED)
                steps.keep("picture", attempt, rejected=reason, detail=str(error))
                raise RowRejected(reason, str(error)) from None
            except RowRejected as rejected:
                steps.keep("picture", attempt, rejected=rejected.reason, detail=rejected.detail)
                self._require_fruit(rejected)
                if rejected.reason not in _AGAIN:
                    raise
                failed = rejected
                continue
            self._fruitless = 0
            self.pictures.accept(task.id, seen)
            steps.keep("picture", attempt, result=picture.sha256.hex(), looks=seen.hex())
            return picture, attempt
        raise failed

    def _require_fruit(self, rejected: RowRejected) -> None:
        """ValueError when picture after picture is paid for and cannot even be judged: that is no matter of the row."""
        self._fruitless = self._fruitless + 1 if rejected.reason in _FRUITLESS else 0
        if self._fruitless >= self.recipe.rate.give_up_after:
            raise ValueError(
                f"the last {self._fruitless} pictures were all of no use; why this one: {rejected.reason} "
                f"({rejected.detail}). What was paid for is kept: change the models, their options or the gates in the "
                "recipe, or raise rate.give_up_after"
            )

    async def _verify(
        self, task: PlannedRow, made: Instruction, steps: RowSteps, picture: bytes, attempt: int
    ) -> None:
        if not self.recipe.gates.verify:
            return
        check = ImageCheck(made.text, made.include, made.note, made.references)
        try:
            verdict = await self.calls.judge(check, picture, f"{task.id} {attempt}")
        except UnusableAnswer as error:
            raise RowRejected(GateReason.NO_VERDICT, str(error)) from None
        steps.prompts["verdict"] = verdict.prompt_sha256
        steps.keep("verdict", attempt, result={"right": verdict.right, "reason": verdict.reason})
        if not verdict.right:
            raise RowRejected(GateReason.NOT_VERIFIED, verdict.reason)

    def _provenance(self, task: PlannedRow, steps: RowSteps) -> dict:
        return {
            "recipe": {"version": self.recipe.version, "fingerprint": self.fingerprint},
            "models": self.calls.names,
            "prompts": steps.prompts,
            "seed": task.seed,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _accept(self, task: PlannedRow, made: Instruction, steps: RowSteps, picture: CheckedImage, drawn: int) -> None:
        row = {
            "row": task.id,
            "task_type": "multi_reference" if made.references else "t2i",
            "instruction": made.text,
            "type": made.category,
            **made.facts,
            "provenance": self._provenance(task, steps) | {"pictures_drawn": drawn},
        }
        pictures = {f"{task.id}.{picture.format.lower()}": picture.data}
        for number, data in enumerate(made.references, start=1):
            pictures[f"{task.id}_{number}.{suffix_of(data)}"] = data
        self.folder.accept(task.part, task.number, row, pictures)
        self.outcome.accepted[task.part] += 1

    def _reject(
        self, task: PlannedRow, steps: RowSteps, rejected: RowRejected, text: str, picture: bytes | None
    ) -> None:
        row = {
            "row": task.id,
            "part": task.part,
            "reason": str(rejected.reason),
            "detail": rejected.detail,
            "instruction": text,
            "provenance": self._provenance(task, steps),
        }
        self.folder.reject(row, picture)
        self.outcome.rejected[str(rejected.reason)] += 1


@dataclass
class _LastImage:
    """The picture that was drawn last, for the folder of rejected rows."""

    picture: bytes | None = None
