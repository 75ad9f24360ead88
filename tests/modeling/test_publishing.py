"""What is published beside a pipeline's weights: a closed list of files, equal to the package's but for their imports."""

import json
import logging
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel

import echo4o.modeling
from echo4o.modeling.common.publishing import published_name, relative_imports
from echo4o.modeling.pipelines import PIPELINES

ROOT = Path(echo4o.modeling.__file__).parent
PARITY = Path(__file__).parents[1] / "parity"
GOLDENS = {
    "Echo4oPipeline": PARITY / "golden",
    "OmniGen2Pipeline": PARITY / "golden_omnigen2",
    "Blip3oPipeline": PARITY / "golden_blip3o",
}
# As diffusers finds what it copies (dynamic_modules_utils.get_relative_imports).
COPIED = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.M)


@pytest.fixture(params=PIPELINES)
def cls(request) -> type:
    return getattr(import_module(PIPELINES[request.param]), request.param)


def file_of(cls: type, module: str) -> Path:
    """The package's file of a module, named as in `_published_modules`."""
    name = import_module(module, cls.__module__.rpartition(".")[0]).__name__
    return ROOT.joinpath(*name.split(".")[2:]).with_suffix(".py")


def test_the_list_is_what_the_pipeline_imports_and_nothing_else(cls):
    found, waiting = set(), [Path(import_module(cls.__module__).__file__)]
    while waiting:
        file = waiting.pop()
        for module in relative_imports(file.read_text("utf-8")):
            # A module of common/ names its neighbours as ".x".
            module = module if file.parent.name != "common" else f"..common{module}"
            if module not in found:
                found.add(module)
                waiting.append(file_of(cls, module))
    assert sorted(cls._published_modules) == sorted(found)
    names = [published_name(module) for module in cls._published_modules]
    assert len(set(names)) == len(names) and "pipeline.py" not in names


def test_only_the_imports_from_common_are_rewritten(cls):
    """diffusers copies the files that the text of pipeline.py imports: all of them."""
    sources = cls._published_sources
    assert set(COPIED.findall(sources["pipeline.py"])) == {name[:-3] for name in sources.keys() - {"pipeline.py"}}
    files = {"pipeline.py": Path(import_module(cls.__module__).__file__)}
    files |= {published_name(module): file_of(cls, module) for module in cls._published_modules}
    assert files.keys() == sources.keys()
    for name, file in files.items():
        ours, published = file.read_text("utf-8").splitlines(), sources[name].splitlines()
        assert [line for line in published if line.lstrip().startswith("from ..")] == []
        for mine, theirs in zip(ours, published):
            is_common = mine.startswith("from ..common.")
            assert theirs == (mine.replace("from ..common.", "from .") if is_common else mine)
        # Nothing is added but, at the end of pipeline.py, the modules that only its siblings import.
        added = published[len(ours) :]
        assert bool(added) == (name == "pipeline.py")
        assert all(re.fullmatch(r"|# .*|if False:|    from \.\w+ import \*", line) for line in added)


@pytest.mark.parametrize("how", ["converted", "saved"])
def test_auto_model_of_diffusers_loads_a_components_folder(cls, tmp_path, how, caplog, monkeypatch):
    """By the `auto_map` of its config.json, with the code beside it; dtype and weights are those of the folder."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    convert = import_module(".convert", cls.__module__.rpartition(".")[0])
    convert.convert_to_diffusers(GOLDENS[cls.__name__] / "checkpoint", tmp_path / "converted")
    pipe = cls.from_pretrained(tmp_path / "converted", dtype=torch.bfloat16 if how == "saved" else None)
    if how == "saved":
        pipe.save_pretrained(tmp_path / "saved")
    own = {name: part for name, part in pipe.components.items() if type(part).__module__.startswith("echo4o.")}
    assert "transformer" in own
    for name, component in own.items():
        config = json.loads((tmp_path / how / name / "config.json").read_text("utf-8"))
        stem = type(component).__module__.rpartition(".")[2]
        assert config["auto_map"] == {"AutoModel": f"{stem}.{type(component).__name__}"}
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(str(tmp_path / how / name))
        loaded = AutoModel.from_pretrained(str(tmp_path / how / name), trust_remote_code=True)
        assert type(loaded).__name__ == type(component).__name__ and loaded.dtype == component.dtype
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in component.state_dict().items())
    assert "auto_map" not in caplog.text


@pytest.mark.parametrize("saved", [False, True])
def test_the_way_back_to_the_released_layout_has_no_auto_map(cls, tmp_path, saved):
    package, golden = cls.__module__.rpartition(".")[0], GOLDENS[cls.__name__] / "checkpoint"
    convert = import_module(".convert", package)
    convert.convert_to_diffusers(golden, tmp_path / "ours")
    if saved:
        cls.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "saved")
        if (tmp_path / "ours" / "original").is_dir():
            shutil.copytree(tmp_path / "ours" / "original", tmp_path / "saved" / "original", dirs_exist_ok=True)
    convert.convert_to_original(tmp_path / ("saved" if saved else "ours"), tmp_path / "back")
    written = sorted((tmp_path / "back").rglob("*.json"))
    assert written and not [file for file in written if "auto_map" in json.loads(file.read_text("utf-8"))]
    if not saved:
        assert not [
            file
            for file in written
            if file.read_bytes() != (golden / file.relative_to(tmp_path / "back")).read_bytes()
        ]


FROM_HUB = """
import sys
import torch
from diffusers import AutoModel
from huggingface_hub import snapshot_download

for name in ("transformer", "vision_model"):
    folder = snapshot_download("ns/model", allow_patterns=f"{name}/*")
    model = AutoModel.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    assert type(model).__module__.startswith("diffusers_modules.local"), type(model)
    print(type(model).__name__, model.dtype, model.state_dict()[sys.argv[1] if name == "transformer" else sys.argv[2]].sum().item())
assert AutoModel.from_pretrained("ns/model", subfolder="vae").config.latent_channels
for name in ("transformer", "vision_model"):
    try:
        AutoModel.from_pretrained("ns/model", subfolder=name, trust_remote_code=True)
    except ValueError as error:
        assert "does not appear to have any custom code" in str(error), error
    else:
        raise AssertionError("diffusers reads the auto_map of a subfolder now: update docs/generating.md")
"""


@pytest.mark.long
def test_auto_model_of_diffusers_loads_components_from_the_hub(tmp_path):
    """As docs/generating.md says. With `subfolder`, diffusers 0.42 looks for the `auto_map` in model_index.json, which
    can name one class for all components."""
    from echo4o.modeling.bagel.convert import convert_to_diffusers
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
    from echo4o.testing.hub import LoopbackHub
    from echo4o.testing.processes import run_script

    from .conftest import GOLDEN

    convert_to_diffusers(GOLDEN / "checkpoint", tmp_path / "model")
    pipe = Echo4oPipeline.from_pretrained(tmp_path / "model")
    (tmp_path / "home").mkdir()
    names = "proj_in.weight", "connector.fc1.weight"
    with LoopbackHub() as hub:
        hub.add_folder("ns/model", tmp_path / "model")
        printed = run_script(FROM_HUB, *names, env=hub.environment(tmp_path / "home"), hide=["echo4o"]).stdout
    expected = [
        f"{type(model).__name__} {model.dtype} {model.state_dict()[name].sum().item()}"
        for model, name in zip((pipe.transformer, pipe.vision_model), names)
    ]
    assert [line for line in printed.split("\n") if line.startswith("Bagel")] == expected
