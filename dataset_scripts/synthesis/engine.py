"""Generates the planned rows: instruction, gates, image, gates, verdict. Each row is accepted or rejected once."""

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
# Consecutive rejections for these reasons point at the models or the recipe, not at the rows.
_UNUSABLE = (GateReason.UNDECODABLE, GateReason.WRONG_SIZE, GateReason.NO_VERDICT)
# An image that is rejected for one of these reasons is generated again.
_RETRIED = (GateReason.UNDECODABLE, GateReason.WRONG_SIZE, GateReason.DUPLICATE_PICTURE, GateReason.NOT_VERIFIED)


@dataclass
class SynthesisOutcome:
    """Results of the planned rows, over all runs into the folder."""

    planned: int
    accepted: Counter = field(default_factory=Counter)  # by part
    rejected: Counter = field(default_factory=Counter)  # by reason
    open: dict[str, str] = field(default_factory=dict)  # undecided row -> cause
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
        text += f", {left} not decided yet" if left else ""
        return text + "".join(f"; {count} x {remark}" for remark, count in sorted(self.remarks.items()))


class Synthesis:
    """A run over the rows that are neither accepted nor rejected yet."""

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
        self.images = ImageGates(recipe, {name: folder.thumbnail_of(name) for name in folder.accepted})
        self._failures: list[Exception] = []
        self._unusable = 0  # consecutive images that could not be judged
        self.outcome = SynthesisOutcome.of(tasks, folder)

    async def run(self) -> SynthesisOutcome:
        """Generates the rows, in parallel as far as the rate allows. Undecided rows stay open if the calls end the run."""
        waiting = iter([task for task in self.tasks if not self.folder.is_decided(task.id)])

        async def work() -> None:
            for task in waiting:
                try:
                    await self._process(task)
                except RunEnded:
                    return
                except CallUnanswered as error:
                    self.outcome.open[task.id] = str(error)
                except Exception as error:  # the other rows finish the calls that are already paid for
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

    async def _process(self, task: PlannedRow) -> None:
        """Accepts or rejects one row."""
        steps = RowSteps(task, self.calls, self.folder.keep_step, self.recipe.gates.answers)
        text, last = "", _LastImage()
        try:
            instruction = await self._instruct(task, steps)
            text = instruction.text
            self.instructions.check(task.id, text)
            image, attempts = await self._generate(task, instruction, steps, last)
        except RowRejected as rejected:
            self.instructions.release(task.id, text)
            self._reject(task, steps, rejected, text, last.data)
            return
        except BaseException:
            self.instructions.release(task.id, text)
            raise
        self._accept(task, instruction, steps, image, attempts)

    async def _instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        try:
            instruction = await self.chains[task.part].instruct(task, steps)
        except UnusableAnswer as error:
            raise RowRejected(GateReason.NO_INSTRUCTION, str(error)) from None
        except CallRefused as error:
            raise RowRejected(_REFUSED[error.by], str(error)) from None
        self.outcome.remarks.update(instruction.remarks)
        return instruction

    async def _generate(
        self, task: PlannedRow, instruction: Instruction, steps: RowSteps, last: "_LastImage"
    ) -> tuple[CheckedImage, int]:
        """Returns the first image that passes every gate, and the number of images generated so far."""
        failed = RowRejected(GateReason.NO_VERDICT, "no image was generated")  # gates.pictures is at least 1
        for attempt in range(1, self.recipe.gates.pictures + 1):
            try:
                last.data = await self.calls.generate(
                    instruction.text, instruction.references, (task.seed + attempt) % 2**31, f"{task.id} {attempt}"
                )
                image, _ = self.images.check(task.part, last.data)
                await self._verify(task, instruction, steps, image.data, attempt)
                image, thumbnail = self.images.check(task.part, last.data)  # again: other rows were accepted meanwhile
            except CallRefused as error:
                reason = _REFUSED.get(error.by, GateReason.PICTURE_REFUSED)
                steps.keep("picture", attempt, rejected=reason, detail=str(error))
                raise RowRejected(reason, str(error)) from None
            except RowRejected as rejected:
                steps.keep("picture", attempt, rejected=rejected.reason, detail=rejected.detail)
                self._stop_if_unusable(rejected)
                if rejected.reason not in _RETRIED:
                    raise
                failed = rejected
                continue
            self._unusable = 0
            self.images.accept(task.id, thumbnail)
            steps.keep("picture", attempt, result=image.sha256.hex(), looks=thumbnail.hex())
            return image, attempt
        raise failed

    def _stop_if_unusable(self, rejected: RowRejected) -> None:
        """Raises ValueError after too many consecutive images that could not be judged."""
        self._unusable = self._unusable + 1 if rejected.reason in _UNUSABLE else 0
        if self._unusable >= self.recipe.rate.give_up_after:
            raise ValueError(
                f"the last {self._unusable} images could not be used; the last reason: {rejected.reason} "
                f"({rejected.detail}). Paid results are kept: change the models, their options or the gates in the "
                "recipe, or raise rate.give_up_after"
            )

    async def _verify(
        self, task: PlannedRow, instruction: Instruction, steps: RowSteps, image: bytes, attempt: int
    ) -> None:
        if not self.recipe.gates.verify:
            return
        check = ImageCheck(instruction.text, instruction.include, instruction.note, instruction.references)
        try:
            verdict = await self.calls.judge(check, image, f"{task.id} {attempt}")
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

    def _accept(
        self, task: PlannedRow, instruction: Instruction, steps: RowSteps, image: CheckedImage, attempts: int
    ) -> None:
        row = {
            "row": task.id,
            "task_type": "multi_reference" if instruction.references else "t2i",
            "instruction": instruction.text,
            "type": instruction.category,
            **instruction.facts,
            "provenance": self._provenance(task, steps) | {"pictures_drawn": attempts},
        }
        images = {f"{task.id}.{image.format.lower()}": image.data}
        for number, data in enumerate(instruction.references, start=1):
            images[f"{task.id}_{number}.{suffix_of(data)}"] = data
        self.folder.accept(task.part, task.number, row, images)
        self.outcome.accepted[task.part] += 1

    def _reject(
        self, task: PlannedRow, steps: RowSteps, rejected: RowRejected, text: str, image: bytes | None
    ) -> None:
        row = {
            "row": task.id,
            "part": task.part,
            "reason": str(rejected.reason),
            "detail": rejected.detail,
            "instruction": text,
            "provenance": self._provenance(task, steps),
        }
        self.folder.reject(row, image)
        self.outcome.rejected[str(rejected.reason)] += 1


@dataclass
class _LastImage:
    """The last generated image of a row, which is stored if the row is rejected."""

    data: bytes | None = None
