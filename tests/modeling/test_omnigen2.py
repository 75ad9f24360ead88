"""OmniGen2's transformer and pipeline beyond the golden data: batches, gradients, precision, release size, errors."""

import copy
import re

import pytest
import torch
from PIL import Image

from echo4o.modeling.common.weights import component_tensors
from echo4o.modeling.omnigen2.transformer_omnigen2 import OmniGen2Transformer2DModel
from tests.modeling.omnigen2_models import CHECKPOINT, GOLDEN, golden_pipeline, other_pipeline

STEPS = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return golden_pipeline()


@pytest.fixture(scope="module")
def images():
    return [Image.open(GOLDEN / "inputs" / f"ref{i}.png").convert("RGB") for i in range(5)]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- batches ---


@pytest.mark.long
def test_rows_of_a_batch_equal_single_calls(pipe, images):
    prompts = ["a dot", "a much longer prompt about two dots and a line", "red", "blue"]
    references = [None, [images[0]], [images[1], images[2]], images]
    sizes = [(64, 64), (48, 96), (96, 64), (80, 48)]
    options = {"guidance_scale": 4.0, "image_guidance_scale": 2.0, "guidance_range": (0.0, 0.4), "align_res": False}
    batch = pipe(
        prompts,
        image=references,
        negative_prompt=["", "bad", "ugly thing", ""],
        height=[h for h, _ in sizes],
        width=[w for _, w in sizes],
        generator=generators(*range(4)),
        **options,
        **STEPS,
    ).images
    for row, (prompt, own, (height, width)) in enumerate(zip(prompts, references, sizes)):
        single = pipe(
            prompt,
            image=own,
            negative_prompt=["", "bad", "ugly thing", ""][row],
            height=height,
            width=width,
            generator=generators(row),
            **options,
            **STEPS,
        ).images[0]
        assert batch[row].shape == single.shape
        assert (batch[row] - single).abs().max() < 1e-5


def test_images_of_a_prompt_share_their_references(pipe, images):
    options = {"image": [images[0]], "guidance_scale": 3.0, "image_guidance_scale": 2.0, **STEPS}
    pair = pipe("a dot", num_images_per_prompt=2, generator=generators(0, 1), **options).images
    first = pipe("a dot", generator=generators(0), **options).images
    assert (pair[0] - first[0]).abs().max() < 1e-5 and (pair[0] - pair[1]).abs().max() > 0.1


def test_work_that_does_not_depend_on_the_time_is_done_once(pipe, images, monkeypatch):
    counts = {"text": 0, "encode": 0, "context": 0, "noise": 0, "reference": 0}

    def counting(name, function):
        def wrapper(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(pipe, "text_features", counting("text", pipe.text_features))
    monkeypatch.setattr(pipe, "encode_image", counting("encode", pipe.encode_image))
    blocks = {"context": pipe.transformer.context_refiner, "noise": pipe.transformer.noise_refiner}
    blocks["reference"] = pipe.transformer.ref_image_refiner
    for name, stack in blocks.items():
        monkeypatch.setattr(stack[0], "forward", counting(name, stack[0].forward))
    lengths = []
    hook = pipe.transformer.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(len(args[2])))
    pipe("a dot", image=[images[0]], guidance_scale=4.0, image_guidance_scale=2.0, guidance_range=(0, 0.4), **STEPS)
    hook.remove()
    assert counts == {"text": 2, "encode": 1, "context": 1, "noise": 3, "reference": 3}
    assert lengths == [3, 3, 1]  # branches run as one batch


def test_one_reference_sets_the_size(pipe, images):
    short = {"num_inference_steps": 1, "output_type": "pt"}
    assert pipe("a dot", image=images[0], height=32, width=32, **short).images.shape[2:] == (64, 80)
    assert pipe("a dot", image=images[0], height=32, width=32, align_res=False, **short).images.shape[2:] == (32, 32)
    pair = pipe(["a", "b"], image=[images[0], [images[1]]], max_pixels=4096, **short).images
    assert [tuple(x.shape[1:]) for x in pair] == [(48, 64), (80, 48)]


def test_another_shape(images):
    pipe = other_pipeline()
    assert pipe.latent_stride == 8
    options = {"image": images[:2], "height": 40, "width": 24, "num_inference_steps": 2}
    result = pipe("a dot", guidance_scale=4.0, image_guidance_scale=2.0, **options).images[0]
    assert result.size == (24, 40)
    assert isinstance(pipe.chat("What is this?", image=images[:2], max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda latents: latents[:, :1], "have the shapes"),
        (lambda latents: [*latents, *latents], "have the shapes"),
        (lambda latents: latents * float("nan"), "not finite"),
    ],
)
def test_latents_of_a_callback_are_checked(pipe, change, message):
    def callback(pipe, step, timestep, given):
        return {"latents": change(given["latents"])}

    with pytest.raises(ValueError, match=message):
        pipe("a dot", height=32, width=32, callback_on_step_end=callback, **STEPS)


