"""What the README and First steps promise beyond what every guide does (tests/test_docs.py): the two commands first, one
screen, and short examples."""

from tests.documents import BLOCK, EXAMPLE, ROOT

__all__ = ["BLOCK", "EXAMPLE"]
README = (ROOT / "README.md").read_text("utf-8")
FIRST_STEPS = (ROOT / "docs" / "first_steps.md").read_text("utf-8")


def test_readme_opens_with_the_two_commands():
    first = BLOCK.search(README)
    assert [line.split("#")[0].strip() for line in first[2].splitlines()] == ["make quickstart", "make test"]


def test_the_readme_is_one_screen_with_one_python_example():
    assert README.count("\n") < 70 and [language for language, _ in EXAMPLE.findall(README)] == ["python"]


def test_examples_are_short():
    examples = EXAMPLE.findall(README + FIRST_STEPS)
    assert len(examples) >= 8
    for _, code in examples:
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, code


def test_every_python_example_is_run():
    for text in (README, FIRST_STEPS):
        marked = [code for language, code in EXAMPLE.findall(text) if language == "python"]
        assert [code for language, code in BLOCK.findall(text) if language == "python"] == marked != []
