"""What happens on the page: clicks become tasks of the engine."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from echo4o.serving.app.history import Entry, History
from echo4o.serving.app.running import RunState, follow
from echo4o.serving.engine import Engine, EngineClosed, QueueFull
from echo4o.serving.tasks import Task
from echo4o.serving.uploads import open_upload

_PREVIEWS = 8  # per image
_PLACE = re.compile(r"\[image (\d+)\]", re.I)


class Handlers:
    """The functions behind the page's buttons.

    Args:
        engine: where tasks run.
        history: where finished images are kept.
    """

    def __init__(self, engine: Engine, history: History):
        self.engine, self.model, self.history = engine, engine.model, history
        self._running: dict[str, list[Task]] = {}
        self._lock = threading.Lock()

    def generate(
        self, page: str, token: str, prompt: str, files: list[str], arguments: dict[str, Any]
    ) -> Iterator[tuple[RunState, list[Entry]]]:
        """Generate images; yields the state and the finished images. Raises gr.Error for what is not possible.

        Args:
            page: identifies the open page, for `cancel`.
            token: of the visitor, for the history.
            arguments: of `ServedModel.image_tasks`.
        """
        try:
            references = self.open_files(files)
            tasks = self.model.image_tasks(interleave(prompt, references), previews=_PREVIEWS, **arguments)
            self.engine.submit(tasks)
        except (ValueError, QueueFull, EngineClosed) as error:
            raise gr.Error(str(error), print_exception=False) from None
        with self._lock:
            self._running[page] = [*tasks]
        finished: list[Entry] = []
        try:
            for state in follow(self.engine, tasks):
                for generated in state.finished[len(finished) :]:
                    finished.append(self.history.add(token, generated, prompt, len(references)))
                yield state, finished
                if state.error:
                    raise gr.Error(state.error, print_exception=False)
        finally:
            with self._lock:
                self._running.pop(page, None)

    def cancel(self, page: str) -> None:
        """Cancel what a page runs; finished images are kept."""
        with self._lock:
            for task in self._running.get(page, []):
                task.cancel()

    def open_files(self, files: list[str] | None) -> list[Image.Image]:
        """Decode uploaded files. Raises ValueError for what is not an image or too large."""
        limits = self.model.limits
        return [
            open_upload(Path(file).read_bytes(), f"image {number}", limits.upload_pixels)
            for number, file in enumerate(files or [], 1)
        ]

    def chat(self, page: str, text: str, files: list[str], talk: list[dict]) -> Iterator[str]:
        """Answer a question about images; yields the answer as it grows."""
        import queue

        from echo4o.serving.tasks import Text

        try:
            prompt = transcript(talk, text)
            task = self.model.chat_task(prompt, self.open_files(files))
            events: queue.SimpleQueue = queue.SimpleQueue()
            task.on_event = events.put
            task.future.add_done_callback(events.put)
            self.engine.submit([task])
        except (ValueError, QueueFull, EngineClosed) as error:
            raise gr.Error(str(error), print_exception=False) from None
        with self._lock:
            self._running[page] = [task]
        try:
            while isinstance(event := events.get(), Text):
                yield event.text
            if not task.stop.is_set():
                yield task.future.result().text
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            task.cancel()
            with self._lock:
                self._running.pop(page, None)


def interleave(prompt: str, references: list[Image.Image]) -> list[str | Image.Image]:
    """Texts and images in reading order: `[image 1]` in the prompt stands for the first reference, and so on.

    Without such places, the references come before the prompt. Raises ValueError for a place without its reference and
    for references without a place.
    """
    places = [int(match) for match in _PLACE.findall(prompt)]
    if not places:
        return [*references, prompt]
    for number in places:
        if not 1 <= number <= len(references):
            raise ValueError(f"[image {number}]: there are {len(references)} reference images")
    if unused := sorted(set(range(1, len(references) + 1)) - set(places)):
        raise ValueError(f"the prompt does not say where image {unused[0]} belongs; write [image {unused[0]}]")
    items: list[str | Image.Image] = []
    for index, part in enumerate(_PLACE.split(prompt)):
        if index % 2:
            items.append(references[int(part) - 1])
        elif part.strip():
            items.append(part.strip())
    return items


def transcript(talk: list[dict], text: str) -> str:
    """The question alone, or after the earlier turns of the conversation."""
    turns = [(turn["role"], turn["content"]) for turn in talk if isinstance(turn.get("content"), str)]
    if not turns:
        return text
    lines = [f"{role.capitalize()}: {content}" for role, content in turns]
    return "\n".join([*lines, f"User: {text}", "Assistant:"])


def move(files: list[str] | None, number: int, by: int) -> list[str]:
    """The files with the one of a number (from 1) moved by `by` places."""
    files = list(files or [])
    start, end = number - 1, number - 1 + by
    if 0 <= start < len(files) and 0 <= end < len(files):
        files.insert(end, files.pop(start))
    return files
