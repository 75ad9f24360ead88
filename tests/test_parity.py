"""The golden set passes with nothing unchecked, and the checker fails on whatever is altered, added or missing."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, pack

from .parity.__main__ import main
from .parity.bagel.c_prefill import Chain, chain_of
from .parity.bagel.g_packing import latent_grids
from .parity.bagel.golden_set import GoldenSet
from .parity.bagel.recorder import build_pipeline
from .parity.forms import FORMS, Form, UnknownForm, form_of
from .parity.golden import Record
from .parity.report import EXACT, SINGLE, Report, Row, distance
from .parity.run import REST, run

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "parity" / "golden"


@pytest.mark.parametrize("letter", [*FORMS["bagel"].checks, REST])
def test_golden_set(letter):
    report = run(GOLDEN, only=letter, quiet=True)
    assert [str(row) for row in report.failures] == []
    assert len(report.rows) > 20


def test_tolerances_are_the_documented_ones():
    from .parity import report

    assert (report.EXACT, report.SINGLE, report.TRAJECTORY, report.PICTURE) == (0.0, 1e-4, 3e-4, 1.0)


# --- a copy to spoil ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """The manifest, the pictures and the smallest file of the golden set, free to be spoilt."""
    for name in ("manifest.json", "a_vit.json", "a_vit.safetensors", "README.md"):
        shutil.copy(GOLDEN / name, tmp_path)
    shutil.copytree(GOLDEN / "inputs", tmp_path / "inputs")
    (tmp_path / "checkpoint").symlink_to(GOLDEN / "checkpoint", target_is_directory=True)
    return tmp_path


def change_tensors(folder: Path, change, stem: str = "a_vit") -> None:
    path = folder / f"{stem}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def change_json(folder: Path, change, stem: str = "a_vit") -> None:
    path = folder / f"{stem}.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def failures(folder: Path, letters: str = "a") -> dict[str, str]:
    """Failed rows: what they are about -> what they say."""
    return {f"{row.file}:{row.case}": row.message for row in run(folder, only=letters, quiet=True).failures}


def test_the_copy_itself_passes(copy):
    assert failures(copy, "am") == {}


def test_an_altered_value_fails_in_its_row_alone(copy):
    change_tensors(copy, lambda t: t["one.vit_out"][0].add_(1.1e-4))
    assert list(failures(copy)) == ["a_vit:one.vit_out"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_fail(copy, value):
    change_tensors(copy, lambda t: t["two.llm_in"][0, 0].fill_(value))
    assert failures(copy) == {"a_vit:two.llm_in": "not finite"}


def test_another_shape_fails_and_the_rest_continues(copy):
    change_tensors(copy, lambda t: t.update({"three.llm_in": t["three.llm_in"][1:]}))
    got = failures(copy)
    assert set(got) == {"a_vit:shapes and types as listed", "a_vit:three.llm_in"}
    assert got["a_vit:three.llm_in"] == "shape [20, 64] instead of [19, 64]"


def test_an_exception_is_a_row_and_the_rest_continues(copy):
    change_json(copy, lambda j: j["cases"]["two"]["images"].append("no_such_picture.png"))
    got = failures(copy)
    assert got["a_vit:two"].startswith("FileNotFoundError")
    assert "a_vit:two.vit_out" in got and not any(name.startswith("a_vit:one") for name in got)


def test_an_unknown_tensor_is_not_passed_over(copy):
    change_tensors(copy, lambda t: t.update({"one.attention_maps": torch.zeros(2)}))
    got = failures(copy)
    assert got["a_vit:one.attention_maps"] == "tensor not checked"
    assert "a_vit:tensors listed in the json" in got


def test_a_missing_tensor_fails(copy):
    change_tensors(copy, lambda t: t.pop("one.connector_out"))
    assert "a_vit:tensors listed in the json" in failures(copy)


def test_an_unknown_case_or_field_is_not_passed_over(copy):
    def change(content):
        content["temporal_cases"] = {"clip": {"frames": 3}}
        content["cases"]["one"]["frame_rate"] = 24

    change_json(copy, change)
    got = failures(copy)
    assert got["a_vit:temporal_cases"] == got["a_vit:cases.one.frame_rate"] == "field of the json not checked"


def test_a_case_without_tensors_fails(copy):
    change_json(copy, lambda j: j["cases"].update({"four": dict(j["cases"]["one"])}))
    assert failures(copy)["a_vit:four"].startswith("KeyError")


def test_unknown_files_and_images_are_not_passed_over(copy):
    (copy / "h_audio.json").write_text("{}")
    shutil.copy(copy / "inputs" / "img_a.png", copy / "inputs" / "img_z.png")
    assert failures(copy, "m") == {"h_audio.json:": "file not checked", "inputs:img_z.png": "picture not checked"}


def own_checkpoint(copy: Path) -> Path:
    (copy / "checkpoint").unlink()
    return shutil.copytree(GOLDEN / "checkpoint", copy / "checkpoint", copy_function=shutil.copyfile)


def test_files_of_the_checkpoint_that_nothing_reads_are_not_passed_over(copy):
    checkpoint = own_checkpoint(copy)
    names = ["more.safetensors", "model.safetensors.index.json", "ema-00001-of-00001.safetensors", "model.bin"]
    for name in names:
        (checkpoint / name).write_bytes(b"{}")
    assert failures(copy, "m") == {f"checkpoint:{name}": "file not checked" for name in names}


def test_shards_named_by_the_index_are_read(copy):
    checkpoint = own_checkpoint(copy)
    shard = checkpoint / "ema-00001-of-00001.safetensors"
    (checkpoint / "ema.safetensors").rename(shard)
    weight_map = dict.fromkeys(load_file(shard), shard.name)
    (checkpoint / "ema.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert failures(copy, "m") == {}
    shutil.copy(checkpoint / "ae.safetensors", checkpoint / "ema-00002-of-00001.safetensors")
    assert failures(copy, "m") == {"checkpoint:ema-00002-of-00001.safetensors": "file not checked"}


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({}, []),
        ({"eos_token_id": [318, 316]}, []),
        ({"eos_token_id": 317}, ["has the one that ends an answer", "as in llm_config.json"]),
        ({"eos_token_id": [318, 4]}, ["no special tokens"]),
        ({"bos_token_id": 317}, ["as in llm_config.json"]),
        ({"pad_token_id": 5}, ["no special tokens"]),
    ],
)
def test_generation_config_agrees_with_the_tokenizer(copy, change, rows):
    file = own_checkpoint(copy) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change))
    key = next(iter(change), "")
    assert list(failures(copy, "m")) == [f"manifest:generation_config.{key}: {row}" for row in rows]


@pytest.mark.parametrize("name", ["a_vit.json", "a_vit.safetensors"])
def test_half_a_file_fails(copy, name):
    (copy / name).unlink()
    assert failures(copy)


def test_a_missing_kind_fails(copy):
    for path in copy.glob("a_vit.*"):
        path.unlink()
    assert "no such file" in failures(copy)["a_*:"]


def test_other_names_and_fewer_cases_pass(copy):
    """Nothing about names, numbers or order of cases is fixed: the directory alone says what there is."""
    for name in ("img_a.png", "img_b.png"):
        (copy / "inputs" / name).rename(copy / "inputs" / f"other_{name}")

    def rename(content):
        cases = content["cases"]
        content["cases"] = {"pair": cases["two"]}
        cases["two"]["images"] = [f"other_{name}" for name in cases["two"]["images"]]
        content["tensors"] = {f"pair{n[3:]}": v for n, v in content["tensors"].items() if n.startswith("two.")}

    change_json(copy, rename)

    def keep(tensors):
        kept = {f"pair{name[3:]}": value for name, value in tensors.items() if name.startswith("two.")}
        tensors.clear()
        tensors.update(kept)

    change_tensors(copy, keep)
    assert failures(copy) == {}
    for suffix in (".json", ".safetensors"):
        (copy / f"a_vit{suffix}").rename(copy / f"a_second{suffix}")
    assert failures(copy) == {}


@pytest.mark.parametrize(
    ("stem", "name", "row"),
    [
        ("c_inference_prefill_flow", "p2_vae.cache.key.1", "p2_vae.cache.key.1"),
        (
            "c_inference_prefill_flow",
            "flow.v_cfg_text4.0_img2.0_channel_min0.5",
            "flow.v_cfg_text4.0_img2.0_channel_min0.5",
        ),
        ("g_packing", "pack_many.attend_mask.2", "pack_many.attend_mask.2"),
        ("e_vae", "single.encode_sampled_scaled", "single.encode_sampled_scaled"),
    ],
)
def test_alterations_elsewhere_fail_too(copy, stem, name, row):
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / f"{stem}{suffix}", copy)

    def change(tensors):
        flat = tensors[name].view(-1)
        flat[-1] = 1 - flat[-1] if flat.dtype == torch.uint8 else flat[-1] + 2e-4

    change_tensors(copy, change, stem)
    assert f"{stem}:{row}" in failures(copy, stem[0])


def test_image_guidance_without_images(copy):
    """The original guides by an image-free branch that is the condition itself. Guidance by 2.5 with an image scale of
    2 is then guidance by 1 + 2 * 1.5 = 4, which was recorded."""
    name = "t2i_global_interval_0.4_1.0"
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / f"c_inference_t2i{suffix}", copy)

    def change(content):
        case = content["trajectories"][name]
        case["hyper"] |= {"cfg_text_scale": 2.5, "cfg_img_scale": 2.0}
        case["step_cfg_img_scale"] = [2.0 if s > 1 else 1.0 for s in case["step_cfg_text_scale"]]
        case["step_cfg_text_scale"] = [2.5 if s > 1 else 1.0 for s in case["step_cfg_text_scale"]]
        for key in ("prefill", "flow"):
            del content[key]
        content["trajectories"] = {name: case}
        content["tensors"] = {n: v for n, v in content["tensors"].items() if n.startswith(name)}

    change_json(copy, change, "c_inference_t2i")

    def keep(tensors):
        for other in [n for n in tensors if not n.startswith(name)]:
            del tensors[other]

    change_tensors(copy, keep, "c_inference_t2i")
    assert failures(copy, "c") == {}
    change_json(copy, lambda j: j["trajectories"][name]["hyper"].update(cfg_img_scale=2.1), "c_inference_t2i")
    assert f"c_inference_t2i:{name}.final_latent_tokens" in failures(copy, "c")


def test_bounds_on_images_are_those_of_the_golden_file():
    bounds = {"max_image_size": 60, "min_image_size": 20, "image_stride": 16, "max_pixels": 1500}
    transforms = Record({"vae_transform": bounds, "vit_transform": bounds | {"image_stride": 14}})
    limits = build_pipeline(GoldenSet(GOLDEN), transforms).vae_limits
    assert (limits.max_size, limits.min_size, limits.max_pixels, limits.stride) == (60, 20, 1500, 16)


def test_flows_continue_from_the_chain_that_ends_where_they_say():
    chains = [Chain(SimpleNamespace(length=20, position=p), None) for p in (20, 3)]
    assert [chain_of({"kv_len": 20, "rope_position": p}, chains) for p in (20, 3)] == chains
    with pytest.raises(ValueError, match="no chain of prefills ends with 20 tokens at position 4"):
        chain_of({"kv_len": 20, "rope_position": 4}, chains)


def test_sizes_are_exact(copy):
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / f"f_transforms{suffix}", copy)

    def change(content):
        content["cases"] = content["cases"][:3]  # enough, and fast
        content["cases"][2]["shape"][1] += 1

    change_json(copy, change, "f_transforms")
    case = json.loads((copy / "f_transforms.json").read_text("utf-8"))["cases"][2]
    name = f"f_transforms:{case['transform']}.{case['image']}.n{case['img_num']}.shape"
    assert name in failures(copy, "f")


# --- the command ----------------------------------------------------------------------------------------------------


def test_exit_status_says_whether_all_passed(copy, capsys):
    assert main([str(copy), "--only", "a"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("pass: ")
    change_tensors(copy, lambda t: t["one.llm_in"].add_(1.0))
    assert main([str(copy), "--only", "a"]) == 1
    failed = [line.split() for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert failed[0] == ["a_vit", "one.llm_in", "1.00e+00", "1e-04", "FAIL"]
    assert failed[-1][0] == "FAIL:"


@pytest.mark.long
def test_it_runs_as_a_module_and_refuses_a_folder_of_another_kind(tmp_path):
    command = [sys.executable, "-m", "tests.parity", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and "is not a golden directory of a known form" in done.stderr


# --- forms ---


def test_a_directory_is_recognised_by_its_manifest():
    assert form_of(GOLDEN) == "bagel"


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"special_tokens": {}}', "no json"])
def test_a_directory_of_an_unknown_form_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "a_vit.json").write_text("{}")
    with pytest.raises(UnknownForm):
        form_of(tmp_path)
    with pytest.raises(UnknownForm):
        run(tmp_path, quiet=True)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2


def test_a_directory_of_two_forms_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "by file", Form(checks={"x": "x"}, files=frozenset({"x_golden.json"})))
    (tmp_path / "x_golden.json").write_text("{}")
    assert form_of(tmp_path) == "by file"
    (tmp_path / "manifest.json").write_text(json.dumps(dict.fromkeys(FORMS["bagel"].manifest)))
    with pytest.raises(UnknownForm, match="has several forms"):
        form_of(tmp_path)


def test_kinds_are_letters_or_words_with_commas(copy):
    assert main([str(copy), "--only", "am"]) == main([str(copy), "--only", "a,m"]) == 0
    with pytest.raises(SystemExit):
        main([str(copy), "--only", "ax"])


# --- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([1, 2], torch.tensor([1.0, 2.5]), 0.5),
        ([], torch.zeros(0), 0.0),
        ("a", "a", 0.0),
        ("a", "b", None),
        (None, 1.0, None),
        ([1, 2], [1, 2, 3], None),
        ([[1], [2, 3]], [[1], [2, 3]], 0.0),
        ([-math.inf, 1.0], [-math.inf, 1.0], 0.0),
        (True, torch.tensor(1, dtype=torch.uint8), 0.0),
        (["causal"], ["noise"], None),
    ],
)
def test_distance(got, want, error):
    assert distance(got, want)[0] == error


@pytest.mark.parametrize("got", [[math.nan], [math.inf], [-math.inf]])
def test_distance_from_what_is_not_finite_fails(got):
    error, message = distance(got, [1.0])
    assert not Row("file", "case", error, SINGLE).passed and message == "not finite"


def test_an_empty_report_does_not_pass():
    assert Report().summary().startswith("FAIL")


def test_rows_pass_up_to_their_tolerance():
    assert Row("f", "c", 1e-4, SINGLE).passed and not Row("f", "c", 1.01e-4, SINGLE).passed
    assert Row("f", "c", 0.0, EXACT).passed and not Row("f", "c", 1e-9, EXACT).passed


@pytest.mark.parametrize("side", [3, 5])
def test_grids_are_read_off_position_tables_of_any_size(side):
    """Also where a picture is as wide as the table, so that its places are consecutive numbers."""
    tokens = SpecialTokens(1, 2, 3, 4)
    shapes = [(2, 3), (3, 1), (1, 3), (3, 3)]
    segments = [image_segment(kind, shape, tokens) for kind, shape in zip(["vae", "noise"] * 2, shapes)]
    sequence = pack([segments[:3], segments[3:]], latent_positions=side, patch_positions=1)
    assert latent_grids(sequence, side) == [list(shape) for shape in shapes]


def test_records_know_what_was_read():
    record = Record(
        {"a": 1, "note": "prose", "cases": {"x": {"n": 1, "m": [1, 2]}, "y": {"n": 2}}, "list": [{"k": 1}]}
    )
    assert list(record.unread()) == ["a", "cases", "list"]
    assert record["cases"]["x"]["n"] == 1 and record["list"][0]["k"] == 1
    assert list(record.unread()) == ["a", "cases.x.m", "cases.y"]
    record.note("a", "cases")
    assert list(record.unread()) == []
