"""Offloading, 8-bit weights, tiling: the same picture, every component through its hooks, and a report of it all.

Where weights are swapped out between uses, what bypasses a hook computes with garbage, or fails on the meta device; on a
CPU alone this tells as much as on a GPU.
"""

import logging
import types

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline

from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel, _exempting
from echo4o.modeling.common import placement
from tests.modeling.conftest import GOLDEN

CPU = torch.device("cpu")
WEIGHTED = ("transformer", "vision_model", "vae")
LAYERS = (
    "pos_embed",
    "embed_tokens",
    "time_proj",
    "time_embed",
    "proj_in",
    "layers.0",
    "layers.1",
    "norm_out",
    "proj_out",
    "lm_head",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert_to_diffusers(GOLDEN / "checkpoint", folder)
    return folder


@pytest.fixture
def load(folder):
    def make(**options):
        pipe = Echo4oPipeline.from_pretrained(folder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def use(pipe, picture) -> tuple[torch.Tensor, str]:
    """A picture with a plan, drawn after a reference with all branches, and an answer: every path of the pipeline."""
    drawn = pipe(
        "a dot",
        image=picture,
        height=32,
        width=32,
        num_inference_steps=2,
        think=True,
        max_think_tokens=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    return drawn.images, pipe.chat("what?", image=picture, max_new_tokens=3) + drawn.texts[0]


def same(a, b, tolerance=1e-5) -> bool:
    return a[1] == b[1] and float((a[0] - b[0]).abs().max()) <= tolerance


@pytest.fixture(scope="module")
def plain(folder, pictures):
    pipe = Echo4oPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return use(pipe, pictures["img_a"])


def whole_on_meta(pipe, tmp_path):
    for name in WEIGHTED:
        accelerate.cpu_offload(getattr(pipe, name), CPU, offload_buffers=True)


def from_disk(kind):
    def prepare(pipe, tmp_path):
        options = {"num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path / "weights")}
        pipe.enable_group_offload(CPU, offload_type=kind, **options)

    return prepare


def blocks_on_disk(pipe, tmp_path):
    places = dict.fromkeys(LAYERS, "cpu") | {"layers.1": "disk", "lm_head": "disk"}
    transformer = BagelTransformer2DModel.from_pretrained(
        pipe.config._name_or_path, subfolder="transformer", device_map=places, offload_folder=tmp_path
    )
    pipe.register_modules(transformer=transformer)


WAYS = {
    "model offload": (lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu"), "model offload", {"cpu"}),
    "group offload": (
        lambda pipe, _: pipe.enable_group_offload(CPU, num_blocks_per_group=1),
        "group offload, block_level",
        {"cpu"},
    ),
    "weights on meta": (whole_on_meta, "sequential offload", {"cpu"}),
    "blocks from disk": (from_disk("block_level"), "group offload, block_level, from disk", {"disk"}),
    "leaves from disk": (from_disk("leaf_level"), "group offload, leaf_level, from disk", {"disk"}),
    "device map": (blocks_on_disk, "device map", {"cpu", "disk"}),
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_pipelines_generate_the_same_and_report_their_placement(load, plain, pictures, tmp_path, way):
    prepare, how, places = WAYS[way]
    pipe = load()
    sizes = {name: pipe.placement()[name].nbytes for name in WEIGHTED}
    prepare(pipe, tmp_path)
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe)
    assert pipe._execution_device.type == "cpu"
    placed = pipe.placement()["transformer"]
    assert (placed.offload, set(placed.stored)) == (how, places)
    assert {name: pipe.placement()[name].nbytes for name in WEIGHTED} == sizes
    assert same(use(pipe, pictures["img_a"]), plain)
    assert same(use(pipe, pictures["img_a"]), plain), "the hooks are gone after a call"


def test_model_offload_brings_every_component_when_it_is_used(load, pictures, monkeypatch):
    came = []
    bring = accelerate.hooks.CpuOffload.pre_forward

    def recorded(hook, module, *args, **kwargs):
        came.append(type(module).__name__)
        return bring(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", recorded)
    pipe = load()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe("a dot", image=pictures["img_a"], height=32, width=32, num_inference_steps=2)
    kinds = list(dict.fromkeys(came))
    assert kinds == ["AutoencoderKL", "BagelVisionModel", "BagelTransformer2DModel"] and came[-1] == "AutoencoderKL"


def test_the_execution_device_of_unhooked_and_of_group_offloaded_weights(load):
    pipe = load()
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe) == CPU
    assert pipe.to("meta")._execution_device == DiffusionPipeline._execution_device.fget(pipe) == torch.device("meta")
    pipe = load()
    pipe.enable_group_offload(CPU, num_blocks_per_group=1, exclude_modules=["vae", "vision_model"])
    for module in pipe.transformer.modules():  # no other device runs here: pretend that there is one
        if hook := getattr(module, "_diffusers_hook", None):
            hook.get_hook("group_offloading").config.onload_device = torch.device("meta")
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe) == torch.device("meta")


def test_folders_for_offloaded_weights_are_not_shared(load, tmp_path):
    (tmp_path / "group_0.safetensors").write_bytes(b"of another model")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        load().enable_group_offload(CPU, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    pipe = load()
    pipe.enable_group_offload("cpu", num_blocks_per_group=1, exclude_modules="vae")
    assert [bool(pipe.placement()[name].offload) for name in WEIGHTED] == [True, True, False]


# --- fewer bits ------------------------------------------------------------------------------------------------------

WIDE = ("norm", "pos_embed", "embed_tokens", "time_embed", "proj_in", "proj_out", "lm_head")


def test_8_bit_storage_leaves_what_it_must(load, plain, pictures, tmp_path):
    pipe = load()
    whole = pipe.placement()["transformer"]
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, tensor in pipe.transformer.state_dict().items():
        wide = any(part in name for part in WIDE)
        assert tensor.dtype == (torch.float32 if wide else torch.float8_e4m3fn), name
    matrices = sum(p.numel() for n, p in pipe.transformer.named_parameters() if not any(part in n for part in WIDE))
    placed = pipe.placement()["transformer"]
    assert placed.dtypes["float8_e4m3fn"] == matrices and placed.nbytes == whole.nbytes - 3 * matrices
    drawn = use(pipe, pictures["img_a"])
    assert 0 < (drawn[0] - plain[0]).abs().max() < 0.35
    with pytest.raises(ValueError, match="transformer was rounded to 8 bits"):  # it would load, and not run
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("option", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_quantization_skips_the_required_modules_by_default(option):
    given = types.SimpleNamespace(**{option: None})
    assert getattr(_exempting(given, ["proj_in"]), option) == ["proj_in"] and getattr(given, option) is None
    given = types.SimpleNamespace(**{option: ["layers"]})
    assert getattr(_exempting(given, ["proj_in"]), option) == ["layers"]


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(load, plain, pictures, kind):
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig
    from diffusers.quantizers import PipelineQuantizationConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(getattr(torchao, kind)())})
    pipe = load(quantization_config=config)
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            wide = any(part in name for part in WIDE)
            assert (type(module.weight.data) is torch.Tensor) == wide, name
    assert pipe.placement()["transformer"].nbytes < 0.6 * load().placement()["transformer"].nbytes
    assert 0 < (use(pipe, pictures["img_a"])[0] - plain[0]).abs().max() < 0.35


def test_bitsandbytes(load):
    pytest.importorskip("bitsandbytes")
    if torch.cuda.is_available():
        pytest.skip("this is what it says without a GPU")
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers import PipelineQuantizationConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(RuntimeError, match="A GPU is needed"):
        load(quantization_config=config)


# --- tiles -----------------------------------------------------------------------------------------------------------


def test_tiling_of_the_vae_holds_for_the_pipeline(load, plain, pictures):
    pipe = load()
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert same(use(pipe, pictures["img_a"]), plain, 0), "a picture of one tile stays as it is"
    picture = pictures["img_a"].resize((64, 64))
    with torch.no_grad():
        latent = pipe.encode_latent(picture, torch.Generator().manual_seed(0))
        pixels = pipe.decode_latent(latent)
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor = 32, 4, 0.5
        assert not torch.equal(pipe.encode_latent(picture, torch.Generator().manual_seed(0)), latent)
        tiled = pipe.decode_latent(latent)
        raw = latent / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        assert torch.equal(tiled, pipe.vae.tiled_decode(raw[None]).sample[0]) and not torch.equal(tiled, pixels)


# --- the report ------------------------------------------------------------------------------------------------------


def test_placement_counts_every_byte(load):
    pipe = load(dtype={"vae": torch.bfloat16})
    placement = pipe.placement()
    for name in WEIGHTED:
        tensors = getattr(pipe, name).state_dict().values()
        assert placement[name].stored == {"cpu": sum(t.nbytes for t in tensors)}
    assert placement["vae"].dtypes.keys() == {"bfloat16"} and placement["vae"].offload == ""
    assert str(placement).count("\n") == 2 and placement.line.startswith(
        "transformer 0.90 MB on cpu (float32); vision"
    )


@pytest.fixture
def told(caplog):
    """What placement warns of; diffusers' loggers hand nothing on."""
    logger = logging.getLogger(placement.__name__)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_what_lands_on_disk_is_a_warning(load, tmp_path, told):
    blocks_on_disk(load(), tmp_path)
    assert "places parts of transformer where they are slow: layers.1 on disk, lm_head on disk" in told.text


@pytest.mark.parametrize(
    "device_map, words",
    [
        ({"transformer": 0, "vae": "cpu"}, "vae on cpu"),
        ({"": "disk"}, "slow: disk"),
        ({"layers.0": "cpu", "layers.1": "cpu"}, None),
        ({"": 0}, None),
        ("cuda", None),
        (None, None),
    ],
)
def test_which_device_maps_are_slow(device_map, words, told):
    placement.warn_of_device_map("x", device_map)
    assert (words in told.text) if words else not told.text


@pytest.mark.parametrize("device_map", ["auto", "sequential", {"transformer": "cpu"}])
def test_device_maps_that_pipelines_do_not_have(load, device_map):
    with pytest.raises(ValueError, match="is unknown; use 'cpu', 'cuda', 'cuda:1', 'balanced'"):
        load(device_map=device_map)
    assert load(device_map="cpu").placement()["vae"].stored.keys() == {"cpu"}
