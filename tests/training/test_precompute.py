"""The latent cache: the same losses bit for bit, resumed after kill -9, dealt out to processes, refused where it is foreign."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open

from echo4o.modeling.bagel.image_processor_bagel import ImageLimits
from echo4o.training import precompute as module
from echo4o.training.backbones.bagel import BagelRecipe, bytes_to_pixels, pixels_to_bytes
from echo4o.training.precompute import (
    CachedBackbone,
    CacheError,
    LatentCache,
    precompute,
    settings_of,
    undecoded,
)
from echo4o.training.train import Trainer

from .conftest import make_backbone


@pytest.fixture
def backbone(tiny_pipeline):
    return make_backbone(tiny_pipeline)


@pytest.fixture
def cache(tmp_path, rows, backbone):
    precompute(rows, backbone, tmp_path / "cache", rows_per_file=3)
    return tmp_path / "cache"


def recipe(folder, **changes) -> BagelRecipe:
    values = {"model": "unused", "output_dir": folder, "data": {"path": "unused"}, "steps": 9, "batch_size": 1}
    return BagelRecipe.model_validate(values | {"device": "cpu", "save_dtype": "float32"} | changes)


def files(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
def test_training_from_it_has_the_same_losses_bit_for_bit(tmp_path, rows, tiny_pipeline, cache, packed, monkeypatch):
    changes = {"batch_size": None, "packing": {"tokens": 120, "packs_per_step": 2, "buffer": 4}} if packed else {}
    start = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in parts(tiny_pipeline).items()}
    logs = []
    for name in ("live", "cached"):
        for part, model in parts(tiny_pipeline).items():
            model.load_state_dict(start[part])
        if name == "cached":
            changes["latents"] = cache
            monkeypatch.setattr(tiny_pipeline.vae, "encode", None)  # nothing is left to encode
        trainer = Trainer(recipe(tmp_path / name, **changes), tiny_pipeline, rows)
        logs.append([entry["loss"] for entry in trainer.run().log])
    assert logs[0] == logs[1] and len(set(logs[0])) > 1


def parts(pipeline):
    return {"transformer": pipeline.transformer, "vision": pipeline.vision_model}


def test_a_row_that_is_not_in_it_is_encoded(tmp_path, rows, backbone, tiny_pipeline):
    precompute(rows.select(range(4)), backbone, tmp_path / "part")
    cached = CachedBackbone(backbone, tmp_path / "part")
    for row, plain in zip(undecoded(rows), rows):
        (a,), (b,) = cached.prepare([row]), backbone.prepare([plain])
        assert a.text == b.text and torch.equal(a.moments, b.moments)
        assert all(torch.equal(x, y) for x, y in zip(a.reference_moments, b.reference_moments, strict=True))
        for (grid, patches), (grid_b, patches_b) in zip(a.reference_patches, b.reference_patches, strict=True):
            assert grid == grid_b and torch.equal(patches, patches_b)


def test_all_bytes_return_exactly():
    stored = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels_to_bytes(bytes_to_pixels(stored)), stored)


def test_another_vae_or_other_limits_are_refused(cache, rows, backbone, tiny_pipeline):
    assert len(LatentCache(cache, settings_of(backbone)).places) == 8
    backbone.vision_limits = ImageLimits(**(asdict(backbone.vision_limits) | {"max_size": 42}))
    with pytest.raises(CacheError, match="made with other settings .vision_limits: .*'max_size': 42.* here"):
        LatentCache(cache, settings_of(backbone))
    with pytest.raises(CacheError, match="other settings"):
        precompute(rows, backbone, cache, rows_per_file=3)
    with torch.no_grad():
        tiny_pipeline.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(CacheError, match="other settings .vae: "):
        CachedBackbone(make_backbone(tiny_pipeline), cache)


def test_other_images_under_the_same_id_are_refused(cache, rows, tiny_pipeline):
    cached = CachedBackbone(make_backbone(tiny_pipeline), cache)
    first, second = undecoded(rows)[0], undecoded(rows)[1]
    with pytest.raises(CacheError, match="row row-0 has other images"):
        cached.prepare([first | {"image": second["image"]}])


def test_another_dataset_is_refused_and_a_part_is_not_a_cache(cache, rows, backbone):
    with pytest.raises(CacheError, match="rows: 8 there, 5 here"):
        precompute(rows.select(range(5)), backbone, cache, rows_per_file=3)
    module.file_of(cache, 1).unlink()
    with pytest.raises(CacheError, match="not finished: 1 of 3 files are missing"):
        LatentCache(cache, settings_of(backbone))


def test_an_id_that_stands_in_two_rows_is_refused_before_the_first_is_encoded(tmp_path, rows, backbone):
    from datasets import concatenate_datasets

    with pytest.raises(CacheError, match="1 ids stand in more than one row, for example 'row-0'"):
        precompute(concatenate_datasets([rows, rows.select([0])]), backbone, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_any_number_of_processes_writes_the_same(tmp_path, rows, backbone, cache):
    for rank in (0, 1):  # one after the other: what each does depends on its number alone
        precompute(rows, backbone, tmp_path / "two", rank=rank, processes=2, rows_per_file=3)
    assert files(tmp_path / "two") == files(cache)


def test_what_is_there_stays_and_a_broken_write_leaves_nothing(tmp_path, rows, backbone, cache, monkeypatch):
    before, kept = files(cache), module.file_of(cache, 0).stat().st_mtime_ns
    module.file_of(cache, 2).unlink()

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            precompute(rows, backbone, cache, rows_per_file=3)
    assert {f.name for f in cache.iterdir()} == set(before) - {module.file_of(cache, 2).name}
    precompute(rows, backbone, cache, rows_per_file=3)
    assert files(cache) == before and module.file_of(cache, 0).stat().st_mtime_ns == kept


# --- the real command ----------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path, rows, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    rows.save_to_disk(tmp_path / "rows")
    return [str(tmp_path / "rows"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]


SLOW = """
import os, sys, time
from echo4o.training import precompute as module
from echo4o.training.backbones.bagel import BagelRecipe, bytes_to_pixels, pixels_to_bytes
module.ROWS_PER_FILE = 1
module.precompute.__kwdefaults__["rows_per_file"] = 1
write = module._write
def slow(path, work):
    write(path, work)
    if path.name.startswith("rows-00000002"):
        def hang(file):
            work_file = file.write_bytes(b"half a fi")
            print("writing", flush=True)
            time.sleep(60)
        if os.environ.get("HANG"):
            write(path.with_name("rows-00000003.safetensors"), hang)
