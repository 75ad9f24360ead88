"""The result files of the benchmarks; no test asserts a time."""

import pytest

from benchmarks.__main__ import main
from benchmarks.results import BenchmarkResults


def results(**values: list[float]) -> BenchmarkResults:
    made = BenchmarkResults(machine="a machine")
    for name, ratios in values.items():
        made.add(name, ratios, at_most=1.15)
    return made


def test_the_table_says_which_targets_are_met():
    made = results(update=[1.0, 1.1, 1.2], step=[1.2, 1.3, 1.4])
    made.add("batch", [0.9, 0.95], at_least=1.0)
    made.add("reading", [0.6])
    lines = made.table().splitlines()
    assert lines[2] == "| update | 1.10 (1.00 to 1.20) | <= 1.15 | yes |"
    assert lines[3].endswith("| <= 1.15 | no |") and lines[4].endswith("| >= 1 | no |")
    assert lines[5] == "| reading | 0.60 (0.60 to 0.60) |  |  |"


def test_two_files_are_compared(tmp_path, capsys):
    before = results(update=[1.0, 1.1, 1.2], step=[1.2, 1.3, 1.4], gone=[1.0])
    after = results(update=[1.05, 1.15, 1.25], step=[2.4, 2.6, 2.8])
    before.write(tmp_path / "a.json")
    after.write(tmp_path / "new" / "b.json")
    assert BenchmarkResults.read(tmp_path / "a.json") == before
    main(["compare", str(tmp_path / "a.json"), str(tmp_path / "new" / "b.json")])
    output = capsys.readouterr().out
    assert "within the spread" in output and "| +100% |" in output and "only in one" in output


@pytest.mark.parametrize("text", ["{", "{}", '{"ratios": {"a": {"median": 1}}, "machine": ""}', '{"ratios": []}'])
def test_another_file_is_an_error(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert ended.value.code == 2 and "a.json is not a result" in capsys.readouterr().err


def test_the_table_of_quantized_weights_compares_with_the_stored_ones():
    from PIL import Image

    from benchmarks.quantized_quality import Measured, table
    from echo4o.evaluation.benchmarks.shapes4o.accuracy import scores_by_tag
    from echo4o.quickstart.generation import GeneratedImages

    def row(name: str, megabytes: float, level: int, right: list[bool]) -> Measured:
        images = [Image.new("RGB", (4, 4), (level,) * 3)] * len(right)
        return Measured(
            name, megabytes, GeneratedImages([], images, [], scores_by_tag(["single"] * len(right), right))
        )

    rows = [
        row("float32", 2, 10, [True] * 4),
        row("as stored", 2, 12, [True] * 4),
        row("int8", 1, 15, [True, False] * 2),
    ]
    lines = table(rows).splitlines()
    assert lines[3] == "| as stored | 2.00 MB | 1.00 [0.51, 1.00] (4/4) | 0.00 of 255 |"
    assert "(2/4)" in lines[4] and lines[4].endswith("| 3.00 of 255 |") and "| 1.00 MB |" in lines[4]
