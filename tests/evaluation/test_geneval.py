"""GenEval from images to report with a tiny random detector and colour classifier."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.geneval.convert_detector import COCO_CLASSES, convert_detector, require_coco_order
from echo4o.evaluation.benchmarks.prompt_files import fetch, load_prompts, read_prompts
from echo4o.evaluation.score_report import load_published
from tests.evaluation.conftest import ROOT, official
from tests.evaluation.test_command import run, words
from tests.evaluation.tiny_detector import tiny_config, write_clip, write_detector

KEY_MAP = ROOT / "tests" / "parity" / "golden_standard_benchmarks" / "mask2former_key_map.json"
ROWS = [
    {"tag": "single_object", "include": [{"class": "vase", "count": 1}], "prompt": "a photo of a vase"},
    {"tag": "colors", "include": [{"class": "vase", "count": 1, "color": "red"}], "prompt": "a photo of a red vase"},
    {
        "tag": "counting",
        "include": [{"class": "couch", "count": 2}],
        "exclude": [{"class": "couch", "count": 3}],
        "prompt": "a photo of two couchs",
    },
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options that name a tiny detector and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("models")
    write_detector(folder / "detector")
    write_clip(folder / "clip")
    return ["--detector", folder / "detector", "--color-model", folder / "clip"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def write_image(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def original_folder(tmp_path):
    """Two images for each prompt in the original's layout."""
    for number, row in enumerate(ROWS):
        for sample in range(2):
            write_image(tmp_path / "images" / f"{number:05d}" / "samples" / f"{sample:04d}.png", 2 * number + sample)
        (tmp_path / "images" / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(row))
    return tmp_path / "images"


def result_of(out) -> dict:
    return json.loads((out / "result.json").read_text())


@pytest.mark.long
def test_from_prompts_to_report(models, prompts, tmp_path):
    checkpoint = ROOT / "tests" / "parity" / "golden" / "checkpoint"
    generation = ["--model", checkpoint, "--steps", 1, "--height", 64, "--width", 64, "--num-images", 2]
    out = tmp_path / "out"
    done = run("geneval", *generation, "--prompts", prompts, *models, "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    found = result_of(out)
    assert found["statuses"]["scored"] == 6 and found["coverage"] == 1.0
    assert list(found["groups"]) == ["single_object", "colors", "counting"]
    assert {"overall_accuracy", "prompts_with_a_right_image"} == set(found["also"]) == set(found["intervals"]["also"])
    assert found["judge"]["judge"] == "detector" and found["measure"]["published"] is None
    assert "not the published ones" in found["measure"]["why_not"]
    assert "not comparable with published numbers" in words(done.stderr)
    report = (out / "report.html").read_text()
    assert "Published numbers are not shown" in report and "BAGEL" not in report


@pytest.mark.long
def test_original_folders_other_thresholds_agreement_of_batches_and_comparison(
    models, prompts, original_folder, tmp_path
):
    given = ["geneval", "--prompts", prompts, *models, "--num-images", 2, "--device", "cpu"]
    done = run(*given, "--images", original_folder, "--out", tmp_path / "one", "--threshold", 0.2)
    assert done.exit_code == 0, done.output
    lines = list(JsonLines(tmp_path / "one" / "detections.jsonl"))
    assert len(lines) == 6 and any(line["detections"] for line in lines)
    colored = [of for line in lines for of in line["detections"] if "color_logits" in of]
    assert all(of["class"] == "vase" and len(of["color_logits"]) == 10 for of in colored)
    # Another threshold reads the stored detections.
    strict = run(*given, "--images", original_folder, "--out", tmp_path / "one", "--threshold", 0.99)
    assert strict.exit_code == 0, strict.output
    assert result_of(tmp_path / "one")["score"] == 0.0
    assert len(list(JsonLines(tmp_path / "one" / "detections.jsonl"))) == 6
    batched = run(
        *given, "--images", original_folder, "--out", tmp_path / "two", "--threshold", 0.2, "--detector-batch", 4
    )
    assert batched.exit_code == 0, batched.output
    for one, two in zip(*(_by_image(tmp_path / name) for name in ("one", "two")), strict=True):
        assert [of["class"] for of in one] == [of["class"] for of in two]
        assert np.allclose([of["score"] for of in one], [of["score"] for of in two], atol=1e-4)
    refused = run("compare", tmp_path / "one", tmp_path / "two")
    assert refused.exit_code == 2 and "were judged differently" in words(refused.stderr)
    again = run(*given, "--images", original_folder, "--out", tmp_path / "two", "--threshold", 0.99)
    assert again.exit_code == 0, again.output
    compared = run("compare", tmp_path / "one", tmp_path / "two", "--json")
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.stdout)["score"]["difference"] == 0.0


