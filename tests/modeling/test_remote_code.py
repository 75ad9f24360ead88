"""The published folder where the package cannot be imported, and both modes through a Hub."""

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.testing.hub import HubFault, LoopbackHub
from echo4o.testing.processes import offline_environment, run_script

from .test_loading import CHECKPOINT, draw, files_of, same

DRAW = inspect.getsource(draw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The golden checkpoint as a pipeline folder, float32."""
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def picture(folder) -> np.ndarray:
    return draw(Echo4oPipeline.from_pretrained(folder))


def test_remote_code_needs_to_be_trusted(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)


def test_a_device_map_of_a_pipeline_needs_the_package(folder):
    """As docs/memory.md says: diffusers 0.42 does not hand trust_remote_code on when it measures the components."""
    with pytest.raises(ValueError, match="contains custom code"):
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, device_map="balanced")
    assert Echo4oPipeline.from_pretrained(folder, device_map="balanced").transformer.dtype == torch.float32


REMOTE_FOLDER = (
    DRAW
    + """
import pathlib, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
source, target = sys.argv[1:]
try:
    import echo4o
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, dtype=torch.bfloat16)
assert type(pipe).__module__ == "diffusers_modules.local.pipeline", type(pipe)
pipe.save_pretrained(target + "/bfloat16")
stored = DiffusionPipeline.from_pretrained(target + "/bfloat16", trust_remote_code=True)
# Without being asked: float32 would double the release's 28 GB. The VAE is small, and diffusers' own.
dtypes = [getattr(stored, name).dtype for name in ("transformer", "vision_model", "vae")]
assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32], dtypes
shared = type(stored).from_pipe(stored)
assert shared.transformer is stored.transformer
# Weights that were changed on purpose are nobody's damage.
stored.transformer.proj_in.weight.data[0, 0] = float("nan")
type(stored)(**stored.components)

import shutil
from safetensors.torch import load_file, save_file
for component, name in (("transformer", "proj_in.bias"), ("vision_model", "connector.fc1.bias"), ("vae", "decoder.conv_in.bias")):
    for damage in ("missing", "unexpected", "non-finite values in"):
        shutil.rmtree(target + "/damaged", ignore_errors=True)
        shutil.copytree(source, target + "/damaged")
        file = f"{target}/damaged/{component}/diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        word = name
        if damage == "missing":
            del tensors[name]
        elif damage == "unexpected":
            word = "more.bias"
            tensors[word] = torch.zeros(2)
        else:
            tensors[name][0] = float("nan")
        save_file(tensors, file, {"format": "pt"})
        try:
            DiffusionPipeline.from_pretrained(target + "/damaged", trust_remote_code=True)
        except ValueError as error:
            assert f"{component}: {damage} {word}" in str(error), error
        else:
            raise AssertionError(f"{component}: {damage}")
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
try:
    type(pipe).from_original(source)
except RuntimeError as error:
    assert "needs the echo4o package" in str(error)
# The next repository that is loaded overwrites the modules; what is saved must still be this pipeline's own code.
from diffusers.utils.constants import HF_MODULES_CACHE
cached = [p for p in pathlib.Path(HF_MODULES_CACHE).rglob("*.py") if p.stat().st_size]
assert len(cached) >= 20
for path in cached:
    path.write_text("raise RuntimeError('the code of another repository')")
pipe.save_pretrained(target + "/saved")
again = DiffusionPipeline.from_pretrained(target + "/saved", trust_remote_code=True)
np.savez(target + "/drawn.npz", first=draw(pipe), again=draw(again))
"""
)


@pytest.mark.long
def test_remote_code_from_a_folder(folder, picture, tmp_path):
    (tmp_path / "home").mkdir()
    env = offline_environment(tmp_path / "home")
    run_script(REMOTE_FOLDER, folder, tmp_path, env=env, hide=["echo4o"])
    drawn = np.load(tmp_path / "drawn.npz")
    assert same(drawn["first"], picture) and same(drawn["again"], picture)
    saved = files_of(tmp_path / "saved")
    assert {n: t for n, t in saved.items() if n.endswith((".py", "model_index.json"))} == {
        n: t for n, t in files_of(folder).items() if n.endswith((".py", "model_index.json"))
    }
    assert same(draw(Echo4oPipeline.from_pretrained(tmp_path / "saved")), picture)
    assert Echo4oPipeline.from_pretrained(tmp_path / "bfloat16").transformer.dtype == torch.bfloat16


PACKAGE_HUB = (
    DRAW
    + """
import sys
import numpy as np
import torch
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
target, pinned = sys.argv[1:]
for source, error, words in (
    ("ns/nothing", Exception, "404"),
    ("ns/no-pipeline", FileNotFoundError, "not a pipeline"),
    ("ns/pickled", FileNotFoundError, "no .safetensors weights"),
):
    try:
        Echo4oPipeline.from_pretrained(source)
    except error as caught:
        import re
        assert re.search(words, str(caught)), caught
    else:
        raise AssertionError(source)
pipe = Echo4oPipeline.from_pretrained("ns/published", revision=pinned)
assert type(pipe) is Echo4oPipeline and pipe.config._name_or_path == "ns/published"
np.savez(target + "/package.npz", drawn=draw(pipe))
half = pipe.to(dtype=torch.bfloat16)
half.push_to_hub("ns/from-package")
again = Echo4oPipeline.from_pretrained("ns/from-package")
assert again.transformer.dtype == torch.bfloat16
"""
)

REMOTE_HUB = (
    DRAW
    + """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
