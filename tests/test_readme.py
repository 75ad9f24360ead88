"""What the README promises beyond what every guide does (tests/test_docs.py): the two commands first, and short examples."""

from tests.documents import BLOCK, EXAMPLE, ROOT

__all__ = ["BLOCK", "EXAMPLE"]
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_opens_with_the_two_commands():
    first = BLOCK.search(README)
    assert [line.split("#")[0].strip() for line in first[2].splitlines()] == ["make quickstart", "make test"]


def test_examples_are_short():
    examples = EXAMPLE.findall(README)
    assert len(examples) >= 8
    for _, code in examples:
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, code


def test_every_python_example_is_run():
    marked = [code for language, code in EXAMPLE.findall(README) if language == "python"]
    assert [code for language, code in BLOCK.findall(README) if language == "python"] == marked