def _by_image(out):
    lines = {line["image_sha256"]: line["detections"] for line in JsonLines(out / "detections.jsonl")}
    return [sorted(lines[key], key=lambda of: (of["class"], of["score"], of["box"])) for key in sorted(lines)]


@pytest.mark.long
def test_kill_and_resume(models, prompts, original_folder, tmp_path):
    out = tmp_path / "out"
    options = ["--prompts", prompts, *models, "--num-images", 2, "--device", "cpu", "--images", original_folder]
    command = [sys.executable, "-m", "echo4o", "evaluate", "geneval", *options, "--out", out]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(JsonLines(out / "detections.jsonl"))) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(list(JsonLines(out / "detections.jsonl")))
    assert 2 <= before < 6
    assert run("geneval", *options, "--out", out).exit_code == 0
    assert len(list(JsonLines(out / "detections.jsonl"))) == 6
    again = run("geneval", *options, "--out", tmp_path / "whole")
    assert again.exit_code == 0, again.output
    assert result_of(out) == result_of(tmp_path / "whole")


def test_a_judge_that_reads_is_another_measure(server, prompts, original_folder, tmp_path):
    server.verdict = lambda call: {"reason": "fine", "correct": 1}
    judge = ["--judge", "openai:judge", "--judge-url", server.url]
    done = run(
        "geneval",
        "--prompts",
        prompts,
        "--images",
        original_folder,
        "--num-images",
        2,
        *judge,
        "--out",
        tmp_path / "o",
    )
    assert done.exit_code == 0, done.output
    measure = result_of(tmp_path / "o")["measure"]
    assert measure["name"] == "GenEval's prompts, judged by openai:judge" and measure["published"] is None
    asked = " ".join(call.text for call in server.judged)
    assert "at least 1 red vase" in asked and "exactly 2 couch" in asked


def test_published_numbers_stand_beside_the_same_prompt_file_only():
    geneval, published = get_benchmark("geneval"), load_published()
    thresholds = {"score": 0.3, "counting_score": 0.9, "max_objects": 16, "max_overlap": 1.0, "position": 0.1}
    judge = {"judge": "detector", "published_weights": True, "thresholds": thresholds}
    assert published[geneval.measure({"prompt_file": "original"}, judge).published]["BAGEL"]["score"] == 0.82
    assert published[geneval.measure({"prompt_file": "rewritten"}, judge).published]["BAGEL"]["score"] == 0.88
    assert geneval.measure({"prompt_file": None}, judge).published is None
    assert geneval.measure({"prompt_file": "original"}, judge | {"published_weights": False}).published is None
    assert (
        geneval.measure({"prompt_file": "original"}, judge | {"thresholds": thresholds | {"score": 0.2}}).published
        is None
    )
    assert geneval.measure({"prompt_file": "original"}, {"judge": "openai:gpt"}).published is None


# --- prompt files ---


