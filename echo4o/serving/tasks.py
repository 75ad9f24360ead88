"""One image or one answer that the engine is asked for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from echo4o.common.image_metadata import ImageMetadata

Adapters = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Args:
        step, total: sampler updates done, and in all.
        seconds_left: estimated from the updates so far.
        preview: the image as the model expects it now; None between previews.
    """

    step: int
    total: int
    seconds_left: float
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Text:
    """A token of an answer: all of the answer so far."""

    text: str


@dataclass(frozen=True)
class GeneratedImage:
    """An image and how to make it again.

    Args:
        settings: every argument of the pipeline that has a value, the size and the adapters.
        metadata: what a PNG file of it stores.
        plan: the plan in words of `think`.
        batch: number of images that were generated in the same call.
    """

    image: Image.Image
    seed: int
    settings: dict[str, Any]
    metadata: ImageMetadata
    plan: str | None = None
    batch: int = 1


@dataclass(frozen=True)
class Answer:
    """The answer to a question; `cut` if it reached the length limit."""

    text: str
    tokens: int = 0
    cut: bool = False


@dataclass(eq=False)
class Task:
    """Work for the engine. Tasks with equal `key` can run in one call of the pipeline.

    Args:
        items: texts and reference images in reading order.
        options: arguments of the pipeline's method that the caller set.
        adapters: names and scales of the active adapters.
        on_event: called from the engine's thread with [`Progress`] or [`Text`].
    """

    items: list[str | Image.Image]
    options: dict[str, Any]
    seed: int
    adapters: Adapters = ()
    on_event: Callable[[Any], None] | None = None
    future: Future = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> tuple:
        options = tuple((name, repr(value)) for name, value in sorted(self.options.items()))
        return (type(self).__name__, options, self.adapters)

    @property
    def references(self) -> list[Image.Image]:
        return [item for item in self.items if not isinstance(item, str)]

    @property
    def text(self) -> str:
        return "\n".join(item for item in self.items if isinstance(item, str))

    def cancel(self) -> None:
        """Stop the task, whether it waits or runs."""
        self.stop.set()
        self.future.cancel()

    def notify(self, event: Any) -> None:
        if self.on_event is not None and not self.stop.is_set():
            self.on_event(event)


@dataclass(eq=False)
class ImageTask(Task):
    """An image to generate; its future holds a [`GeneratedImage`].

    Args:
        height, width: pixels; None leaves it to the pipeline.
        one_size: the pipeline needs one size for all images of a call.
        previews: most previews to send while sampling.
    """

    height: int | None = None
    width: int | None = None
    one_size: bool = False
    previews: int = 0

    @property
    def key(self) -> tuple:
        return (*super().key, (self.height, self.width) if self.one_size else None)


@dataclass(eq=False)
class ChatTask(Task):
    """A question to answer; its future holds an [`Answer`], which ends before the first of `stops`."""

    stops: list[str] = field(default_factory=list)