(target,) = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained("ns/published", trust_remote_code=True)
np.savez(target + "/remote.npz", drawn=draw(pipe))
half = DiffusionPipeline.from_pretrained("ns/from-package", trust_remote_code=True, dtype=torch.bfloat16)
half.push_to_hub("ns/from-remote")
again = DiffusionPipeline.from_pretrained("ns/from-remote", trust_remote_code=True, dtype=torch.bfloat16)
a, b = half.transformer.state_dict(), again.transformer.state_dict()
assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
"""
)


@pytest.mark.long
def test_hub_in_both_modes(folder, picture, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    for file in pickled.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/README.md").write_text("no pipeline")
    for home in ("home1", "home2"):
        (tmp_path / home).mkdir()
    with LoopbackHub() as hub:
        pinned = hub.add_folder("ns/published", folder)
        hub.add_folder("ns/no-pipeline", tmp_path / "other")
        hub.add_folder("ns/pickled", pickled)
        hub.inject(HubFault(path="ns/published/resolve/.*diffusion_pytorch_model", method="GET", cut=0.5))
        run_script(PACKAGE_HUB, tmp_path, pinned, env=hub.environment(tmp_path / "home1"))
        assert hub.faults[0].times == 0, "the broken download did not happen"
        assert not [r for r in hub.requests if r[0] == "GET" and r[1].endswith(".bin")], "pickles were fetched"
        run_script(REMOTE_HUB, tmp_path, env=hub.environment(tmp_path / "home2"), hide=["echo4o"])
        uploads = {name: hub.repo(f"ns/{name}").files for name in ("from-package", "from-remote")}
    assert same(np.load(tmp_path / "package.npz")["drawn"], picture)
    assert same(np.load(tmp_path / "remote.npz")["drawn"], picture)
    remade = {"tokenizer/vocab.json", "tokenizer/merges.txt"}  # transformers writes their content to tokenizer.json
    expected = {n for n in files_of(folder) if not n.startswith("original/")} - remade
    assert all(expected <= files.keys() for files in uploads.values())
    index = (folder / "model_index.json").read_bytes()
    assert all(files["model_index.json"].data == index for files in uploads.values())
    first, second = ({n: f.oid for n, f in files.items()} for files in uploads.values())
    assert first == second


REMOTE_LORA = (
    DRAW
    + """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
folder, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
drawn = {"base": draw(pipe)}
for name in ("ns/lora", "ns/peft"):
    pipe.load_lora_weights(name, adapter_name=name.replace("/", "-"))
    drawn[name] = draw(pipe)
pipe.set_adapters("ns-lora")
drawn["half"] = draw(pipe, attention_kwargs={"scale": 0.5})
pipe.save_lora_adapter(target + "/saved", "ns-lora")
for source, words in (("ns/pickled", "holds pickled weights"), ("ns/two", "several adapters"), ("ns/empty", "no adapter")):
    try:
        pipe.load_lora_weights(source)
    except (ValueError, FileNotFoundError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(source)
pipe.load_lora_weights("ns/two", weight_name="b.safetensors", adapter_name="b")
drawn["named"] = draw(pipe)
pipe.unload_lora_weights()
drawn["unloaded"] = draw(pipe)
from peft import LoraConfig
pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=pipe.lora_targets["both"]))
np.savez(target + "/lora.npz", **drawn)
"""
)


@pytest.mark.long
def test_adapters_without_the_package(folder, picture, tmp_path):
    from peft import LoraConfig, get_peft_model

    from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel

    pipe = Echo4oPipeline.from_pretrained(folder)
    settings = LoraConfig(
        r=4,
        lora_alpha=13,
        use_rslora=True,
        target_modules=BagelTransformer2DModel._lora_targets["both"],
        init_lora_weights=False,
    )
    peft_model = get_peft_model(pipe.transformer, settings)
    peft_model.save_pretrained(tmp_path / "peft")
    pipe.save_lora_adapter(tmp_path / "lora")
    adapted, half = draw(pipe), draw(pipe, attention_kwargs={"scale": 0.5})
    assert not same(adapted, picture) and not same(adapted, half)
    for name in ("pickled", "two", "empty", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickled/pytorch_lora_weights.bin").write_bytes(b"no matter")
    for name in ("a", "b"):
        shutil.copy(tmp_path / "lora/pytorch_lora_weights.safetensors", tmp_path / f"two/{name}.safetensors")
    (tmp_path / "empty/README.md").write_text("nothing")
    with LoopbackHub() as hub:
        for name in ("lora", "peft", "pickled", "two", "empty"):
            hub.add_folder(f"ns/{name}", tmp_path / name)
        environment = hub.environment(tmp_path / "home")
        run_script(REMOTE_LORA, folder, tmp_path, env=environment, hide=["echo4o"])
        assert not [r for r in hub.requests if r[0] == "GET" and "/resolve/" in r[1] and r[1].endswith(".bin")]
    drawn = np.load(tmp_path / "lora.npz")
    assert same(drawn["base"], picture) and same(drawn["unloaded"], picture)
    assert all(same(drawn[name], adapted) for name in ("ns/lora", "ns/peft", "named")) and same(drawn["half"], half)
    again = Echo4oPipeline.from_pretrained(folder)
    again.load_lora_weights(tmp_path / "saved")
    assert same(draw(again), adapted)
