"""BLIP3-o's golden set passes with nothing unchecked, and the checks fail on whatever is altered, added or missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .parity.forms import FORMS, form_of
from .parity.run import REST, run

GOLDEN = Path(__file__).parent / "parity" / "golden_blip3o"
pytestmark = pytest.mark.long


@pytest.mark.parametrize("letter", FORMS["blip3o"].checks)
def test_golden_set(letter):
    report = run(GOLDEN, only=letter, quiet=True)
    assert [str(row) for row in report.failures] == []
    assert len(report.rows) >= 6


@pytest.mark.long
def test_manifest_files_and_released_sizes():
    report = run(GOLDEN, only=REST, quiet=True)
    assert [str(row) for row in report.failures] == []
    assert {"8B.parameters", "4B.parameters", "8B.tensors: names", "unet: shapes"} <= {row.case for row in report.rows}


def test_the_form_is_recognised():
    assert form_of(GOLDEN) == "blip3o"


# --- a copy to spoil --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """The golden set with its checkpoint linked, free to be spoilt."""
    for path in GOLDEN.iterdir():
        if path.is_file() and path.name != "full_size.json":
            shutil.copy(path, tmp_path)
    for name in ("checkpoint", "eva_clip_vision_tower", "inputs"):
        (tmp_path / name).symlink_to(GOLDEN / name, target_is_directory=True)
    return tmp_path


def failures(folder: Path, letters: str) -> list[str]:
    return [f"{row.file}:{row.case}" for row in run(folder, only=letters, quiet=True).failures]


def change_tensors(folder: Path, stem: str, change) -> None:
    path = folder / f"{stem}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def change_json(folder: Path, stem: str, change) -> None:
    path = folder / f"{stem}.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("stem", "name", "off"),
    [
        ("a_prompt", "p1.cond", 1e-4),
        ("b_eva", "c.pooled", 1e-3),
        ("c_dit", "steps5.velocity.1", 1e-3),
        ("c_dit", "inside.layer.1", 1e-4),
        ("g_training", "grad.model.latent_queries", 2e-4),
        ("g_training", "step1.u", 0.01),
        ("h_vocabulary_setup", "embed_after", 1e-6),
    ],
)
def test_an_altered_value_fails(copy, stem, name, off):
    change_tensors(copy, stem, lambda tensors: tensors[name].view(-1)[-1:].add_(off))
    failed = failures(copy, stem[0])
    assert failed and all(row.startswith(f"{stem}:") for row in failed)
    assert name.endswith(".u") or any(name.removeprefix("forward.") in row for row in failed)


def test_an_unknown_tensor_or_field_is_not_passed_over(copy):
    change_tensors(copy, "h_vocabulary_setup", lambda tensors: tensors.update(more=torch.zeros(2)))
    change_json(copy, "h_vocabulary_setup", lambda content: content["arguments"].update(frames=3))
    failed = failures(copy, "h")
    assert "h_vocabulary_setup:more" in failed and "h_vocabulary_setup:arguments.frames" in failed


def test_a_missing_tensor_and_a_missing_kind_fail(copy):
    change_tensors(copy, "b_eva", lambda tensors: tensors.pop("b.pooled"))
    assert "b_eva:tensors listed in the json" in failures(copy, "b")
    (copy / "h_vocabulary_setup.json").unlink()
    (copy / "h_vocabulary_setup.safetensors").unlink()
    assert failures(copy, "h") == ["h_*:"]


def test_unknown_files_are_not_passed_over(copy):
    (copy / "i_audio.json").write_text("{}")
    (copy / "checkpoint").unlink()
    shutil.copytree(GOLDEN / "checkpoint", copy / "checkpoint")
    (copy / "checkpoint" / "more.bin").write_bytes(b"x")
    (copy / "checkpoint" / "diffusion-decoder" / "unet" / "other.json").write_text("{}")
    assert set(failures(copy, "m")) == {
        "i_audio.json:",
        "checkpoint:more.bin",
        "checkpoint:diffusion-decoder/unet/other.json",
    }
