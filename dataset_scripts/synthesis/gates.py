"""The reasons for which rows are rejected, and the gates that need no model."""

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
    """Why a row is rejected. Every planned row is accepted, or rejected for exactly one reason."""

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
    """A row, or an image that may be generated again, does not pass a gate."""

    def __init__(self, reason: GateReason, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass
class InstructionGates:
    """Rejects instructions with blocked words, benchmark prompts, and duplicates."""

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
        """Reserves the instruction for this row. Raises [`RowRejected`] if it does not pass."""
        if found := next((word for word in self.blocked if vocabulary.holds(text, word)), None):
            raise RowRejected(GateReason.BLOCKED, f"the instruction says {found!r}")
        match = next(self.prompts.matches(row, text), None) if self.prompts else None
        if match:
            if self.gates.contamination is None or self.gates.contamination.action == "refuse":
                near = f"{match.overlap:.2f} of {match.benchmark}'s {match.prompt!r}"
                raise RowRejected(GateReason.CONTAMINATION, near)
            self.contaminated += 1
        owner = self.taken.setdefault(normalise(text), row)
        if self.gates.duplicate_instructions and owner != row:
            raise RowRejected(GateReason.DUPLICATE_INSTRUCTION, f"{owner} has the same one")

    def release(self, row: str, text: str) -> None:
        """Releases the instruction of a rejected row, so that another row can have it."""
        if self.taken.get(normalise(text)) == row:
            del self.taken[normalise(text)]


class ImageGates:
    """Rejects images that do not decode, have another size or aspect ratio, or duplicate an accepted image.

    Args:
        accepted: row -> 8 x 8 thumbnail of its image.
    """

    def __init__(self, recipe: SynthesisRecipe, accepted: dict[str, bytes]):
        self.recipe = recipe
        self._rows, self._thumbnails = list(accepted), bytearray(b"".join(accepted.values()))

    def check(self, part: str, data: bytes) -> tuple[CheckedImage, bytes]:
        """Returns the image and its thumbnail. Raises [`RowRejected`]."""
        image = check_image(data)
        if image.reason is not None:
            raise RowRejected(GateReason.UNDECODABLE, f"{image.reason}: {image.detail}")
        if self.recipe.gates.size:
            _check_size(image, self.recipe.image_model(part).size)
        thumbnail, most = tiny_thumbnail(data), self.recipe.gates.duplicate_pictures
        if most is not None and self._rows:
            others = np.frombuffer(bytes(self._thumbnails), np.uint8).reshape(len(self._rows), -1)
            apart = np.abs(others.astype(np.int16) - np.frombuffer(thumbnail, np.uint8)).mean(1)
            if apart.min() <= most:
                raise RowRejected(
                    GateReason.DUPLICATE_PICTURE, f"it looks like that of {self._rows[int(apart.argmin())]}"
                )
        return image, thumbnail

    def accept(self, row: str, thumbnail: bytes) -> None:
        """Adds the image of an accepted row."""
        self._rows.append(row)
        self._thumbnails += thumbnail


def _check_size(image: CheckedImage, requested: str) -> None:
    """Accepts images of the requested aspect ratio (within 2%) with at least half the requested width."""
    if requested == "auto":
        return
    width, height = map(int, requested.split("x"))
    aspect = (image.width / image.height) / (width / height)
    if not 0.98 <= aspect <= 1.02 or image.width < width / 2:
        raise RowRejected(GateReason.WRONG_SIZE, f"{image.width} x {image.height} instead of {width} x {height}")


def tiny_thumbnail(data: bytes) -> bytes:
    """Returns an image as 8 x 8 RGB pixels."""
    return open_image(data).resize((8, 8), Image.Resampling.BOX).tobytes()


def instructions_of(rows: Iterable[dict]) -> dict[str, str]:
    """Returns the instructions of accepted rows, normalised, for [`InstructionGates`]."""
    return {normalise(row["instruction"]): row["row"] for row in rows}
