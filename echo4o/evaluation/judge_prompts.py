"""Judge prompts: bundled templates, or the user's own, filled with the facts of a prompt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jinja2 import Environment, StrictUndefined, Template, TemplateError

from echo4o.endpoints.chat_endpoint import ImageFile, LabelledImage
from echo4o.endpoints.json_answers import json_schema
from echo4o.evaluation.benchmarks.base import PROMPTS, Aspect, Benchmark, BenchmarkPrompt, Verdict
from echo4o.evaluation.judges.base import Question
from echo4o.evaluation.released_prompts import RELEASED, load_released_prompts

_USER = "=== user ==="
_ENVIRONMENT = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


@dataclass(frozen=True)
class JudgePrompt:
    """A judge prompt: a Jinja template. The part above a line `=== user ===`, if there is one, is the system message."""

    source: str
    path: Path

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> "JudgePrompt":
        source = path.read_text("utf-8-sig")
        if "{{" not in source:
            raise ValueError(
                f"{path}: it does not contain {{{{ instruction }}}}, so that the judge would not see the prompt"
            )
        return cls(source, path)

    def ask(self, benchmark: Benchmark, aspect: Aspect, prompt: BenchmarkPrompt, image: ImageFile) -> Question:
        """The question about one image of a benchmark."""
        references = [_image_file(path) for path in prompt.references] if aspect.shows_references else []
        return self.question(benchmark.question_about(prompt, aspect), aspect.verdict, image, references, prompt.facts)

    def question(
        self,
        values: dict[str, Any],
        verdict: type[Verdict],
        image: ImageFile,
        references: Sequence[ImageFile] = (),
        facts: dict[str, Any] | None = None,
    ) -> Question:
        """The question about one image. `values` fill the template; see [`Question`] for the rest."""
        values = values | {"answer_format": answer_format(verdict)}
        try:
            filled = _template(self.source).render(values)
        except TemplateError as error:
            known = ", ".join(sorted(values))
            raise ValueError(f"{self.path}: {error}; a judge prompt can use {known}") from None
        system, marker, user = filled.partition(_USER)
        if not marker:
            system, user = "", filled
        # The labels are part of the keys of cached answers: changing one asks every judge again.
        images = [
            LabelledImage(f"Reference picture {n}", reference) for n, reference in enumerate(references, start=1)
        ]
        images.append(LabelledImage("Picture to grade" if references else "Picture", image))
        return Question(
            user.strip(), system.strip(), tuple(images), json_schema(verdict), verdict=verdict, facts=facts or {}
        )


@lru_cache(maxsize=64)
def _template(source: str) -> Template:
    return _ENVIRONMENT.from_string(source)


@lru_cache(maxsize=1024)
def _image_file(path: Path) -> ImageFile:
    return ImageFile.read(path)


def answer_format(verdict: type[Verdict]) -> str:
    """One line that describes the answer, as the last line of a judge prompt."""
    fields = []
    for name, info in verdict.model_fields.items():
        if info.exclude:
            continue
        if get_origin(info.annotation) is Literal and isinstance(get_args(info.annotation)[0], str):
            choices = " or ".join(f'"{value}"' for value in get_args(info.annotation))
            fields.append(f'"{name}": {choices}')
            continue
        kind = '"..."' if info.annotation is str else "0 or 1" if name == "correct" else "a number from 0 to 10"
        fields.append(f'"{name}": {kind}')
    return f"Answer with one JSON object and nothing else: {{{', '.join(fields)}}}"


def load_judge_prompts(benchmark: Benchmark, replaced: list[str] | None = None) -> dict[str, JudgePrompt]:
    """The judge prompts of a benchmark by aspect.

    Args:
        replaced: values of --judge-prompt: FILE, or ASPECT=FILE if the benchmark has several aspects; or `released`
            alone, for the prompts of the released script.
    """
    if replaced == [RELEASED] and not Path(RELEASED).exists():
        return dict(load_released_prompts(benchmark))
    prompts = {aspect.name: JudgePrompt.read(PROMPTS / aspect.prompt_file) for aspect in benchmark.aspects}
    for given in replaced or []:
        aspect, equals, file = given.partition("=")
        if not equals or aspect not in prompts:
            if len(prompts) > 1:
                raise ValueError(f"--judge-prompt {given}: say which one, as in {next(iter(prompts))}=FILE")
            aspect, file = next(iter(prompts)), given
        prompts[aspect] = JudgePrompt.read(Path(file))
    return prompts