module._write = slow
sys.exit(module.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_kill_9_in_the_middle_of_a_write(tmp_path, on_disk):
    command = [sys.executable, "-c", SLOW, *on_disk]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment | {"HANG": "1"}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {f.name for f in (tmp_path / "out").iterdir()}
    assert "rows-00000002.safetensors" in left and "rows-00000003.safetensors" not in left
    assert any(name.endswith(".partial") for name in left), "the kill came in the middle"
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("rows-*")}
    assert subprocess.run(command, env=environment, timeout=200).returncode == 0
    assert len(list((tmp_path / "out").glob("rows-*.safetensors"))) == 8
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time_ for name, time_ in done.items())
    assert not list((tmp_path / "out").glob(".*.partial")), "what the killed run left is gone"


@pytest.mark.long
def test_two_processes_share_the_work(tmp_path, on_disk):
    script = SLOW.replace("sys.exit(", "import torch.distributed as dist\ncode = (").replace(
        "module._write = slow",
        "def told(path, work):\n"
        "    open(f'{path.parent}/../by-{os.environ[\"RANK\"]}', 'a').write(path.name + ' ')\n"
        "    write(path, work)\n"
        "module._write = told",
    )
    script += "assert dist.get_world_size() == 2 and dist.get_backend() == 'gloo'\nsys.exit(code)\n"
    (tmp_path / "run.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(tmp_path / "run.py"), *on_disk], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    by = [(tmp_path / f"by-{rank}").read_text().split() for rank in (0, 1)]
    numbers = [[int(n[5:13]) for n in names if n.startswith("rows-")] for names in by]
    assert numbers == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with safe_open(tmp_path / "out" / "rows-00000007.safetensors", "pt") as file:
        assert [entry["id"] for entry in json.loads(file.metadata()["rows"])] == ["row-7"]


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert module.main([str(tmp_path / "absent"), "--model", "m", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "absent" in told and told.count("\n") == 1
