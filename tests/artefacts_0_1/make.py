"""Makes the artefacts of version 0.1: run it with the code of 0.1, from that version's working tree.

    python .../tests/artefacts_0_1/make.py OUT

Everything is computed with one thread from fixed seeds. README.md says what each folder is for.
"""

import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before anything imports torch or huggingface_hub
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="artefacts-")}
    sys.path.insert(0, os.getcwd())  # the tree of 0.1: its `tests` package is used

import torch  # noqa: E402

JUDGE_URL = "http://judge.test/v1"  # reached through a proxy on the loopback: the port differs from run to run
DRAWING = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
STEPS, SAVED = 4, 2  # of the training runs: where they end, and where the kept checkpoint is
PACKS = {"tokens": 100, "packs_per_step": 2, "buffer": 4}
RUNS = {
    "lora": {
        "packing": PACKS,
        "tune": {"method": "lora", "experts": ["gen", "und"], "rank": 4, "alpha": 8, "dropout": 0.3},
        "ema": {"decay": 0.9},
    },
    "full": {
        "batch_size": 2,
        "optimizer": {"name": "muon", "lr": 1e-3, "muon_lr": 1e-2, "schedule": "cosine", "warmup_steps": 1},
    },
    "streamed": {
        "packing": PACKS,
        "tune": {"method": "lora", "rank": 2, "alpha": 4},
        "data": {"path": "rows", "streaming": True},
    },
}


