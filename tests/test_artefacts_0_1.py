"""What version 0.1 wrote is read by this version, with the same results: see tests/artefacts_0_1/README.md."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from echo4o.testing.openai_server import API_KEY, OpenAIServer
from tests.artefacts_0_1.make import JUDGE_URL, RUNS, SAVED, STEPS, contents, draw, tree

ARTEFACTS = Path(__file__).parent / "artefacts_0_1"
FACTS = json.loads((ARTEFACTS / "facts.json").read_text())
RECORDED_PILLOW = "13.0.0"
RECORDED_VENDOR = "AuthenticAMD"  # MKL chooses the kernels of matrix products by the processor's vendor


def vendor() -> str:
    """The processor's vendor; empty where the system does not name it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


# Other kernels round differently in the last bits: there, results are close instead of equal.
SAME_KERNELS = (torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability(), vendor()) == (
    FACTS["torch"],
    FACTS["cpu"],
    RECORDED_VENDOR,
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """A copy of the artefacts as the working folder (their recipes have relative paths), one thread, and a clean engine."""
    from accelerate.state import AcceleratorState

    shutil.copytree(ARTEFACTS, tmp_path / "artefacts")
    for name in ("evaluation/expected.json", "evaluation/generated/result.json", "dataset/manifest.json"):
        adopt_versions(tmp_path / "artefacts" / name)
    monkeypatch.chdir(tmp_path / "artefacts")
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "artefacts"
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The endpoint that the artefacts name, as a proxy on the loopback."""
    for name in ("NO_PROXY", "no_proxy", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.setenv("ECHO4O_CACHE", str(tmp_path / "cache"))
    with OpenAIServer() as server:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, server.url.removesuffix("/v1"))
        yield server


def adopt_versions(file: Path) -> None:
    """Replaces the Pillow version that an artefact records by the installed one, which a new result records."""
    file.write_text(file.read_text().replace(f'"pillow": "{RECORDED_PILLOW}"', f'"pillow": "{PIL.__version__}"'))


def run(*arguments) -> str:
    from echo4o.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Bit by bit on the kernels of the artefacts, else within a tolerance."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if SAME_KERNELS:
            assert torch.equal(got[name], tensor), name
        else:
            torch.testing.assert_close(got[name], tensor, atol=tolerance, rtol=tolerance, msg=name)


def load_pipeline():
    from echo4o import Echo4oPipeline

    pipe = Echo4oPipeline.from_pretrained("pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected_images() -> dict[str, torch.Tensor]:
    return load_file("latents.safetensors")


def generated_images(pipe) -> dict[str, torch.Tensor]:
    from PIL import Image

    return {"text_to_image": draw(pipe), "with_reference": draw(pipe, [Image.open("reference.png").convert("RGB")])}


def test_a_pipeline_folder_loads_and_generates_the_same_images():
    assert_same(generated_images(load_pipeline()), expected_images())


WITH_ITS_OWN_CODE = """
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tests.test_artefacts_0_1 import generated_images

torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True, dtype=torch.float32)
assert not type(pipe).__module__.startswith("echo4o.")
pipe.set_progress_bar_config(disable=True)
save_file({name: image.contiguous() for name, image in generated_images(pipe).items()}, "with-its-own-code.safetensors")
"""


@pytest.mark.long
def test_a_pipeline_folder_loads_with_the_code_in_it(tmp_path):
    # A process of its own: diffusers gives the code of all local folders the same module names.
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", WITH_ITS_OWN_CODE], check=True, env=environment)
    by_0_1 = load_file("with-its-own-code.safetensors")
    assert_same(by_0_1, expected_images())
    # Bit by bit with any kernels, because both ran here.
    assert all(torch.equal(image, by_0_1[name]) for name, image in generated_images(load_pipeline()).items())


@pytest.mark.parametrize("form", ["trained", "diffusers"])
def test_an_adapter_loads_and_changes_the_image_as_before(form):
    pipe = load_pipeline()
    pipe.load_lora_weights(f"adapters/{form}")
    assert_same({"adapted": draw(pipe)}, load_file("adapters/latents.safetensors"))


def resumed(name: str) -> Path:
    """The folder of a run of 0.1 that this version resumed and finished."""
    from echo4o.training.train import main

    folder = Path("runs") / name
    with tarfile.open(folder / "checkpoint.tar.xz") as archive:
        archive.extractall(folder / "again" / "checkpoints", filter="data")
    shutil.copy(folder / "train_log.jsonl", folder / "again")
    torch.manual_seed(99)  # the state of this process must not matter
    assert main([str(folder / "recipe.yaml"), "--resume", "--set", f"output_dir={folder / 'again'}"]) == 0
    return folder / "again"


def losses_in(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_to_the_same_weights_and_optimizer_states(name):
    again, facts = resumed(name), FACTS["runs"][name]
    assert losses_in(again) == (facts["losses"] if SAME_KERNELS else pytest.approx(facts["losses"], rel=1e-3))
    result = Path("runs") / name / "result"
    written = again / ("adapter" if "tune" in RUNS[name] else "pipeline")
    for file in result.rglob("*.safetensors"):
        assert_same(load_file(written / file.relative_to(result)), load_file(file))
    if SAME_KERNELS:
        assert contents(again / "checkpoints" / f"step-{STEPS:08d}") == facts["checkpoint"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["lora", "full"])  # a new streamed run may read its rows in another order
def test_a_new_run_of_the_same_recipe_gives_the_same_weights(name):
    from echo4o.training.train import main

    folder, facts = Path("runs") / name, FACTS["runs"][name]
    assert main([str(folder / "recipe.yaml"), "--set", f"output_dir={folder / 'anew'}"]) == 0
    assert losses_in(folder / "anew") == (
        facts["losses"] if SAME_KERNELS else pytest.approx(facts["losses"], rel=1e-3)
    )
    if SAME_KERNELS:
        assert contents(folder / "anew" / "checkpoints" / f"step-{STEPS:08d}") == facts["checkpoint"]


def test_a_cache_of_latents_gives_the_same_steps(monkeypatch):
    from echo4o.training.train import main

    before = tree(Path("latents"))
    run("dataset", "precompute", "rows", "--model", "pipeline", "--out", "latents")
    assert tree(Path("latents")) == before, "a finished cache stays as it is"
    changes = ["output_dir=cached", "latents=latents", f"steps={SAVED}", "checkpoints=null"]
    assert main(["runs/full/recipe.yaml", *(part for change in changes for part in ("--set", change))]) == 0
    expected = FACTS["latents"]["losses"]
    assert losses_in(Path("cached")) == (expected if SAME_KERNELS else pytest.approx(expected, rel=1e-3))


def evaluate_pictures(out: str) -> None:
    given = ["--images", "evaluation/pictures", "--prompts", "evaluation/prompts.jsonl", "--out", out]
    run("evaluate", "genevalpp", *given, "--judge", "openai:judge", "--judge-url", JUDGE_URL)


def even_is_correct(call) -> dict:
    number = call.open_image().getpixel((0, 0))[0]
    return {"reason": f"picture {number}", "correct": int(number % 2 == 0)}


def test_an_evaluation_resumes_without_asking_again_and_scores_the_same(server):
    server.verdict = even_is_correct
    judged = len((Path("evaluation/stopped/records.jsonl")).read_text().splitlines())
    evaluate_pictures("evaluation/stopped")
    assert 0 < judged < 6 and len(server.judged) == 6 - judged
    assert Path("evaluation/stopped/result.json").read_bytes() == Path("evaluation/expected.json").read_bytes()


def test_paid_answers_are_taken_from_the_cache(server, monkeypatch):
    monkeypatch.setenv("ECHO4O_CACHE", "evaluation/answers")
    server.verdict = even_is_correct
    judged = len((Path("evaluation/stopped/records.jsonl")).read_text().splitlines())
    evaluate_pictures("evaluation/another")
    assert len(server.judged) == 6 - judged
    assert Path("evaluation/another/result.json").read_bytes() == Path("evaluation/expected.json").read_bytes()


def test_a_finished_evaluation_generates_and_asks_nothing(server):
    folder = Path("evaluation/generated")
    result, images = (folder / "result.json").read_bytes(), tree(folder / "images")
    sizes = ["--steps", 2, "--height", 32, "--width", 32, "--pictures", 2]
    given = ["--model", "pipeline", "--prompts", "evaluation/two.jsonl", "--device", "cpu", *sizes]
    run("evaluate", "genevalpp", *given, "--judge", "openai:judge", "--judge-url", JUDGE_URL, "--out", folder)
    assert not server.calls and tree(folder / "images") == images
    assert (folder / "result.json").read_bytes() == result


def test_a_synthesis_resumes_without_paying_again(server):
    from tests.dataset_scripts.synthesis.artist import Artist

    facts = FACTS["synthesis"]
    artist = Artist().serve(server)
    artist.painted = 3  # images before: the background goes by their number
    run("dataset", "synthesize", "synthesis/recipe.yaml", "--out", "synthesis/stopped")
    assert len(server.calls) == facts["calls_of_the_rest"] < facts["calls"]
    files = Path("synthesis/stopped/dataset").glob("*/rows-*.jsonl")
    rows = sorted(
        (json.loads(line) for file in files for line in file.read_text().splitlines()), key=lambda r: r["row"]
    )
    assert without_times(rows) == without_times(facts["rows"])


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "time"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_a_dataset_loads_and_is_rebuilt_to_the_same_bytes():
    from datasets import load_dataset

    ids = load_dataset("dataset", split="train")["id"]
    assert len(set(ids)) == 9
    expected = tree(Path("dataset"))
    assert tree(ARTEFACTS / "dataset") == FACTS["dataset"]["files"]
    run("dataset", "build", "release", "--out", "built", "--workers", 1)
    built = tree(Path("built"))
    # The card's wording may change; data and what is said about it may not.
    assert {k: v for k, v in built.items() if k != "README.md"} == {
        k: v for k, v in expected.items() if k != "README.md"
    }
