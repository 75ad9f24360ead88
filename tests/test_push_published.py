"""The whole way: from the quickstart's run to the Hub as docs/publishing.md shows it, and from there to those who load it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from echo4o.model_cards.merge import split
from echo4o.model_cards.schema import usage_blocks, validate
from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.quickstart import run as quickstart
from echo4o.testing.hub import HubFault, LoopbackHub
from echo4o.testing.processes import run_script

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "publishing.md").read_text("utf-8")
CHECKPOINT = ROOT / "tests" / "parity" / "golden" / "checkpoint"
EXAMPLE = re.compile(r"^<!-- test -->\n```(bash|python)\n(.*?)^```$", re.M | re.S)
FEW = quickstart.QuickstartSize(
    {"surreal_fantasy": 10, "multi_reference": 10, "instruction_following": 20},
    1,
    2,
    {"steps": 2, "batch_size": 8, "optimizer.warmup_steps": 1, "validation.share": 0.2},
)
KINDS = {
    ("models", "owner/shapes"): "pipeline",
    ("models", "owner/shapes-again"): "pipeline",
    ("models", "owner/shapes-lora"): "adapter",
    ("datasets", "owner/shapes-4o"): "dataset",
    ("datasets", "owner/shapes-scores"): "results",
    ("spaces", "owner/genevalpp"): "metric",
}


class Place:
    """A folder with a quickstart's run in it, and a Hub where the page's examples were run."""

    def __init__(self, root: Path, hub: LoopbackHub):
        self.root, self.hub = root, hub

    def environment(self, home: str) -> dict[str, str]:
        (self.root / home).mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return self.hub.environment(self.root / home) | {"PATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.root, env=self.environment("home"), capture_output=True, text=True, errors="replace"
        )

    def push(self, *arguments: str) -> str:
        done = self.run("echo4o", "push", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def card(self, name: str, kind: str = "models") -> str:
        return self.hub.repo(name, kind).files["README.md"].data.decode()

    def files(self, name: str, kind: str = "models") -> dict[str, str]:
        return {path: file.oid for path, file in self.hub.repo(name, kind).files.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "SHORT", FEW)
        quickstart.run(root / "quickstart", short=True)
    with LoopbackHub(user="owner") as hub:
        place = Place(root, hub)
        for language, code in EXAMPLE.findall(DOCS):
            start = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
            done = place.run(*start, code)
            assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        yield place


def test_one_command_each_and_the_cards_validate(place):
    assert set(place.hub.repos) == set(KINDS)
    for (kind, name), what in KINDS.items():
        repo = place.hub.repo(name, kind)
        assert repo.private == (name != "owner/genevalpp") and len(repo.commits) == 2
        card = place.card(name, kind)
        validate(card, what)
        assert str(place.root) not in card and "None" not in card.replace("`None`", "") and "{{" not in card
        for file in repo.files.values():
            assert str(place.root).encode() not in file.data, "a path of this machine"


def test_what_the_cards_say_comes_from_the_files(place):
    data, text = split(place.card("owner/shapes"))
    assert data["model-index"][0]["results"][0]["metrics"][0]["args"]["coverage"] == 1.0
    assert len(data["widget"]) == 4 and all(w["output"]["url"] in place.files("owner/shapes") for w in data["widget"])
    assert "2 optimizer steps over 16 samples" in text and "`dataset`, 40 rows. Small images" in text
    assert "do not come from a model of OpenAI" in text and "base_model" not in data and "datasets" not in data
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["optimizer"]["name"] == "muon" and recipe["model"] == "base" and "output_dir" not in recipe
    again, text = split(place.card("owner/shapes-again"))
    assert "## Training" not in text and "## Evaluation" not in text and again["datasets"] == ["owner/shapes-4o"]
    data, text = split(place.card("owner/shapes-lora"))
    assert (data["base_model"], data["base_model_relation"]) == ("owner/shapes", "adapter")
    assert data["datasets"] == ["owner/shapes-4o"] and "LoRA of rank 32 on the generation expert" in text


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=lambda value: value)
def test_usage_sections_run_as_pasted(kind, name, place):
    blocks = usage_blocks(split(place.card(name, kind))[1])
    assert len(blocks) == (2 if kind == "models" else 1)
    for block in blocks:
        # Only what imports the package may need it: the rest runs on a bare machine, in a fresh cache.
        hidden = [] if "echo4o import" in block else ["echo4o"]
        home = f"home-{name.split('/')[1]}-{'bare' if hidden else 'package'}"
        run_script(block, env=place.environment(home), hide=hidden)


LOADED = """
import sys, torch
(mode, sha) = sys.argv[1:]
if mode == "bare":
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("owner/pinned", revision=sha, trust_remote_code=True)
else:
    from echo4o import Echo4oPipeline
    pipe = Echo4oPipeline.from_pretrained("owner/pinned", revision=sha)