def make_pipeline():
    """A random BAGEL, a third of the golden one's size, around the golden tokenizer."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
    from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
    from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
    from tests.training.conftest import CHECKPOINT

    tokenizer = Echo4oPipeline.from_original(CHECKPOINT).tokenizer
    torch.manual_seed(0)
    transformer = BagelTransformer2DModel(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=336,
        latent_channels=16,
        max_latent_size=4,
    )
    vision_model = BagelVisionModel(
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_attention_heads=2,
        max_patches_per_side=4,
        output_size=32,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)  # a fresh one is all zeros
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return Echo4oPipeline(
        transformer=transformer.eval(),
        vision_model=vision_model.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        vae_image_limits={"max_size": 64, "min_size": 32},
        vision_image_limits={"max_size": 56, "min_size": 28},
    )


def fingerprint(tensor: torch.Tensor) -> str:
    """Of a tensor's type, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def contents(checkpoint: Path) -> dict[str, str]:
    """One fingerprint for each section of a training checkpoint: weights, optimizer states, averages."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint / "weights")
    held = reader.read_metadata().state_dict_metadata
    values = {
        n: torch.empty(m.size, dtype=m.properties.dtype) if hasattr(m, "size") else None for n, m in held.items()
    }
    dcp.load(values, storage_reader=reader, no_dist=True)
    digests = {section: hashlib.sha256() for section in sorted({name.partition(".")[0] for name in values})}
    for name, value in sorted(values.items()):
        text = fingerprint(value) if isinstance(value, torch.Tensor) else repr(value)
        digests[name.partition(".")[0]].update(f"{name} {text}\n".encode())
    return {section: digest.hexdigest() for section, digest in digests.items()}


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def draw(pipe, references=()) -> torch.Tensor:
    """The float32 latents of one image."""
    pipe.transformer.eval()  # 0.1 leaves the dropout of a loaded adapter on
    generator = torch.Generator().manual_seed(7)
    return pipe("a red square", image=list(references) or None, generator=generator, **DRAWING).images[0]


def run(*arguments, code: int = 0) -> None:
    """A command, in this process."""
    from typer.testing import CliRunner

    from echo4o.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code != code:
        raise SystemExit(f"{arguments} ended with {result.exit_code}: {result.output}\n{result.exception!r}")


def make_model() -> dict:
    """pipeline/, rows/ and the images that the pipeline generates."""
    from safetensors.torch import save_file

    from echo4o import Echo4oPipeline
    from tests.training.conftest import make_rows, picture

    make_pipeline().save_pretrained("pipeline")
    make_rows().save_to_disk("rows")
    picture("blue").save("reference.png")
    pipe = Echo4oPipeline.from_pretrained("pipeline", dtype=torch.float32)
    latents = {"text_to_image": draw(pipe), "with_reference": draw(pipe, [picture("blue")])}
    save_file({name: value.contiguous() for name, value in latents.items()}, "latents.safetensors")
    return {name: fingerprint(value) for name, value in latents.items()}


def make_runs() -> dict:
    """runs/: checkpoints in the middle of three runs; what the runs end with."""
    import yaml

    from echo4o.training.train import main

    facts = {}
    for name, changes in RUNS.items():
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        values = {
            "model": "pipeline",
            "output_dir": f"runs/{name}/whole",
            "data": {"path": "rows"},
            "optimizer": {"lr": 1e-3, "warmup_steps": 1, "schedule": "linear"},
            "steps": STEPS,
            "device": "cpu",
            "save_dtype": "float32",
            "checkpoints": {"every": SAVED, "keep": 2},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values | changes))
        if main([str(folder / "recipe.yaml")]):
            raise SystemExit(f"the run {name} failed")
        whole = folder / "whole"
        log = [json.loads(line) for line in (whole / "train_log.jsonl").read_text().splitlines()]
        facts[name] = {
            "losses": [entry["loss"] for entry in log],
            "checkpoint": contents(whole / "checkpoints" / f"step-{STEPS:08d}"),
        }
        result = whole / ("adapter" if "tune" in changes else "pipeline")
        for file in result.rglob("*.safetensors"):
            if file.parent.name != "vae":
                (folder / "result" / file.relative_to(result)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / "result" / file.relative_to(result))
        saved = whole / "checkpoints" / f"step-{SAVED:08d}"
        with tarfile.open(folder / "checkpoint.tar.xz", "w:xz") as archive:  # a seventh of its size on the disk
            archive.add(saved, saved.name)
        lines = (whole / "train_log.jsonl").read_text().splitlines(keepends=True)
        (folder / "train_log.jsonl").write_text("".join(lines[:SAVED]))
        shutil.rmtree(whole)
    return facts


def make_adapters() -> dict:
    """adapters/: a run's adapter as `echo4o train` writes it, and the same as diffusers does."""
    from safetensors.torch import save_file

    from echo4o import Echo4oPipeline

    Path("adapters").mkdir()
    shutil.copytree("runs/lora/result", "adapters/trained")
    pipe = Echo4oPipeline.from_pretrained("pipeline", dtype=torch.float32)
    pipe.load_lora_weights("adapters/trained", adapter_name="trained")
    pipe.save_lora_adapter("adapters/diffusers")
    latents = draw(pipe)
    save_file({"adapted": latents.contiguous()}, "adapters/latents.safetensors")
    return {"adapted": fingerprint(latents)}


def make_latents() -> dict:
    """latents/: a cache of encoded rows, and the losses of a run that reads it."""
    from echo4o.training.train import main

    run("dataset", "precompute", "rows", "--model", "pipeline", "--out", "latents")
    changes = ["output_dir=cached", "latents=latents", f"steps={SAVED}", "checkpoints=null"]
    if main(["runs/full/recipe.yaml", *(part for change in changes for part in ("--set", change))]):
        raise SystemExit("the run over cached latents failed")
    log = [json.loads(line) for line in Path("cached/train_log.jsonl").read_text().splitlines()]
    shutil.rmtree("cached")
    return {"losses": [entry["loss"] for entry in log]}


