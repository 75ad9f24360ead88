"""The golden data of OmniGen2 passes with nothing unchecked, and altered data fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .parity.forms import FORMS, form_of
from .parity.run import REST, run

GOLDEN = Path(__file__).parent / "parity" / "golden_omnigen2"
KINDS = [*FORMS["omnigen2"].checks, REST]


@pytest.fixture(scope="module")
def report():
    assert form_of(GOLDEN) == "omnigen2"
    return run(GOLDEN, quiet=True)


@pytest.mark.long
def test_golden_set(report):
    assert [str(row) for row in report.failures] == []


@pytest.mark.long
@pytest.mark.parametrize("kind", FORMS["omnigen2"].checks)
def test_every_kind_has_checks(report, kind):
    assert len([row for row in report.rows if row.file.startswith(f"{kind}_")]) > 15


@pytest.fixture
def copy(tmp_path) -> Path:
    """The golden directory, free to be altered; its large folders are links."""
    for path in GOLDEN.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path, target_is_directory=True)
        else:
            shutil.copy(path, tmp_path)
    return tmp_path


def alter(folder: Path, stem: str, name: str) -> None:
    """Change one value of one tensor."""
    path = folder / f"{stem}.safetensors"
    tensors = load_file(path)
    flat = tensors[name].flatten()
    flat[0] = (
        1 - flat[0]
        if flat.dtype in (torch.int64, torch.int32)
        else flat[0] + (9 if flat.dtype == torch.uint8 else 0.01)
    )
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("a_prompt", "single.1.embeds"),
        ("b_image", "pre.2.1"),
        ("c_rope", "mixed.position_ids"),
        ("d_transformer", "mixed.mid.ref_refined"),
        ("e_scheduler", "field.dpm.3"),
        ("f_guidance", "edit_both.pred.4.ref"),
        ("f_guidance", "text_range.velocity.2"),
        ("g_pipeline", "batch_mixed.latents.0"),
        ("h_chat", "one_image.pixel_values"),
        ("j_lora", "scale_0.5.out.1"),
    ],
)
def test_altered_values_fail(copy, stem, name):
    alter(copy, stem, name)
    failures = run(copy, only=[stem[0]], quiet=True).failures
    assert failures and all(row.file == stem for row in failures)


def test_unknown_calls_files_and_tensors_fail(copy):
    content = json.loads((copy / "k_edge.json").read_text("utf-8"))
    content["calls"] = {"a call that nobody knows": "works: [(8, 8)]"}
    (copy / "k_edge.json").write_text(json.dumps(content), "utf-8")
    (copy / "z_more.json").write_text("{}")
    failed = [(row.file, row.message) for row in run(copy, only=["k", REST], quiet=True).failures]
    assert ("k_edge", "no check of this call") in failed and ("z_more.json", "file not checked") in failed
