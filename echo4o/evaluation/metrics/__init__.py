"""Metrics for `evaluate.load(path)`; each folder is complete and can be published as a Space (see `publish`)."""

from pathlib import Path

METRICS = ("genevalpp", "imagine_bench", "omnicontext")


def metric_path(name: str) -> str:
    """The folder to give to `evaluate.load`."""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; known are {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)


def publish(name: str, repo_id: str, private: bool = False) -> str:
    """Upload a metric as a Gradio Space and tag it for the installed `evaluate`; returns the Space's address."""
    import evaluate
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    folder = metric_path(name)
    # evaluate.load("ns/metric") asks for metric.py
    if repo_id.split("/")[-1] != name:
        raise ValueError(f"{repo_id}: the Space must be called {name}, as its script is")
    address = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix in (".py", ".md")}
    del files["__init__.py"]
    files["requirements.txt"] = f"evaluate=={evaluate.__version__}\ndatasets\n".encode()
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in sorted(files.items())],
        commit_message=f"The metric {name}",
        repo_type="space",
    )
    tag = f"v{evaluate.__version__}"
    api.create_tag(repo_id, repo_type="space", tag=tag, revision=commit.oid, exist_ok=True)
    return str(address)