def make_evaluations(server) -> dict:
    """evaluation/: one that a budget stopped, one that was generated and scored, and the cache of paid answers."""
    from tests.evaluation.conftest import even_is_correct, write_pictures, write_prompts

    root = Path("evaluation")
    write_pictures(root / "pictures", 6)
    write_prompts(root / "prompts.jsonl", 6)
    write_prompts(root / "two.jsonl", 2)
    os.environ["ECHO4O_CACHE"] = str(root / "answers")
    server.verdict = even_is_correct
    judge = ["--judge", "openai:judge", "--judge-url", JUDGE_URL, "--concurrency", 1]
    given = ["evaluate", "genevalpp", "--images", root / "pictures", "--prompts", root / "prompts.jsonl", *judge]
    run(*given, "--out", root / "stopped", "--price", "10,10", "--budget", 0.05, code=2)
    run(*given, "--out", root / "whole", "--no-cache")
    shutil.copy(root / "whole" / "result.json", root / "expected.json")
    shutil.rmtree(root / "whole")
    generated = ["evaluate", "genevalpp", "--model", "pipeline", "--prompts", root / "two.jsonl", *judge]
    server.verdict = lambda call: {"reason": "as asked", "correct": 1}
    run(*generated, "--out", root / "generated", "--no-cache", "--steps", 2, "--height", 32, "--width", 32,
        "--device", "cpu", "--pictures", 2)  # fmt: skip
    return {"asked": len(server.judged)}


def make_synthesis(server) -> dict:
    """synthesis/: three rows to be made, stopped by a budget."""
    import yaml

    from echo4o.quickstart.scene import COLOURS, SHAPES
    from tests.dataset_scripts.synthesis.artist import Artist

    server.artist = Artist().serve(server)
    root = Path("synthesis")
    root.mkdir()
    (root / "objects.txt").write_text("\n".join(SHAPES).replace("cross", "cross|crosses") + "\n")
    (root / "colours.txt").write_text("\n".join(COLOURS) + "\n")
    (root / "benchmark.txt").write_text("a photo of a green bus and a white cloud over seven hills\n")
    words, picture = {"input": 1.0, "output": 1.0}, {"picture": 0.01}
    models = {
        "text": {"name": "writer", "url": JUDGE_URL, "price": words},
        "image": {"name": "painter", "url": JUDGE_URL, "size": "64x64", "price": picture},
        "judge": {"name": "judge", "url": JUDGE_URL, "price": words},
    }
    recipe = {
        "version": "artefact",
        "models": models,
        "rate": {"concurrency": 1, "first_wait": 0.01, "tries": 3},
        "gates": {
            "duplicate_pictures": None,
            "contamination": {"benchmarks": [], "prompts": [f"{root}/benchmark.txt"]},
        },
        "instruction_following": {"rows": 6, "objects": f"{root}/objects.txt", "colours": f"{root}/colours.txt"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    before = len(server.calls)
    run("dataset", "synthesize", root / "recipe.yaml", "--out", root / "stopped", "--budget", 0.05, code=2)
    shutil.copytree(root / "stopped", "whole")
    calls = len(server.calls)
    run("dataset", "synthesize", root / "recipe.yaml", "--out", "whole")
    rows = [line for file in Path("whole/dataset").glob("*/rows-*.jsonl") for line in file.read_text().splitlines()]
    shutil.rmtree("whole")
    rows = sorted((json.loads(row) for row in rows), key=lambda row: row["row"])
    return {"calls": calls - before, "calls_of_the_rest": len(server.calls) - calls, "rows": rows}


def make_dataset() -> dict:
    """release/: a synthetic release; dataset/: what it is built into."""
    from tests.dataset_scripts.layout import small_release

    small_release(Path("release"), rows=3, per_archive=2)
    run("dataset", "build", "release", "--out", "dataset", "--workers", 1)
    return {"files": tree(Path("dataset"))}


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    torch.set_num_threads(1)
    from tests.openai_server import KEY, OpenAIServer

    facts = {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}
    facts |= {"images": make_model(), "runs": make_runs(), "adapters": make_adapters(), "latents": make_latents()}
    for name in ("NO_PROXY", "no_proxy", "OPENAI_BASE_URL"):
        os.environ.pop(name, None)
    os.environ["OPENAI_API_KEY"] = KEY
    with OpenAIServer() as server:
        os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = server.url.removesuffix("/v1")
        facts["evaluation"] = make_evaluations(server)
        facts["synthesis"] = make_synthesis(server)
    facts["dataset"] = make_dataset()
    for file in Path("rows").glob("cache-*"):  # what `datasets` keeps of its transforms
        file.unlink()
    Path("facts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
