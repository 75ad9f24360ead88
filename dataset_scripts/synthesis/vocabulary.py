"""Words to sample from: those that come along, or files with one per line."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

_WORD = re.compile(r"(?=.*[^\W\d_])[^\[\]{}\":;,<>]{1,60}")  # a letter at least; no JSON, no table
SHIPPED = Path(__file__).parent / "vocabulary.yaml"


@dataclass(frozen=True)
class Vocabulary:
    """One list of words; `plurals` holds what stands behind a bar: of things, the irregular plurals."""

    name: str
    words: tuple[str, ...]
    plurals: dict[str, str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join([*self.words, *map(repr, sorted(self.plurals.items()))]).encode()).hexdigest()

    def plural(self, word: str) -> str:
        if word in self.plurals:
            return self.plurals[word]
        if re.search(r"[^aeiou]y$", word):
            return word[:-1] + "ies"
        return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")

    def named(self, word: str, count: int) -> str:
        return word if count == 1 else self.plural(word)


def shipped(name: str) -> Vocabulary:
    """A list that comes along."""
    return parse(name, _shipped_lists()[name], f"the shipped list of {name}")


@lru_cache(maxsize=1)
def _shipped_lists() -> dict[str, list[str]]:
    return yaml.safe_load(SHIPPED.read_text("utf-8"))


def load(name: str, file: Path | None, least: int) -> Vocabulary:
    """The words of a file, or those that come along.

    Raises:
        ValueError: no text file, a line that is no word, or fewer than `least` words.
    """
    if file is None:
        return shipped(name)
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the vocabulary of {name} is no UTF-8 text ({error.reason})") from None
    words = parse(name, [line for line in lines if not line.lstrip().startswith("#")], str(file))
    if len(words.words) < least:
        found = f"{len(words.words)} words" if words.words else "no word"
        raise ValueError(f"{file}: the vocabulary of {name} holds {found}; at least {least} are needed")
    return words


def parse(name: str, lines: Iterable[str], where: str) -> Vocabulary:
    """Words with what stands behind their bars; ValueError for a line that is none."""
    words, plurals = {}, {}
    for line in lines:
        word, bar, plural = (part.strip() for part in line.partition("|"))
        if not word and not bar:
            continue
        if not word or "|" in plural or (bar and not plural) or not _WORD.fullmatch(word):
            raise ValueError(f"{where}: {line[:80]!r} is no word (write one per line: cup, or knife|knives)")
        words[word] = None
        if bar:
            plurals[word] = plural
    return Vocabulary(name, tuple(words), plurals)


def words_of(text: str) -> str:
    """A text as its words in lower case, with single spaces between them and around: for looking words up in it."""
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "


def holds(text: str, words: str) -> bool:
    """Whether the words stand in the text, whole and in this order."""
    return words_of(words) in words_of(text)
