"""The golden data of GenEval and DPG-Bench passes with nothing unchecked, and whatever is altered in it fails."""

import copy as copies
import json
import shutil
from pathlib import Path

import pytest

from .parity.forms import form_of
from .parity.run import run

GOLDEN = Path(__file__).parent / "parity" / "golden_standard_benchmarks"
GENEVAL, DPG = (json.loads((GOLDEN / f"{name}_golden.json").read_text("utf-8")) for name in ("geneval", "dpg"))


def test_the_golden_data_passes():
    report = run(GOLDEN, quiet=True)
    assert [str(row) for row in report.failures] == []
    assert len(report.rows) > 1900


@pytest.fixture
def folder(tmp_path) -> Path:
    """A golden directory of the two files alone, as they may come without the key map."""
    for name in ("geneval_golden.json", "dpg_golden.json"):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


def failures(folder: Path, kind: str, change) -> list[str]:
    """What fails after a change of one file."""
    content = copies.deepcopy({"geneval": GENEVAL, "dpg": DPG}[kind])
    change(content)
    (folder / f"{kind}_golden.json").write_text(json.dumps(content), "utf-8")
    return [row.case for row in run(folder, only=[kind], quiet=True).failures]


def test_a_folder_of_two_files_is_recognised_without_a_manifest(folder):
    assert form_of(folder) == "standard_benchmarks"
    assert not run(folder, quiet=True).failures


def altered(content, path: str):
    """Change the value at a dotted path to another one of its kind."""
    *parts, last = path.split("/")
    for part in parts:
        content = content[int(part) if isinstance(content, list) else part]
    last = int(last) if isinstance(content, list) else last
    value = content[last]
    changed = not value if isinstance(value, bool) else f"{value} x" if isinstance(value, str) else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        changed = value + 1
    content[last] = [] if isinstance(value, list) else changed


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("geneval", "cases/3/expected/correct"),
        ("geneval", "cases/3/expected/reason"),
        ("geneval", "cases/0/expected/kept/bench"),
        ("geneval", "summaries/0/expected/overall"),
        ("geneval", "summaries/1/expected/tasks/2/percent"),
        ("geneval", "relative_position/0/expected"),
        ("geneval", "compute_iou/3/expected"),
        ("geneval", "crops/0/expected/1/2/0"),
        ("geneval", "color_texts/apple/0/2"),
        ("geneval", "constants/counting_threshold"),
        ("geneval", "detector_postprocess/4/expected/0/box/2"),
        ("geneval", "detector_postprocess/4/expected/0/score"),
        ("geneval", "detector_postprocess/4/expected/1/mask_pixels"),
        ("geneval", "detector_postprocess/0/returned"),
        ("dpg", "prompt_cases/2/expected/picture_scores/0"),
        ("dpg", "prompt_cases/2/expected/score"),
        ("dpg", "prompt_cases/2/expected/category_scores/1"),
        ("dpg", "prompt_cases/11/expected/error"),
        ("dpg", "table_cases/1/expected/p1/qid2dependency/2"),
        ("dpg", "table_cases/3/expected/error"),
        ("dpg", "script_cases/0/expected/score"),
        ("dpg", "script_cases/0/expected/l2/entity - whole"),
        ("dpg", "script_cases/2/expected/failed"),
        ("dpg", "several_processes/one_process/l1/entity"),
        ("dpg", "several_processes/two_processes_first_run/score"),
        ("dpg", "several_processes/two_processes_first_run/l1/entity"),
        ("dpg", "several_processes/two_processes_second_run/l2/other - count"),
    ],
)
def test_altered_values_fail(folder, kind, path):
    assert failures(folder, kind, lambda content: altered(content, path))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("geneval", lambda c: c.update(more_cases=[{"x": 1}])),
        ("geneval", lambda c: c["cases"][0].update(depth=[1])),
        ("geneval", lambda c: c["cases"][0]["detections"][0].update(depth=1.0)),
        ("geneval", lambda c: c["cases"][0].update(options={"UNKNOWN": 1})),
        ("geneval", lambda c: c["summaries"][0]["expected"].update(median=1)),
        ("dpg", lambda c: c["prompt_cases"][0]["expected"].update(median=1)),
        ("dpg", lambda c: c["script_cases"][0].update(weights=[1])),
    ],
)
def test_what_no_check_reads_fails(folder, kind, change):
    assert failures(folder, kind, change)


def test_images_beyond_a_grid_file_are_black_in_the_original_and_an_error_here(folder):
    """A form of case that the README of the golden data describes; the bundled cases have none."""
    questions = [{"id": 1, "tuple": "entity - whole (a)", "question": "?", "parents": [0]}]

    def add(content, scores):
        expected = {"picture_scores": scores, "score": sum(scores) / 4, "category_scores": {"1": scores[-1]}}
        case = {"id": "99", "note": "half a grid", "questions": questions, "pic_num": 4, "expected": expected}
        content["prompt_cases"] = [case | {"answers": [{"1": "yes"}] * 4, "grid_size": [64, 32], "resolution": 32}]

    assert not failures(folder, "dpg", lambda content: add(content, [1.0, 1.0, 0.0, 0.0]))
    assert failures(folder, "dpg", lambda content: add(content, [1.0, 1.0, 1.0, 1.0]))


def test_another_key_map_fails(folder):
    content = json.loads((GOLDEN / "mask2former_key_map.json").read_text("utf-8"))
    names = list(content["map"])
    content["map"][names[0]], content["map"][names[1]] = content["map"][names[1]], content["map"][names[0]]
    (folder / "mask2former_key_map.json").write_text(json.dumps(content), "utf-8")
    assert {row.case for row in run(folder, only=["m"], quiet=True).failures} == {*names[:2]}


def test_an_unknown_file_is_not_passed_over(folder):
    (folder / "wise_golden.json").write_text("{}")
    assert [str(row.file) for row in run(folder, quiet=True).failures] == ["wise_golden.json"]
