"""Judge prompts: files in our own words, or the user's, filled with what the benchmark knows about a prompt."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from echo4o.evaluation.benchmarks.base import PROMPTS, Aspect, Benchmark, Prompt
from echo4o.evaluation.judges.base import Question, Shown, answer_format
from echo4o.evaluation.pictures import Picture

_USER = "=== user ==="
_ENVIRONMENT = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


@dataclass(frozen=True)
class JudgePrompt:
    """The words of a question: a Jinja template, its system part above a line `=== user ===`, if there is one."""

    source: str
    path: Path

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> "JudgePrompt":
        source = path.read_text("utf-8")
        if "{{" not in source:
            raise ValueError(f"{path}: there is no {{{{ instruction }}}} in it, so the judge would not see the prompt")
        return cls(source, path)

    def ask(self, benchmark: Benchmark, aspect: Aspect, prompt: Prompt, picture: Picture) -> Question:
        """The question about one picture."""
        values = benchmark.question(prompt) | {"answer_format": answer_format(aspect.verdict)}
        try:
            filled = _ENVIRONMENT.from_string(self.source).render(values)
        except TemplateError as error:
            known = ", ".join(sorted(values))
            raise ValueError(f"{self.path}: {error}; a judge prompt can use {known}") from None
        system, marker, user = filled.partition(_USER)
        if not marker:
            system, user = "", filled
        references = [_picture(path) for path in prompt.references] if aspect.shows_references else []
        shown = [Shown(f"Reference picture {n}", reference) for n, reference in enumerate(references, start=1)]
        shown.append(Shown("Picture to grade" if references else "Picture", picture))
        return Question(system.strip(), user.strip(), tuple(shown), aspect.verdict, prompt.facts)


@lru_cache(maxsize=1024)
def _picture(path: Path) -> Picture:
    return Picture.read(path)


def load_judge_prompts(benchmark: Benchmark, replaced: list[str] | None = None) -> dict[str, JudgePrompt]:
    """The judge prompts of a benchmark by aspect; `replaced` holds FILE, or ASPECT=FILE where there are several."""
    prompts = {aspect.name: JudgePrompt.read(PROMPTS / aspect.prompt_file) for aspect in benchmark.aspects}
    for given in replaced or []:
        aspect, equals, file = given.partition("=")
        if not equals or aspect not in prompts:
            if len(prompts) > 1:
                raise ValueError(f"--judge-prompt {given}: say which one, as in {next(iter(prompts))}=FILE")
            aspect, file = next(iter(prompts)), given
        prompts[aspect] = JudgePrompt.read(Path(file))
    return prompts