@pytest.mark.parametrize("name", ["original", "rewritten"])
def test_both_prompt_files_are_known(name, tmp_path):
    file = official(f"geneval/geneval_evaluation_metadata{'_long' if name == 'rewritten' else ''}.jsonl")
    prompts = load_prompts(get_benchmark("geneval"), file)
    assert (len(prompts.prompts), prompts.official, prompts.more) == (553, True, {"prompt_file": name})
    counts = {tag: sum(p.group == tag for p in prompts.prompts) for tag in get_benchmark("geneval").groups}
    assert list(counts.values()) == [80, 99, 80, 94, 100, 100]
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(file.read_bytes().replace(b"bench", b"bensh", 1))
    with pytest.raises(ValueError, match=r"line 1 differs from GenEval's|line 1: \"class\" is 'bensh'"):
        load_prompts(get_benchmark("geneval"), changed)
    text = file.read_bytes().splitlines(keepends=True)
    changed.write_bytes(b"".join([*text[:99], text[99].replace(b" and ", b" amd "), *text[100:]]))
    with pytest.raises(ValueError, match=f"line 100 differs from GenEval's {name} prompts"):
        load_prompts(get_benchmark("geneval"), changed)
    changed.write_bytes(b"".join(text[:20]))  # a part is fine
    assert load_prompts(get_benchmark("geneval"), changed).official is False


def test_a_download_with_another_checksum_is_refused(tmp_path):
    from dataclasses import replace

    file = tmp_path / "file.jsonl"
    file.write_text("{}")
    source = replace(get_benchmark("geneval").source, url=file.as_uri())
    with pytest.raises(ValueError, match="has the SHA-256 .*, expected is 5c48e081"):
        fetch(source, "geneval", tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": [{"class": "unicorn", "count": 1}]}, "\"class\" is 'unicorn'"),
        ({"include": [{"class": "dog", "count": 0}]}, '"count" must be a whole number from 1'),
        ({"include": [{"class": "dog", "count": 1, "color": "beige"}]}, "\"color\" is 'beige'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "it must be an earlier one"),
        ({"include": [{"class": "dog", "count": 1, "size": "big"}]}, "unknown field 'size'"),
        ({"tag": "depth"}, "\"tag\" is 'depth'"),
    ],
)
def test_rows_that_no_judge_can_read(change, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0] | change))
    with pytest.raises(ValueError, match=message):
        read_prompts(get_benchmark("geneval"), path)


def test_fresh_prompts_have_the_official_structure(tmp_path):
    known = official("geneval/geneval_evaluation_metadata.jsonl")
    for name in ("a", "b"):
        done = run("make-prompts", "geneval", "--seed", 5, "--exclude", known, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    fresh, old = (read_prompts(get_benchmark("geneval"), path) for path in (tmp_path / "a", known))
    assert len(fresh) == len(old) == 553

    def structure(prompts):
        return sorted(
            (p.group, tuple((c["count"], "color" in c, str(c.get("position"))) for c in p.facts["include"]))
            for p in prompts
        )

    assert structure(fresh) == structure(old)
    texts = {p.text for p in old if p.group != "single_object"}
    assert not texts & {p.text for p in fresh}


# --- folders and weights that do not fit ---


def test_images_of_other_prompts_are_an_error(server, prompts, original_folder, tmp_path):
    (original_folder / "00001" / "metadata.jsonl").write_text(json.dumps(ROWS[0]))
    judge = ["--judge", "openai:judge", "--judge-url", server.url]
    done = run(
        "geneval",
        "--prompts",
        prompts,
        "--images",
        original_folder,
        "--num-images",
        2,
        *judge,
        "--out",
        tmp_path / "o",
    )
    assert done.exit_code == 2 and "the images were made from" in words(done.stderr)
    assert "but prompt 2 is" in words(done.stderr) and not server.judged


def test_missing_weights_name_the_commands(prompts, original_folder, tmp_path):
    done = run("geneval", "--prompts", prompts, "--images", original_folder, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "curl -LO https://download.openmmlab.com/" in done.stderr.replace("\n", "")
    assert "echo4o evaluate convert-detector" in words(done.stderr)


def test_a_detector_of_another_class_order_is_an_error(prompts, original_folder, tmp_path):
    folder = tmp_path / "detector"
    write_detector(folder)
    config = json.loads((folder / "config.json").read_text())
    labels = config["id2label"]
    labels["0"], labels["1"] = labels["1"], labels["0"]
    (folder / "config.json").write_text(json.dumps(config))
    done = run(
        *("geneval", "--prompts", prompts, "--images", original_folder, "--out", tmp_path / "out"),
        *("--detector", folder),
    )
    assert done.exit_code == 2 and "class 0 of the detector is 'bicycle', it must be 'person'" in words(done.stderr)
    with pytest.raises(ValueError, match="has 79 classes"):
        require_coco_order(COCO_CLASSES[1:], "here")


def test_the_detector_judges_geneval_only(models, pictures, tmp_path):
    given = ["imagine_bench", "--images", pictures, "--judge", "detector", *models, "--out", tmp_path / "out"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "type": "TIME", "instruction": "x", "note": "y"}))
    done = run(*given, "--prompts", tmp_path / "rows.jsonl")
    assert done.exit_code == 2 and "can only judge geneval" in words(done.stderr)