def test_callbacks_change_latents_and_stop(pipe):
    seen = []

    def callback(pipe, step, timestep, given):
        seen.append(step)
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(given["latents"])}

    result = pipe("a dot", height=32, width=32, callback_on_step_end=callback, **STEPS).images
    assert seen == [0, 1] and not result.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 3}, "`prompt` must be"),
        ({"prompt": []}, "`prompt` must be"),
        ({"prompt": "a", "height": 0}, "height=0"),
        ({"prompt": "a", "height": 8, "width": 8}, "leave 0 x 0 pixels"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale=-1"),
        ({"prompt": "a", "guidance_range": (0.5, 0.2)}, "guidance_range"),
        ({"prompt": "a", "timesteps": [0.5, 0.5]}, "must rise"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type='jpg'"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, "2 texts for 1 prompts"),
        ({"prompt": ["a", "b"], "image": [None]}, "1 entries"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 4, 4)}, "shape"),
        ({"prompt": "a", "generator": 3}, "generator"),
        ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length=0"),
    ],
)
def test_arguments_that_cannot_be_used(pipe, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        pipe(**options)


def test_wrong_schedulers_are_named(pipe):
    from diffusers import DDIMScheduler

    broken = copy.copy(pipe)
    broken.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler cannot sample from OmniGen2"):
        broken("a", **STEPS)


# --- the transformer ---


def inputs(rows=3, references=(2, 0, 1)):
    torch.manual_seed(1)
    return {
        "hidden_states": [torch.randn(16, 4 + 2 * i, 6) for i in range(rows)],
        "timestep": torch.tensor([0.1, 0.5, 0.9])[:rows],
        "encoder_hidden_states": [torch.randn(3 + 4 * i, 48) for i in range(rows)],
        "ref_image_hidden_states": [[torch.randn(16, 6, 4) for _ in range(n)] for n in references],
    }


def test_padding_of_texts_has_no_effect(pipe):
    given = inputs()
    texts = given.pop("encoder_hidden_states")
    padded = torch.full((3, 15, 48), 1e4)
    mask = torch.zeros(3, 15, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.no_grad():
        want = pipe.transformer(encoder_hidden_states=texts, **given).sample
        got = pipe.transformer(encoder_hidden_states=padded, encoder_attention_mask=mask, **given).sample
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    with pytest.raises(ValueError, match="padded on the right"):
        pipe.transformer(encoder_hidden_states=padded, encoder_attention_mask=mask.flip(1), **given)


def test_bfloat16_is_close_to_float32(pipe):
    given = inputs()
    given["timestep"] = torch.tensor([0.125, 0.5, 0.875])  # bfloat16 has these; it rounds others, as the original does
    half = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    with torch.no_grad():
        want = pipe.transformer(**given).sample
        got = half(**given).sample
    for a, b in zip(got, want):
        assert (a.float() - b).abs().mean() / b.abs().mean() < 2e-2


@pytest.mark.parametrize("references", [(0, 0, 0), (2, 0, 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(pipe, references, checkpointing):
    model = copy.deepcopy(pipe.transformer).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    sum(x.square().sum() for x in model(**inputs(references=references)).sample).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    used = model.ref_image_patch_embedder.weight.grad.abs().sum() > 0
    assert bool(used) == any(references)


def test_release_size():
    """Counts of the release by part; names follow the golden checkpoint's, layer by layer."""
    with torch.device("meta"):
        model = OmniGen2Transformer2DModel()
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert parts == {
        "x_embedder": 163_800,
        "ref_image_patch_embedder": 163_800,
        "time_caption_embed": 6_478_296,
        "context_refiner": 188_718_240,
        "noise_refiner": 209_382_240,
        "ref_image_refiner": 209_382_240,
        "layers": 3_350_115_840,
        "norm_out": 2_744_344,
    }
    assert model.image_index_embedding.numel() == 12_600
    assert sum(p.numel() for p in model.parameters()) == 3_967_161_400
    stored = component_tensors(CHECKPOINT / "transformer")
    small = {re.sub(r"\.\d+\.", ".N.", name, count=1) for name in stored}
    assert {re.sub(r"\.\d+\.", ".N.", name, count=1) for name in model.state_dict()} == small
    assert len(model.state_dict()) == 582 and not list(model.buffers())
    adapted = [n for n, _ in model.named_modules() if re.fullmatch(model._lora_targets["attention"], n)]
    assert len(adapted) == 152
    assert sum(8 * (m.in_features + m.out_features) for n, m in model.named_modules() if n in adapted) == 5_107_200


def test_configurations_that_are_not_possible():
    for options, words in (
        ({"axes_dim_rope": (40, 40, 32)}, "must sum up"),
        ({"num_kv_heads": 5}, "multiple"),
        ({"hidden_size": "2520"}, "hidden_size='2520'"),
        ({"axes_dim_rope": 40}, "a list of whole numbers"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=words):
            OmniGen2Transformer2DModel(**options)


def test_first_block_cache_forgets_when_branches_change(pipe, images):
    from diffusers import FirstBlockCacheConfig

    cached = golden_pipeline()
    options = {"image": [images[0]], "guidance_range": (0, 0.4), "num_inference_steps": 4, "output_type": "latent"}
    want = pipe("a dot", generator=generators(0), **options).images
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    assert (cached("a dot", generator=generators(0), **options).images - want).abs().max() < 1e-5
    cached.transformer.disable_cache()
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    assert (cached("a dot", generator=generators(0), **options).images - want).abs().max() > 1e-5
    with pytest.raises(ValueError, match="use FirstBlockCacheConfig"):
        cached.transformer.enable_cache(object())
