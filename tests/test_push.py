"""`echo4o push`: what a folder is, what must not go, what the Hub may do in between, and what is said about it."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from echo4o.hub import safety, secrets
from echo4o.hub.kinds.base import PushDetails
from echo4o.hub.push import push
from echo4o.hub.recognise import recognise
from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.quickstart.run import BASE
from echo4o.testing.hub import HubFault, LoopbackHub

REPO = "ns/model"
CHECKPOINT = Path(__file__).parent / "parity" / "golden" / "checkpoint"
FAKE = {  # put together here, so that this file holds none
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an OpenAI or similar API key": "sk-" + "proj-" + "x9" * 15,
    "an AWS access key": "AKIA" + "ABCDEFGHIJKLMNOP",
    "a GitHub token": "ghp_" + "a1" * 18,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a Google API key": "AI" + "za" + "Sy4_-x9" * 5,
    "an Azure key": "aB3" * 17 + "x" + "JQ" + "QJ99BCACYeBjFXJ3w3AAABACOGabcd",
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return HfApi(endpoint=hub.url, token=hub.token)


def send(folder, api, repo: str = REPO, **options):
    return push(folder, repo, api=api, pause=0.001, **{"verify": False, **options})


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# --- what it is ------------------------------------------------------------------------------------------------------


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


# --- what must not go ------------------------------------------------------------------------------------------------


def refused(folder, api, hub, match: str, **options) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        send(folder, api, **options)
    assert not hub.repos and not [r for r in hub.requests if r[0] not in ("GET", "HEAD")], "something was sent"
    return str(caught.value)


@pytest.mark.parametrize("how", ["suffix", "protocol 0", "protocol 2", "protocol 5", "torch.save"])
def test_pickles_are_refused_by_name_and_by_content(how, folder, hub, api):
    file = folder / "transformer" / ("old.bin" if how == "suffix" else "notes.txt")
    if how == "torch.save":
        torch.save({"w": torch.zeros(2)}, file)
    elif how == "suffix":
        file.write_bytes(b"anything")
    else:
        large = b"x" * 2_000_000 if how != "protocol 0" else b""
        file.write_bytes(pickle.dumps([Path("x"), large], protocol=int(how[-1])))
    refused(folder, api, hub, rf"pickles can run code.*transformer/{file.name}")


def test_a_broken_archive_is_refused_by_name(folder, api, hub):
    (folder / "notes.txt").write_bytes(b"PK\x03\x04 and no more")
    refused(folder, api, hub, "notes.txt starts like a zip archive")


def test_text_that_ends_with_a_dot_is_no_pickle(tmp_path):
    for number, text in enumerate(["It is a text.", "(a) and (b).", "I1\n.", "", ".", "c\nd."]):
        (tmp_path / f"{number}.txt").write_text(text)
    safety.require_safe(safety.list_files(tmp_path))


@pytest.mark.parametrize("what", FAKE)
def test_secrets_are_named_by_place_and_never_shown(what, folder, hub, api):
    (folder / "notes.md").write_text(f"first\n\nkey: {FAKE[what]} and more\n")
    said = refused(folder, api, hub, rf"notes\.md, line 3: {what}")
    assert FAKE[what] not in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_secrets_are_found_in_every_encoding_of_text(encoding, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_CHUNK", chunk)
    monkeypatch.setattr(secrets, "_LONGEST", 400)
    text = "first\r\n" + "ä" * 40 + "\r\nHF_TOKEN=" + FAKE["a Hugging Face token"] + "\r\nlast"
    (tmp_path / "n.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="n.txt, line 3: a Hugging Face token") as caught:
        safety.require_safe(safety.list_files(tmp_path))
    assert FAKE["a Hugging Face token"] not in str(caught.value)
    assert str(caught.value).count("line 3") == 1


OLD_AZURE = [
    'AZURE_OPENAI_API_KEY = "' + "0a1b2c3d" * 4 + '"',
    "api-key: " + "0A1b2c3d" * 4,
    "AccountName=x;Account" + "Key=" + "aB3+" * 21 + "aB==",
    "secret abc8Q~" + "aB3." * 8 + "x",
]


@pytest.mark.parametrize("text", OLD_AZURE)
def test_azure_keys_of_every_kind(text, tmp_path):
    (tmp_path / "n.env.txt").write_text(text)
    with pytest.raises(ValueError, match="line 1: an Azure key"):
        safety.require_safe(safety.list_files(tmp_path))


def archives_of(name: str, data: bytes) -> dict[str, bytes]:
    """Archives that hold the file, by their names."""
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    packed = {f"a.tar.{kind.__name__}": kind.compress(tarred.getvalue()) for kind in (gzip, bz2, lzma)}
    return packed | {"a.zip": zipped.getvalue(), "a.tar": tarred.getvalue(), "a.dat": zipped.getvalue()}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_secrets_are_found_in_archives(encoding, tmp_path):
    text = ("a\n" * 9 + "key=" + FAKE["a Google API key"] + "\n").encode(encoding)
    files = archives_of("in/k.txt", text)
    files["two.zip"] = archives_of("a.tgz", archives_of("in/k.txt", text)["a.tar.gzip"])["a.zip"]
    files["k.txt.gz"] = gzip.compress(text)
    for name, data in files.items():
        assert list(secrets.find_secrets(name, data)) == [
            (f"{'' if name == 'k.txt.gz' else 'a.tgz, in/k.txt, ' if name == 'two.zip' else 'in/k.txt, '}line 10",
             "a Google API key")
        ], name  # fmt: skip
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"a.tar, in/k.txt, line 10") as caught:
        safety.require_safe(safety.list_files(tmp_path))
    assert len(str(caught.value).splitlines()) == 1 + len(files)


def test_archives_that_are_damaged_or_encrypted(tmp_path):
    gz = gzip.compress(b"harmless " * 1000)
    (tmp_path / "half.gz").write_bytes(gz[: len(gz) // 2])
    (tmp_path / "n.txt").write_bytes(b"BZh no archive, PK neither; AIza is a word, api-key: none")
    safety.require_safe(safety.list_files(tmp_path))
    data = bytearray(archives_of("k.txt", b"x")["a.zip"])
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    assert list(secrets.find_secrets("a.zip", bytes(data))) == [
        ("k.txt", "an encrypted file, which cannot be searched for secrets")
    ]


def test_secrets_are_found_across_chunks_in_headers_and_in_rows(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = FAKE["a Hugging Face token"]
    monkeypatch.setattr(secrets, "_CHUNK", 64)
    monkeypatch.setattr(secrets, "_LONGEST", 50)
    (tmp_path / "a.txt").write_text("line\n" * 20 + "." * 37 + " " + secret + "\n" + "x" * 300)
    save_file({"w": torch.zeros(1)}, tmp_path / "b.safetensors", {"note": secret})
    pq.write_table(pa.table({"id": ["a", "b"], "metadata": ["{}", f"key {secret}"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError) as caught:
        safety.require_safe(safety.list_files(tmp_path))
    said = str(caught.value).splitlines()[1:]
    places = ["a.txt, line 21", "b.safetensors, line 1", "c.parquet, row 1, column metadata"]
    assert [line.strip() for line in dict.fromkeys(said)] == [f"{place}: a Hugging Face token" for place in places]
    assert secret not in str(caught.value)


def test_a_secret_in_a_handwritten_card_of_the_repository_stays_there(folder, hub, api):
    hub.create(REPO).files["README.md"] = hub.store("README.md", f"mine {FAKE['a GitHub token']}\n".encode())
    hub.repo(REPO).commit("words")
    with pytest.raises(ValueError, match=r"README.md, line \d+: a GitHub token"):
        send(folder, api)


def test_links_that_lead_outside_and_hidden_files(folder, hub, api, tmp_path):
    (folder / ".env").write_text("PASSWORD=x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    messages = []
    assert not any(part.startswith(".") for part in send(folder, api, dry_run=True, log=messages.append).upload)
    assert "2 hidden files and caches are not uploaded" in messages
    (folder / "inside.txt").symlink_to(folder / "model_index.json")
    assert "inside.txt" in send(folder, api, dry_run=True).upload
    (tmp_path / "private.txt").write_text("mine")
    (folder / "outside.txt").symlink_to(tmp_path / "private.txt")
    refused(folder, api, hub, "outside.txt is a link to a file outside")
    (folder / "outside.txt").unlink()
    (folder / "outside").symlink_to(tmp_path)
    refused(folder, api, hub, "outside is a link to a file outside")


def test_folders_that_do_not_load(folder, hub, api):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "proj_in.bias"}, file)
    refused(folder, api, hub, "transformer: missing proj_in.bias")
    save_file(tensors, file)
    (folder / "transformer" / "transformer_bagel.py").unlink()
    refused(folder, api, hub, "lacks transformer/transformer_bagel.py, so it would not load with trust_remote")


def test_large_weights_are_compared_without_being_loaded(folder, api, monkeypatch):
    monkeypatch.setattr("echo4o.hub.kinds.pipeline.SMALL_BYTES", 10)
    monkeypatch.setattr("echo4o.hub.push.SMALL_BYTES", 10)
    monkeypatch.setattr(Echo4oPipeline, "from_pretrained", None)
    done = send(folder, api, verify=True)
    assert "too large to load here" in done.checked and done.verified.endswith("too large to download and load")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() > 1)
    save_file(tensors | {name: tensors[name].reshape(-1).clone()}, file)
    with pytest.raises(ValueError, match=f"vae: {name} has the shape"):
        send(folder, api)
    save_file({n: t for n, t in tensors.items() if n != name} | {"other": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=f"vae: missing {name}\n  vae: unexpected other"):
        send(folder, api)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "ns/..", "ns/two words", "ns/name.git", ""])
def test_bad_names(repo, folder, hub, api):
    refused(folder, api, hub, "repo", repo=repo)


def test_a_card_that_does_not_validate(folder, hub, api):
    (folder / "README.md").write_text("---\nlicence: mit\n---\n\nMy words.\n")
    refused(folder, api, hub, "README.md is not a valid card of this pipeline:\n  licence: unknown key")


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


def test_an_interrupted_upload_goes_on_with_what_is_missing(folder, hub, api):
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


def test_offline_is_told_at_once(folder, hub, api, monkeypatch):
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
