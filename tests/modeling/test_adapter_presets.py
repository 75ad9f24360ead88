"""Sampling presets of adapters: used by calls that do not say otherwise, kept by files, refused where two contradict."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.common.adapter_presets import PRESET_KEY, SamplingPreset
from echo4o.modeling.common.lora_files import DIFFUSERS_FILE, read_adapter, write_adapter
from echo4o.testing.processes import offline_environment, run_script

from .conftest import GOLDEN

FOUR = SamplingPreset(4, shift=3.0)


def generate(pipe, **options):
    settings = {"height": 32, "width": 32, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a dot", **settings | options).images


def add_preset(folder, preset: SamplingPreset | None):
    """Write the preset into the adapter of a folder and return the folder."""
    state, settings = read_adapter(folder / DIFFUSERS_FILE)
    write_adapter(folder / DIFFUSERS_FILE, state, settings, preset)
    return folder


@pytest.fixture
def few_steps(adapters):
    return add_preset(adapters(), FOUR)


@pytest.mark.long
def test_a_call_uses_the_preset_unless_it_says_otherwise(fresh, few_steps):
    pipe = fresh()
    pipe.load_lora_weights(few_steps, adapter_name="fast")
    assert pipe.sampling_preset == FOUR
    made = generate(pipe)
    assert pipe.num_timesteps == 4
    assert torch.equal(made, generate(pipe, num_inference_steps=4, guidance_scale=1.0))
    assert torch.equal(made, generate(pipe, num_inference_steps=None, guidance_scale=None))
    two = generate(pipe, num_inference_steps=2)
    assert pipe.num_timesteps == 2 and torch.equal(two, generate(pipe, num_inference_steps=2, guidance_scale=1.0))
    assert not torch.equal(made, generate(pipe, guidance_scale=4.0)) and pipe.num_timesteps == 4
    generate(pipe, sigmas=[1.0, 0.5, 0.25])
    assert pipe.num_timesteps == 3


def test_positional_arguments_count_as_passed(fresh, few_steps):
    pipe = fresh()
    pipe.load_lora_weights(few_steps)
    pipe("a dot", None, None, 32, 32, 5, output_type="latent")
    assert pipe.num_timesteps == 5


@pytest.mark.parametrize("steps", [None, 3])
def test_the_presets_shift_holds_with_another_scheduler(fresh, few_steps, steps):
    pipe = fresh()
    pipe.load_lora_weights(few_steps)
    given = {} if steps is None else {"num_inference_steps": steps}
    expected = generate(pipe, **given)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    times = []
    again = generate(pipe, **given, callback_on_step_end=lambda pipe, step, t, tensors: times.append(float(t)) or {})
    assert torch.allclose(again, expected, atol=1e-4)
    unshifted = [1 - k / len(times) for k in range(len(times))]
    assert times == pytest.approx([3000 * t / (1 + 2 * t) for t in unshifted], rel=1e-5)


def test_contradicting_presets_are_refused_by_name(fresh, adapters, few_steps):
    pipe = fresh()
    pipe.load_lora_weights(few_steps, adapter_name="fast")
    pipe.load_lora_weights(add_preset(adapters(seed=1), SamplingPreset(8, shift=3.0)), adapter_name="slower")
    pipe.load_lora_weights(add_preset(adapters(seed=2), FOUR), adapter_name="fast too")
    pipe.load_lora_weights(adapters(seed=3), adapter_name="style")
    pipe.set_adapters(["fast", "slower"])
    words = (
        r"'fast' \(4 updates, guidance off, shift 3\) and 'slower' \(8 updates, guidance off, shift 3\) need different"
    )
    with pytest.raises(ValueError, match=words):
        generate(pipe)
    pipe.set_adapters(["fast", "slower"], [1.0, 0.0])  # an adapter without weight decides nothing
    assert pipe.sampling_preset == FOUR
    pipe.set_adapters(["fast", "fast too", "style"])
    assert pipe.sampling_preset == FOUR
    pipe.set_adapters("style")
    assert pipe.sampling_preset is None


def test_a_preset_goes_with_its_adapter(fresh, adapters, few_steps):
    pipe, plain = fresh(), adapters(seed=1)
    pipe.load_lora_weights(few_steps, adapter_name="fast")
    pipe.disable_lora()
    assert pipe.sampling_preset is None
    pipe.enable_lora()
    pipe.fuse_lora()
    assert pipe.sampling_preset == FOUR
    pipe.unfuse_lora()
    pipe.load_lora_weights(plain, adapter_name="fast", hotswap=True)
    assert pipe.sampling_preset is None
    pipe.load_lora_weights(few_steps, adapter_name="fast", hotswap=True)
    assert pipe.sampling_preset == FOUR
    pipe.delete_adapters("fast")
    assert pipe.sampling_preset is None
    pipe.load_lora_weights(few_steps, adapter_name="fast")
    pipe.unload_lora_weights()
    assert pipe.sampling_preset is None
    pipe.load_lora_weights(plain, adapter_name="fast")
    assert pipe.sampling_preset is None


def test_a_saved_adapter_keeps_its_preset(fresh, few_steps, tmp_path):
    pipe = fresh()
    pipe.load_lora_weights(few_steps, adapter_name="fast")
    pipe.save_lora_adapter(tmp_path / "saved")
    again = fresh()
    again.load_lora_weights(tmp_path / "saved")
    assert again.sampling_preset == FOUR and torch.equal(generate(again), generate(pipe))
    # diffusers alone reads the same file: the preset is not part of the configuration.
    fresh().transformer.load_lora_adapter(str(tmp_path / "saved"), prefix="transformer", use_safetensors=True)


@pytest.mark.parametrize(
    "values", [{"num_inference_steps": 0}, {"guidance_scale": 1.0}, {"num_inference_steps": 4, "cfg": 1}, [4]]
)
def test_a_damaged_preset_is_an_error(values):
    with pytest.raises(ValueError, match=PRESET_KEY):
        SamplingPreset.read(values)


REMOTE = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
source, adapter, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
assert type(pipe).__module__ == "diffusers_modules.local.pipeline", type(pipe)
pipe.load_lora_weights(adapter)
settings = {"height": 32, "width": 32, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
images = pipe("a dot", **settings).images
assert pipe.num_timesteps == 4 and pipe.sampling_preset.num_inference_steps == 4
np.save(target, images.numpy())
"""


@pytest.mark.long
def test_the_preset_works_without_the_package(fresh, few_steps, tmp_path):
    folder = tmp_path / "pipeline"
    convert_to_diffusers(GOLDEN / "checkpoint", folder)
    (tmp_path / "home").mkdir()
    target = tmp_path / "latents.npy"
    run_script(REMOTE, folder, few_steps, target, env=offline_environment(tmp_path / "home"), hide=["echo4o"])
    pipe = fresh()
    pipe.load_lora_weights(few_steps)
    assert np.allclose(np.load(target), generate(pipe).numpy(), atol=1e-5)