# --- conversion ---


def mmdet_checkpoint(folder, detector) -> dict:
    """The tiny detector's tensors under mmdet's names, by the recorded key map."""
    from safetensors.torch import load_file

    tensors = load_file(detector / "model.safetensors")
    state, thirds = {}, {}
    for name, (source, change) in json.loads(KEY_MAP.read_text())["map"].items():
        if name not in tensors:
            continue
        if change.startswith("third"):
            thirds.setdefault(source, {})[change] = tensors[name]
        elif change == "unfold_to_blocks":
            value = tensors[name]
            by_channel = torch.empty_like(value)
            channels = value.shape[-1] // 4
            for block, place in enumerate((0, 2, 1, 3)):
                for channel in range(channels):
                    by_channel[..., 4 * channel + place] = value[..., block * channels + channel]
            state[source] = by_channel
        else:
            state[source] = tensors[name]
    state |= {source: torch.cat([of[part] for part in sorted(of)]) for source, of in thirds.items()}
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    return {"meta": {"CLASSES": COCO_CLASSES, "epoch": 50}, "state_dict": state}


@pytest.mark.long
def test_a_converted_checkpoint_detects_the_same(models, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation

    torch.save(mmdet_checkpoint(tmp_path, models[1]), tmp_path / "model.pth")
    about = convert_detector(tmp_path / "model.pth", tmp_path / "converted", tiny_config())
    assert about["published"] is False and len(about["sha256"]) == 64
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    outputs = []
    for folder in (models[1], tmp_path / "converted"):
        model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
        with torch.no_grad():
            outputs.append(model(pixel_values=pixels))
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.equal(outputs[0][name], outputs[1][name])


def test_a_checkpoint_that_is_not_the_detector(models, tmp_path):
    good = mmdet_checkpoint(tmp_path, models[1])
    path, out = tmp_path / "model.pth", tmp_path / "converted"

    def error(content) -> str:
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            convert_detector(path, out, tiny_config())
        assert not out.exists()
        return str(caught.value)

    assert "it must be 'person'" in error(good | {"meta": {"CLASSES": COCO_CLASSES[::-1]}})
    assert "holds more than tensors" in error(good | {"hook": os.system})
    assert "is not a tensor of mmdet's Mask2Former" in error(good | {"state_dict": {"head.weight": torch.zeros(1)}})
    few = {name: value for name, value in good["state_dict"].items() if "cls_embed" not in name}
    assert "the detector has" in error(good | {"state_dict": few})
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="model.pth"):
        convert_detector(path, out)
    with pytest.raises(ValueError, match="there is no such file; download it with: curl -LO https://"):
        convert_detector(tmp_path / "missing.pth", out)
    done = run("convert-detector", path, tmp_path)
    assert done.exit_code == 2 and "not an empty folder" in words(done.stderr)
