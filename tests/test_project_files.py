"""The files around the code: workflows run commands that exist, and versions agree."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import echo4o
from tests.test_package import PROJECT, ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.M))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_commands_that_exist(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}, "a job asks for more where it needs it"
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step.get("uses", "actions/checkout@v4"))
        command = step.get("run", "")
        if command.startswith("make "):
            assert command.split()[1] in TARGETS, command
        else:
            assert not command or command.startswith("gh release create"), command
        for file in re.findall(r"(?:tests|docs|\.ci)/[\w./-]+", command):
            assert (ROOT / file).exists(), file


def test_the_workflows_do_what_was_promised():
    assert {path.stem for path in WORKFLOWS} == {"checks", "docs", "libraries", "release"}
    checks, release = (read(GITHUB / "workflows" / f"{name}.yml") for name in ("checks", "release"))
    pythons = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert checks["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons
    # YAML 1.1 reads the key `on` as true.
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "schedule" in read(GITHUB / "workflows" / "libraries.yml")[True]


def test_run_monitored_paths_exist():
    for path in WORKFLOWS:
        for event in read(path)[True].values():
            for watched in (event or {}).get("paths", []) if isinstance(event, dict) else []:
                assert (ROOT / watched.removesuffix("/**")).exists(), f"{path.name}: {watched}"


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_complete(name):
    form = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all("label" in field["attributes"] for field in form["body"])


def test_versions_agree():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and str(citation["version"]) == echo4o.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.M)
    assert len(sections) == len(re.findall("^## ", changelog, re.M)), "every section has a version and a date"
    assert echo4o.__version__ in [version for version, _ in sections]
    assert [date for _, date in sections[1:]].count("unreleased") == 0


def load_build_dist():
    spec = importlib.util.spec_from_file_location("build_dist", ROOT / ".ci" / "build_dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tag_names_the_version():
    problems = load_build_dist().check_tag("v9.9.9")
    assert problems[0] == f"the tag is v9.9.9, the version {echo4o.__version__}"


def test_a_released_version_is_dated_and_cited(tmp_path, monkeypatch):
    module = load_build_dist()
    (tmp_path / "echo4o").mkdir()
    (tmp_path / "echo4o" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.2\n")
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3 (unreleased)\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert len(module.check_tag("v1.2.3")) == 2
    (tmp_path / "CITATION.cff").write_text("version: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3 (2027-01-31)\n")
    assert module.check_tag("v1.2.3") == []
