"""`echo4o push`: kinds of folders, errors of the Hub, interrupted uploads, adapters and results."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from echo4o.hub.kinds.base import PushDetails
from echo4o.hub.recognise import recognise
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.quickstart.run import BASE
from echo4o.testing.hub import HubFault
from tests.model_cards.test_cards import VALUES
from tests.push_fixtures import REPO, names, send

pytest_plugins = ["tests.push_fixtures"]

# --- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_pipeline_is_sent_whole_and_comes_back(folder, hub, api):
    messages = []
    done = send(folder, api, verify=True, log=messages.append)
    repo = hub.repo(REPO)
    assert repo.private and set(repo.files) == names(folder) | {"README.md"} and len(repo.commits) == 2
    assert (
        messages[0].endswith("model is a pipeline") and "it loads" in messages[1] and done.sha == repo.branches["main"]
    )
    assert done.verified == f"{len(repo.files)} files have the right hashes; it loads"
    again = send(folder, api)
    assert again.commit is None and not again.upload and len(repo.commits) == 2


def test_a_dry_run_lists_and_sends_nothing(folder, hub, api):
    plan = send(folder, api, dry_run=True)
    assert plan.upload.keys() == names(folder) | {"README.md"}
    assert plan.upload["model_index.json"] == (folder / "model_index.json").stat().st_size
    assert not hub.repos and {method for method, *_ in hub.requests} <= {"GET", "HEAD"}


def test_every_kind_is_found_by_its_files(tmp_path, folder):
    assert recognise(folder).kind.name == "pipeline"
    run = tmp_path / "run"
    shutil.copytree(folder, run / "pipeline")
    for name in ("recipe.yaml", "train_log.jsonl"):
        (run / name).touch()
    found = recognise(run)
    assert found.folder == run / "pipeline" and found.run == run and "is a training run" in found.description
    assert recognise(run / "pipeline").run == run.resolve()
    assert recognise("imagine_bench").kind.name == "metric"
    shutil.rmtree(run / "pipeline")
    with pytest.raises(ValueError, match="has not finished: run `echo4o export"):
        recognise(run)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("ema.safetensors", "echo4o convert"),
        ("dataset_info.json", "with its push_to_hub method"),
        ("part/rows.jsonl", "echo4o dataset build"),
        ("notes.txt", "a pipeline has model_index.json"),
    ],
)
def test_an_unknown_folder_is_an_error_with_advice(file, said, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=said):
        recognise(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        recognise(tmp_path / "nowhere")


# --- what the Hub may do ---------------------------------------------------------------------------------------------

TROUBLE = [
    HubFault(path="/api/repos/create", status=500, times=2),
    HubFault(path="/preupload/", status=429, headers={"Retry-After": "0"}, times=2),
    HubFault(path="/_lfs/", drop=True, times=2),
    HubFault(path="/_lfs/", method="PUT", status=503, times=2),
    HubFault(path="/commit/", method="POST", status=429, times=2),
    HubFault(path="/commit/", method="POST", lost=True),
    HubFault(path="/tree/", cut=0.5),
    HubFault(path="/resolve/", method="GET", cut=0.5, times=3),
]


@pytest.mark.parametrize("fault", TROUBLE, ids=lambda f: f"{f.path} {f.status or 'drop lost cut'}")
def test_trouble_that_passes_is_waited_out(folder, hub, api, fault):
    fault = HubFault(**vars(fault))
    hub.inject(fault)
    messages = []
    done = send(folder, api, verify="/resolve/" in fault.path, log=messages.append)
    assert fault.times == 0 and len(hub.repo(REPO).commits) == 2 and set(hub.repo(REPO).files) >= names(folder)
    assert done.sha == hub.repo(REPO).branches["main"]


def test_retries_are_logged(folder, hub, api):
    hub.inject(HubFault(path="/api/models/ns/model$", method="GET", status=500, times=20))
    messages = []
    with pytest.raises(OSError, match="ns/model: .*500.*; run the command again to resume"):
        send(folder, api, log=messages.append)
    assert any("500" in line and "trying again in" in line for line in messages)


def test_an_interrupted_upload_continues_with_what_is_missing(folder, hub, api):
    weights = sum(file.suffix == ".safetensors" for file in folder.rglob("*"))
    assert weights == 3
    hub.inject(HubFault(path="/_lfs/", method="PUT", drop=True, times=10_000, after=2))
    with pytest.raises(OSError, match="run the command again to resume"):
        send(folder, api)
    repo = hub.repo(REPO)
    assert not repo.files and len(repo.commits) == 1, "half of it is visible"
    hub.faults.clear()
    before = len(hub.requests)
    send(folder, api)
    assert len([r for r in hub.requests[before:] if r[0] == "PUT"]) == weights - 2 and len(repo.commits) == 2


def test_who_may_write(folder, hub, api, monkeypatch):
    hub.tokens["hf_read"] = "read"
    for token, repo, said in (
        ("hf_read", REPO, r"no write access \(403\): it needs the role 'write'"),
        (hub.token, "other/model", "'Write access to contents/settings of all repos' of other"),
        ("hf_wrong", REPO, r"rejects the token \(401\): run `hf auth login`"),
    ):
        with pytest.raises(OSError, match=said) as caught:
            send(folder, HfApi(endpoint=hub.url, token=token), repo=repo)
        assert "\n" not in str(caught.value) and token not in str(caught.value)
    monkeypatch.setattr("echo4o.hub.remote.get_token", lambda: None)
    with pytest.raises(OSError, match="not logged in: run `hf auth login`, or set HF_TOKEN"):
        send(folder, HfApi(endpoint=hub.url))
    assert not hub.repos


@pytest.mark.long
def test_a_revision_that_moved_is_not_written_over(folder, hub, api):
    send(folder, api)
    repo = hub.repo(REPO)

    def somebody_else():
        repo.files["theirs.txt"] = hub.store("theirs.txt", b"theirs")
        repo.commit("theirs")

    (folder / "more.txt").write_text("more")
    hub.inject(HubFault(path="/commit/", method="POST", meanwhile=somebody_else))
    with pytest.raises(OSError, match=r"the repository changed since this push began \(412\)"):
        send(folder, api)
    assert "more.txt" not in repo.files
    send(folder, api)
    assert {"more.txt", "theirs.txt"} <= set(repo.files), "a second run looks at what is there now"


def test_offline_is_reported_at_once(folder, hub, api, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set, and a push needs the Hub"):
        send(folder, api)


def test_a_name_that_is_taken(folder, hub, api):
    other = hub.create(REPO)
    other.files |= {name: hub.store(name, b"{}") for name in ("config.json", "model.onnx", ".gitattributes")}
    other.commit("something else")
    with pytest.raises(ValueError, match="already holds files that echo4o did not write, and this is a pipeline"):
        send(folder, api)
    send(folder, api, overwrite=True)
    assert set(other.files) == names(folder) | {"README.md", ".gitattributes"}
    hub.create(REPO, "datasets")  # the Hub keeps a model and a dataset of one name apart
    assert send(folder, api).commit is None
    app = hub.create("ns/genevalpp", "spaces")
    app.files |= {name: hub.store(name, b"print()") for name in ("app.py", "requirements.txt")}
    hub.repo("ns/genevalpp", "spaces").commit("an app")
    with pytest.raises(ValueError, match="this is a metric: choose another name, or pass --overwrite"):
        send("genevalpp", api, repo="ns/genevalpp")
    with pytest.raises(ValueError, match="the Space must have the name of its script, genevalpp"):
        send("genevalpp", api, repo="ns/other")


def test_weights_of_an_earlier_version_go_and_other_files_stay(folder, hub, api):
    send(folder, api)
    repo = hub.repo(REPO)
    stale = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    repo.files |= {stale: hub.store(stale, b"old"), "NOTES.md": hub.store("NOTES.md", b"mine")}
    repo.commit("older")
    done = send(folder, api)
    assert done.delete == [stale] and stale not in repo.files and "NOTES.md" in repo.files


@pytest.mark.long
def test_a_branch_is_made_from_main_and_main_stays(folder, hub, api):
    send(folder, api)
    before = hub.repo(REPO).branches["main"]
    (folder / "more.txt").write_text("more")
    done = send(folder, api, branch="trial", message="A trial", verify=True)
    repo = hub.repo(REPO)
    assert repo.branches == {"main": before, "trial": done.sha} and "more.txt" not in repo.at("main")
    assert "more.txt" in repo.at("trial") and repo.commits[-1][1] == "A trial"
    assert send(folder, api, branch="trial").commit is None
    first = send(folder, api, repo="ns/new", branch="trial")
    assert hub.repo("ns/new").at("trial").keys() >= names(folder) and first.sha == hub.repo("ns/new").branches["trial"]


def test_what_comes_back_altered_is_an_error(folder, hub, api):
    def alter():
        repo = hub.repo(REPO)
        sha, title, files = repo.commits[-1]
        repo.commits[-1] = (sha, title, files | {"pipeline.py": hub.store("pipeline.py", b"other")})

    hub.inject(HubFault(path="/revision/", method="GET", meanwhile=alter))
    with pytest.raises(OSError, match="differs from the upload: pipeline.py; push again"):
        send(folder, api, verify=True)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    from peft import LoraConfig

    from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel

    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    pipeline = Echo4oPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=BagelTransformer2DModel._lora_targets["gen"])
    )
    pipeline.save_lora_adapter(folder)
    return folder


@pytest.mark.long
def test_an_adapter_needs_the_base_it_fits(adapter, folder, hub, api):
    with pytest.raises(ValueError, match="names its base model: pass its Hub repository"):
        send(adapter, api)
    with pytest.raises(ValueError, match="there is no model ns/nowhere on the Hub"):
        send(adapter, api, details=PushDetails(base_model="ns/nowhere"))
    hub.add_folder("ns/base", BASE)
    hub.add_folder("ns/other", folder)
    with pytest.raises(ValueError, match="adapter"):
        send(adapter, api, details=PushDetails(base_model="ns/other"))
    hub.create("ns/empty")
    with pytest.raises(ValueError, match="the base model ns/empty is not a pipeline"):
        send(adapter, api, details=PushDetails(base_model="ns/empty"))
    with pytest.raises(ValueError, match="there is no dataset ns/base on the Hub"):
        send(adapter, api, details=PushDetails(base_model="ns/base", datasets=("ns/base",)))
    done = send(adapter, api, details=PushDetails(base_model="ns/base"), verify=True)
    assert done.verified.endswith("it loads on ns/base")
    card = hub.repo(REPO).files["README.md"].data.decode()
    assert "base_model: ns/base" in card and "rank 2 (alpha 4" in card


def test_on_a_large_base_an_adapter_is_compared_without_loading_it(adapter, folder, hub, api, monkeypatch):
    hub.add_folder("ns/base", BASE)
    hub.add_folder("ns/other", folder)
    monkeypatch.setattr("echo4o.hub.kinds.adapter.SMALL_BYTES", 10)
    monkeypatch.setattr(Echo4oPipeline, "from_pretrained", None)
    done = send(adapter, api, details=PushDetails(base_model="ns/base"))
    assert done.checked == "every matrix fits ns/base, which is too large to load here"
    assert not [path for _, path, *_ in hub.requests if "ns/base/resolve" in path and path.endswith(".safetensors")]
    with pytest.raises(ValueError, match="The adapter"):
        send(adapter, api, details=PushDetails(base_model="ns/other"))


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_result_is_published_in_both_forms(folder, api, hub, tmp_path):
    values = VALUES | {"model": str(folder), "adapter": None}
    (tmp_path / "result.json").write_text(json.dumps(values))
    datasets = ("genevalpp=owner/genevalpp",)
    send(folder, api, details=PushDetails(results=(tmp_path / "result.json",), benchmark_datasets=datasets))
    (files,) = [repo.files for repo in hub.repos.values() if ".eval_results/genevalpp.yaml" in repo.files]
    assert b"value: 0.5" in files[".eval_results/genevalpp.yaml"].data
    assert b"model-index" in files["README.md"].data


def test_results_of_another_model_stay_out_of_the_card(folder, api, tmp_path):
    values = {"benchmark": "genevalpp", "score": 0.5, "coverage": 1.0, "intervals": {}, "model": "elsewhere/other"}
    (tmp_path / "result.json").write_text(json.dumps(values | {"adapter": None}))
    details = PushDetails(results=(tmp_path / "result.json",))
    with pytest.raises(ValueError, match="generated with elsewhere/other, not with"):
        send(folder, api, details=details)
    (tmp_path / "result.json").write_text(json.dumps(values | {"model": str(folder), "adapter": "mine"}))
    with pytest.raises(ValueError, match="with the adapter mine, not with"):
        send(folder, api, details=details)
    with pytest.raises(ValueError, match="is not a result: run `echo4o evaluate score"):
        send(folder, api, details=PushDetails(results=(tmp_path / "nothing",)))