assert pipe.transformer.dtype == torch.bfloat16
pipe("three squares", num_inference_steps=1).images[0].load()
"""


def test_a_pinned_revision_loads_bare_and_with_the_package(place):
    place.push("quickstart/pipeline", "owner/pinned", "--no-verify")
    repo = place.hub.repo("owner/pinned")
    sha = repo.branches["main"]
    repo.files = {"model_index.json": place.hub.store("model_index.json", b"{}")}
    repo.commit("broken")
    run_script(LOADED, "bare", sha, env=place.environment("home-pinned-bare"), hide=["echo4o"])
    run_script(LOADED, "package", sha, env=place.environment("home-pinned-package"))


def test_all_ways_give_the_same_repositories(place):
    shutil.copytree(place.root / "quickstart/pipeline", place.root / "copy")  # away from the run that made it
    place.push("copy", "owner/from-folder", "--no-verify")
    script = """
        from echo4o import Echo4oPipeline
        pipe = Echo4oPipeline.from_pretrained("copy")
        pipe.push_to_hub("owner/from-python", verify=False)
        pipe.save_pretrained("saved", push_to_hub=True, repo_id="owner/from-saving")
    """
    done = place.run(sys.executable, "-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    place.push("quickstart", "owner/from-run", "--no-verify")
    place.push("quickstart/pipeline", "owner/from-export", "--no-verify")
    done = place.run("echo4o", "dataset", "publish", "quickstart/dataset", "owner/rows-again")
    assert done.returncode == 0, done.stderr

    def same(first: str, second: str, kind: str = "models") -> bool:
        one, two = place.files(first, kind), place.files(second, kind)
        cards = [place.card(name, kind).replace(name.split("/")[1], "X") for name in (first, second)]
        return {**one, "README.md": cards[0]} == {**two, "README.md": cards[1]}

    assert same("owner/from-folder", "owner/from-python") and same("owner/from-folder", "owner/from-saving")
    assert same("owner/from-run", "owner/from-export")
    assert same("owner/rows-again", "owner/shapes-4o", "datasets")
    assert not same("owner/from-folder", "owner/from-run"), "the run's card says how it was trained"


DATASETS_OWN = """
import sys
from datasets import load_dataset
for name in ("surreal_fantasy", "multi_reference", "instruction_following"):
    rows = load_dataset(sys.argv[1], name, split="train")
    rows.push_to_hub("owner/by-datasets", name, data_dir=f"data/{name}", private=True)
    ours, theirs = (load_dataset(repo, name, split="train") for repo in ("owner/shapes-4o", "owner/by-datasets"))
    assert ours.features == theirs.features and ours["id"] == theirs["id"] and ours["metadata"] == theirs["metadata"]
    assert [p.tobytes() for p in ours["image"]] == [p.tobytes() for p in theirs["image"]]
    streamed = load_dataset("owner/shapes-4o", name, split="train", streaming=True)
    assert [row["id"] for row in streamed] == ours["id"][:]
assert "echo4o" not in sys.modules
"""


def test_the_library_s_own_push_of_the_rows_is_the_same_dataset(place):
    run_script(DATASETS_OWN, place.root / "quickstart/dataset", env=place.environment("home-datasets"))
    cards = [split(place.card(name, "datasets"))[0] for name in ("owner/shapes-4o", "owner/by-datasets")]
    configs = [{c["config_name"]: c["data_files"] for c in card["configs"]} for card in cards]
    del configs[0]["all"]  # the same files under one more name
    assert configs[0] == configs[1]
    infos = [{i["config_name"]: i for i in card["dataset_info"]} for card in cards]
    for name, theirs in infos[1].items():
        assert infos[0][name]["features"] == theirs["features"]
        rows = [[(s["name"], s["num_examples"]) for s in i[name]["splits"]] for i in infos]
        assert rows[0] == rows[1]
    # `datasets` also counts the shards in their names.
    ours, theirs = (
        {re.sub(r"-of-\d+", "", f) for f in place.files(name, "datasets") if f.startswith("data/")}
        for name in ("owner/shapes-4o", "owner/by-datasets")
    )
    assert ours == theirs


METRIC = """
import evaluate
import sys
metric = evaluate.load(sys.argv[1])
print(metric.compute(correct=[1], tags=["counting"])["score"])
"""


def test_a_changed_metric_is_what_evaluate_loads(place):
    folder = place.root / "genevalpp"
    metric = Path(quickstart.__file__).parents[1] / "evaluation" / "metrics" / "genevalpp"
    shutil.copytree(metric, folder, ignore=shutil.ignore_patterns("__pycache__"))
    formula = folder / "formula.py"
    formula.write_text(formula.read_text().replace("return float(correct)", "return 0.25 * float(correct)"))
    home = place.environment("home-metric")
    assert run_script(METRIC, "owner/genevalpp", env=home, hide=["echo4o"]).stdout.strip() == "1.0"
    place.push(str(folder), "owner/genevalpp")
    home = place.environment("home-metric-changed")
    assert run_script(METRIC, "owner/genevalpp", env=home, hide=["echo4o"]).stdout.strip() == "0.25"


def test_a_killed_run_continues(tmp_path):
    convert_to_diffusers(CHECKPOINT, tmp_path / "model")
    with LoopbackHub(user="owner") as hub:
        place = Place(tmp_path, hub)
        hub.inject(HubFault(path="/_lfs/", method="PUT", delay=60, after=1, times=100))
        command = ["echo4o", "push", "model", "owner/killed", "--no-verify"]
        process = subprocess.Popen(command, cwd=tmp_path, env=place.environment("home"), stderr=subprocess.DEVNULL)
        while not hub.blobs and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        hub.faults.clear()
        arrived, before = len(hub.blobs), len(hub.requests)
        assert arrived == 1 and not hub.repo("owner/killed").files, "something is half visible"
        place.push(*command[2:])
        assert len([r for r in hub.requests[before:] if r[0] == "PUT"]) == 3 - arrived
        assert {"model_index.json", "README.md"} <= set(hub.repo("owner/killed").files)


def test_mistakes_are_one_line(place):
    for arguments, said in (
        (("nowhere", "owner/x"), "there is no such folder"),
        (("quickstart", "x"), "write owner/name"),
        (("runs/lora", "owner/x"), "--base-model owner/name"),
        (("quickstart", "other/x"), "the token has no write access (403)"),
    ):
        done = place.run("echo4o", "push", *arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
