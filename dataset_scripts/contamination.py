"""Rows whose instruction equals, or nearly equals, a prompt of a benchmark."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

N = 3  # words in a row
OVERLAP = 0.5  # changing one word inside a prompt of a dozen leaves about that much
_FIELDS = ("prompt", "instruction", "text")
_COMMON = 0.2  # an n-gram of more than this share of the prompts ("a photo of") finds no candidates


@dataclass(frozen=True)
class PromptMatch:
    """A row that comes close to a prompt. `overlap` is shared n-grams / all n-grams of both; 1.0 is equal."""

    benchmark: str
    prompt: str
    id: str
    instruction: str
    overlap: float


def normalise(text: str) -> str:
    """Words in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def ngrams(text: str, n: int = N) -> frozenset[str]:
    """The n-grams of a normalised text; a shorter text is one by itself."""
    words = text.split()
    return frozenset(" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


class PromptIndex:
    """The prompts of benchmarks, found by the n-grams that they share with a text."""

    def __init__(self, prompts: Iterable[tuple[str, str]], overlap: float = OVERLAP):
        self.overlap = overlap
        self.prompts = [(name, prompt, normalise(prompt)) for name, prompt in prompts if prompt.strip()]
        self.grams = [ngrams(text) for *_, text in self.prompts]
        counts = Counter(gram for grams in self.grams for gram in grams)
        most = max(3, _COMMON * len(self.prompts))
        self.by_gram: dict[str, list[int]] = {}
        for number, grams in enumerate(self.grams):
            telling = [gram for gram in grams if counts[gram] <= most] or grams
            for gram in telling:
                self.by_gram.setdefault(gram, []).append(number)

    def __len__(self) -> int:
        return len(self.prompts)

    def matches(self, row_id: str, instruction: str) -> Iterator[PromptMatch]:
        """The prompts that the instruction comes close to."""
        text = normalise(instruction)
        grams = ngrams(text)
        for number in sorted({n for gram in grams for n in self.by_gram.get(gram, ())}):
            name, prompt, normal = self.prompts[number]
            theirs = self.grams[number]
            overlap = 1.0 if text == normal else len(grams & theirs) / len(grams | theirs)
            if overlap >= self.overlap:
                yield PromptMatch(name, prompt, row_id, instruction, round(overlap, 3))


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """(name, prompt) from a file of JSON lines with a field prompt, instruction or text, or of plain lines."""
    path = Path(path)
    prompts = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix in (".jsonl", ".json"):
            try:
                row = json.loads(line)
                prompts.append((path.stem, next(row[key] for key in _FIELDS if isinstance(row.get(key), str))))
            except (ValueError, AttributeError, StopIteration):
                fields = ", ".join(_FIELDS)
                raise ValueError(f"{path}:{number}: each line must be an object with one of {fields}") from None
        else:
            prompts.append((path.stem, line.rstrip("\r")))
    return prompts
