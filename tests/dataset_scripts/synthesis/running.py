"""Runs the command and reads what it leaves behind; also what a child process runs to be killed."""

import json
import sys

from typer.testing import CliRunner

PARTS = {"surreal_fantasy": 8, "multi_reference": 4, "instruction_following": 7}


def run(*arguments, code: int = 0) -> str:
    """What the command says on both streams."""
    from echo4o.cli import app

    result = CliRunner().invoke(app, ["dataset", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def accepted(out) -> list[dict]:
    return [row for file in sorted((out / "dataset").glob("*/rows-*.jsonl")) for row in lines(file)]


def ends(out) -> list[str]:
    return sorted(row["row"] for row in accepted(out) + lines(out / "rejected.jsonl"))


def planned(parts=PARTS) -> list[str]:
    return sorted(f"{part}-{number:06d}" for part, rows in parts.items() for number in range(rows))


def one_part(recipe, rows: int = 3, **changes):
    """Only complex instruction following."""
    return recipe(surreal_fantasy=None, multi_reference=None, instruction_following__rows=rows, **changes)


if __name__ == "__main__":
    from echo4o.cli import main

    sys.argv[1:1] = ["dataset"]
    main()
