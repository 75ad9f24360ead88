"""Vocabularies to sample from: bundled lists, or files with one word per line."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

_WORD = re.compile(
    r"(?=.*[^\W\d_])[^\[\]{}\":;,<>]{1,60}"
)  # with at least one letter, and without characters of JSON or tables
SHIPPED = Path(__file__).parent / "vocabulary.yaml"


@dataclass(frozen=True)
class Vocabulary:
    """A list of words. `plurals` holds the text after a bar, which is the irregular plural of an object."""

    name: str
    words: tuple[str, ...]
    plurals: dict[str, str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join([*self.words, *map(repr, sorted(self.plurals.items()))]).encode()).hexdigest()

    def plural(self, word: str) -> str:
        """Returns the plural of a word."""
        if word in self.plurals:
            return self.plurals[word]
        if re.search(r"[^aeiou]y$", word):
            return word[:-1] + "ies"
        return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")

    def named(self, word: str, count: int) -> str:
        """Returns the word, in the plural if `count` is not 1."""
        return word if count == 1 else self.plural(word)


def shipped(name: str) -> Vocabulary:
    """Returns a bundled list."""
    return parse(name, _shipped_lists()[name], f"the shipped list of {name}")


@lru_cache(maxsize=1)
def _shipped_lists() -> dict[str, list[str]]:
    return yaml.safe_load(SHIPPED.read_text("utf-8"))


def load(name: str, file: Path | None, least: int) -> Vocabulary:
    """Reads the words of a file; without a file, returns the bundled list.

    Raises:
        ValueError: the file is not UTF-8 text, a line is not a word, or there are fewer than `least` words.
    """
    if file is None:
        return shipped(name)
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the vocabulary of {name} is not UTF-8 text ({error.reason})") from None
    words = parse(name, [line for line in lines if not line.lstrip().startswith("#")], str(file))
    if len(words.words) < least:
        found = f"{len(words.words)} words" if words.words else "no words"
        raise ValueError(f"{file}: the vocabulary of {name} holds {found}; at least {least} are needed")
    return words


def parse(name: str, lines: Iterable[str], where: str) -> Vocabulary:
    """Parses lines of words with optional plurals after a bar. Raises ValueError for an invalid line."""
    words, plurals = {}, {}
    for line in lines:
        word, bar, plural = (part.strip() for part in line.partition("|"))
        if not word and not bar:
            continue
        if not word or "|" in plural or (bar and not plural) or not _WORD.fullmatch(word):
            raise ValueError(f"{where}: {line[:80]!r} is not a word (write one per line: cup, or knife|knives)")
        words[word] = None
        if bar:
            plurals[word] = plural
    return Vocabulary(name, tuple(words), plurals)


def words_of(text: str) -> str:
    """Returns the words of a text in lower case, with one space before, between and after them, to search words in it."""
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "


def holds(text: str, words: str) -> bool:
    """Whether the text contains these words, whole and in this order."""
    return words_of(words) in words_of(text)
