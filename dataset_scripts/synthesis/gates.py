"""Why a row is rejected, and the gates that find out without asking anybody."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from PIL import Image

from echo4o.dataset_scripts.contamination import PromptIndex, normalise
from echo4o.dataset_scripts.images import CheckedImage, check_image
from echo4o.dataset_scripts.synthesis import vocabulary
from echo4o.dataset_scripts.synthesis.recipe import GatesSettings, SynthesisRecipe
from echo4o.modeling.common.image_files import open_image


class GateReason(StrEnum):
    """Every planned row is accepted, or rejected for exactly one of these."""

    NO_INSTRUCTION = "no usable instruction"
    TEXT_REFUSED = "refused by the text model"
    BLOCKED = "blocked content"
    CONTAMINATION = "benchmark prompt"
    DUPLICATE_INSTRUCTION = "duplicate instruction"
    PICTURE_REFUSED = "refused by the image model"
    UNDECODABLE = "undecodable picture"
    WRONG_SIZE = "wrong size"
    DUPLICATE_PICTURE = "duplicate picture"
    NOT_VERIFIED = "not verified"
    JUDGE_REFUSED = "refused by the judge"
    NO_VERDICT = "no usable verdict"
    BAD_REQUEST = "request not accepted"


class RowRejected(Exception):
    """The row, or (where another one may be drawn) its picture, does not pass."""

    def __init__(self, reason: GateReason, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass
class InstructionGates:
    """Blocked words, benchmark prompts, duplicates of what was accepted or is being made."""

    gates: GatesSettings
    prompts: PromptIndex | None
    blocked: tuple[str, ...] = ()
    taken: dict[str, str] = field(default_factory=dict)  # normalised instruction -> row
    contaminated: int = 0

    @classmethod
    def of(cls, gates: GatesSettings, prompts: PromptIndex | None) -> "InstructionGates":
        if isinstance(gates.blocked, tuple):
            words = vocabulary.parse("blocked", gates.blocked, "gates.blocked")
        else:
            words = vocabulary.load("blocked", gates.blocked, least=1)
        return cls(gates, prompts, (*words.words, *map(words.plural, words.words)))

    def check(self, row: str, text: str) -> None:
        """Take the instruction for this row, or raise [`RowRejected`]."""
        if found := next((word for word in self.blocked if vocabulary.holds(text, word)), None):
            raise RowRejected(GateReason.BLOCKED, f"the instruction says {found!r}")
        match = next(self.prompts.matches(row, text), None) if self.prompts else None
        if match:
            if self.gates.contamination.action == "refuse":
                near = f"{match.overlap:.2f} of {match.benchmark}'s {match.prompt!r}"
                raise RowRejected(GateReason.CONTAMINATION, near)
            self.contaminated += 1
        owner = self.taken.setdefault(normalise(text), row)
        if self.gates.duplicate_instructions and owner != row:
            raise RowRejected(GateReason.DUPLICATE_INSTRUCTION, f"{owner} has the same one")

    def release(self, row: str, text: str) -> None:
        """The row was rejected: another one may have its instruction."""
        if self.taken.get(normalise(text)) == row:
            del self.taken[normalise(text)]


class ImageGates:
    """Decodes, size and aspect, duplicates of accepted pictures (`accepted`: row -> how its picture looks)."""

    def __init__(self, recipe: SynthesisRecipe, accepted: dict[str, bytes]):
        self.recipe = recipe
        self._rows, self._looks = list(accepted), bytearray(b"".join(accepted.values()))

    def check(self, part: str, data: bytes) -> tuple[CheckedImage, bytes]:
        """The picture and how it looks; raises [`RowRejected`]."""
        picture = check_image(data)
        if picture.reason is not None:
            raise RowRejected(GateReason.UNDECODABLE, f"{picture.reason}: {picture.detail}")
        if self.recipe.gates.size:
            _check_size(picture, self.recipe.image_model(part).size)
        seen, most = look(data), self.recipe.gates.duplicate_pictures
        if most is not None and self._rows:
            others = np.frombuffer(bytes(self._looks), np.uint8).reshape(len(self._rows), -1)
            apart = np.abs(others.astype(np.int16) - np.frombuffer(seen, np.uint8)).mean(1)
            if apart.min() <= most:
                raise RowRejected(
                    GateReason.DUPLICATE_PICTURE, f"it looks like that of {self._rows[int(apart.argmin())]}"
                )
        return picture, seen

    def accept(self, row: str, seen: bytes) -> None:
        self._rows.append(row)
        self._looks += seen


def _check_size(picture: CheckedImage, asked: str) -> None:
    """The size that was asked for, or a larger or smaller one of the same aspect, to half the side at least."""
    if asked == "auto":
        return
    width, height = map(int, asked.split("x"))
    aspect = (picture.width / picture.height) / (width / height)
    if not 0.98 <= aspect <= 1.02 or picture.width < width / 2:
        raise RowRejected(GateReason.WRONG_SIZE, f"{picture.width} x {picture.height} instead of {width} x {height}")


def look(data: bytes) -> bytes:
    """A picture in 8 x 8 pixels of three colours."""
    return open_image(data).resize((8, 8), Image.Resampling.BOX).tobytes()


def instructions_of(rows: Iterable[dict]) -> dict[str, str]:
    """What [`InstructionGates`] holds after these accepted rows."""
    return {normalise(row["instruction"]): row["row"] for row in rows}
