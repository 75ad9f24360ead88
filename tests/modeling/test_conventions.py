"""What users of diffusers expect of a pipeline: arguments, properties, components, threads."""

import copy
import threading

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from PIL import Image

from echo4o import Echo4oPipeline


def draw(pipe, prompt="a red dot", seed=0, **options):
    options = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images


# --- sigmas, timesteps, negative prompts ------------------------------------------------------------------------------


def test_sigmas_and_timesteps_are_the_times_before_the_shift(pipe):
    want = draw(pipe)
    times = [1.0, 0.75, 0.5, 0.25]
    for given in (times, np.array(times), torch.tensor(times)):
        assert torch.equal(draw(pipe, sigmas=given, num_inference_steps=49), want)
    assert torch.equal(draw(pipe, timesteps=[1000, 750, 500, 250]), want)
    assert pipe.num_timesteps == 4
    other = draw(pipe, sigmas=[1.0, 0.9, 0.5, 0.1])
    assert not torch.allclose(other, want, atol=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sigmas": [1.0, 0.5], "timesteps": [1000, 500]}, "either `sigmas` or `timesteps`"),
        ({"sigmas": []}, "non-empty list"),
        ({"sigmas": [0.5, 1.0]}, "must decrease"),
        ({"sigmas": [1.0, 1.0]}, "must decrease"),
        ({"sigmas": [1.0, 0.0]}, r"\(0, 1\]"),
        ({"sigmas": [1000.0, 500.0]}, r"\(0, 1\]"),
        ({"sigmas": [1.0, float("nan")]}, "`sigmas`"),
        ({"timesteps": ["1000"]}, "non-empty list of numbers"),
        ({"negative_prompt": "ugly"}, "negative_prompt is not supported"),
        ({"negative_prompt": ["ugly"]}, "negative_prompt is not supported"),
    ],
)
def test_arguments_that_cannot_be_honoured(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        draw(pipe, **options)


def test_an_empty_negative_prompt_is_none(pipe):
    assert torch.equal(draw(pipe, negative_prompt=""), draw(pipe))


# --- references ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(pictures) -> Image.Image:
    return pictures["img_a"]


def forms(image: Image.Image) -> dict:
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return {
        "uint8 array": array,
        "array": array.astype(np.float32) / 255,
        "float64 array": array.astype(np.float64) / 255,
        "uint8 tensor": tensor,
        "tensor": tensor.float() / 255,
        "batch of arrays": (array / 255)[None],
        "batch of tensors": (tensor / 255)[None],
        "list of tensors": [tensor / 255],
    }


@pytest.mark.parametrize("form", forms(Image.new("RGB", (1, 1))))
def test_references_as_arrays_and_tensors(pipe, reference, form):
    given, options = forms(reference)[form], {"height": None, "width": None, "num_inference_steps": 1}
    want = draw(pipe, "make it blue", image=reference, **options)
    assert torch.equal(draw(pipe, "make it blue", image=given, **options), want)
    assert pipe.chat("what is it?", given, max_new_tokens=3) == pipe.chat("what is it?", reference, max_new_tokens=3)


def test_several_references_as_one_batch_and_one_for_each_prompt(pipe, pictures):
    images = [pictures["img_a"].resize((48, 48)), pictures["img_b"].resize((48, 48))]
    batch = torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) / 255 for i in images])
    options = {"num_inference_steps": 1}
    assert torch.equal(draw(pipe, image=batch, **options), draw(pipe, image=images, **options))
    prompts = ["a dot", "a square"]
    assert torch.equal(draw(pipe, prompts, image=batch, **options), draw(pipe, prompts, image=images, **options))
    mixed = draw(pipe, None, inputs=[batch[0], "and", np.asarray(images[1])], **options)
    assert torch.equal(mixed, draw(pipe, None, inputs=[images[0], "and", images[1]], **options))


def test_what_the_pipeline_returns_is_a_reference_again(pipe):
    options = {"num_inference_steps": 1, "output_type": "np"}
    array, tensor = draw(pipe, **options), draw(pipe, **options | {"output_type": "pt"})
    assert torch.equal(draw(pipe, image=array, num_inference_steps=1), draw(pipe, image=tensor, num_inference_steps=1))


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((3, 8, 8), np.uint8), r"is of shape \(3, 8, 8\); give \(H, W, C\)"),
        (torch.zeros(8, 8, 3), r"is of shape \(8, 8, 3\); give \(C, H, W\)"),
        (np.full((8, 8, 3), -1.0), r"values outside \[0, 1\]"),
        (np.full((8, 8, 3), 255.0), r"values outside \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), r"values outside \[0, 1\]"),
        (np.zeros((8, 8, 3), np.int64), "is of type int64; give uint8"),
        (np.zeros((0, 8, 3), np.uint8), "is of shape"),
    ],
)
def test_arrays_that_are_no_images(pipe, image, words):
    with pytest.raises(ValueError, match=words):
        draw(pipe, image=image)


# --- properties during a call ------------------------------------------------------------------------------------------


def test_properties_during_a_call(pipe):
    seen = []

    def look(pipeline, step, timestep, given):
        seen.append((pipeline.guidance_scale, pipeline.do_classifier_free_guidance, pipeline.current_timestep))
        assert pipeline.current_timestep is timestep and pipeline.num_timesteps == 4
        return {}

    draw(pipe, guidance_scale=3.0, callback_on_step_end=look)
    assert [(scale, on) for scale, on, _ in seen] == [(3.0, True)] * 4
    assert [float(t) for *_, t in seen] == pipe.scheduler.timesteps.tolist()
    draw(pipe, guidance_scale=1.0, callback_on_step_end=look)
    assert seen[-1][:2] == (1.0, False)
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.current_timestep) == (None, False, None)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fail)
    assert pipe.current_timestep is None and pipe.guidance_scale is None


# --- components ----------------------------------------------------------------------------------------------------------


def parts(pipe) -> dict:
    return dict(pipe.components)


def other_vaes(pipe) -> dict:
    channels = pipe.vae.config.latent_channels
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    tiny = AutoencoderTiny(
        latent_channels=channels, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, **blocks
    )
    without_shift, other, half = copy.deepcopy(pipe.vae), copy.deepcopy(pipe.vae), copy.deepcopy(pipe.vae)
    without_shift.register_to_config(shift_factor=None)
    other.register_to_config(latent_channels=4)
    half.encoder = None
    return {
        "The VAE is a AutoencoderTiny": tiny,
        "shift_factor is None": without_shift,
        "has 4 latent channels, and the transformer 16": other,
        "lacks its encoder": half,
    }


@pytest.mark.parametrize("words", ["is a Auto", "shift_factor", "latent channels", "lacks its encoder"])
def test_a_vae_that_does_not_fit_is_refused_at_construction_and_in_a_call(pipe, words):
    vae = next(v for name, v in other_vaes(pipe).items() if words in name)
    with pytest.raises(ValueError, match=words):
        Echo4oPipeline(**parts(pipe) | {"vae": vae})
    mine = Echo4oPipeline.from_pipe(pipe)
    mine.vae = vae
    with pytest.raises(ValueError, match=words):
        draw(mine)


def test_a_vae_of_a_derived_class_fits(pipe):
    class Mine(AutoencoderKL):
        pass

    vae = Mine.from_config(pipe.vae.config)
    vae.load_state_dict(pipe.vae.state_dict())
    assert torch.equal(draw(Echo4oPipeline.from_pipe(pipe, vae=vae)), draw(pipe))


@pytest.mark.parametrize("name", ["transformer", "vae", "vision_model"])
def test_a_component_that_everything_needs(pipe, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=None"):
        Echo4oPipeline(**parts(pipe) | {name: None})
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}=None"):
        Echo4oPipeline.from_pretrained(tmp_path, **{name: None})


def test_chat_works_without_a_scheduler(pipe, reference):
    mine = Echo4oPipeline(**parts(pipe) | {"scheduler": None}, **options_of(pipe))
    mine.set_progress_bar_config(disable=True)
    question = ("what is it?", reference)
    assert mine.chat(*question, max_new_tokens=4) == pipe.chat(*question, max_new_tokens=4)
    with pytest.raises(ValueError, match="scheduler=None"):
        draw(mine)


def options_of(pipe) -> dict:
    names = ("presets", "think_prompts", "vae_image_limits", "vision_image_limits", "max_references")
    return {name: pipe.config[name] for name in names}


def test_nothing_works_without_a_tokenizer(pipe):
    mine = Echo4oPipeline(**parts(pipe) | {"tokenizer": None})
    for call in (draw, lambda p: p.chat("what?")):
        with pytest.raises(ValueError, match="tokenizer=None"):
            call(mine)


# --- threads ---------------------------------------------------------------------------------------------------------


def in_threads(work: list) -> list:
    """Run functions at the same time; their results or errors."""
    results: list = [None] * len(work)

    def run(index):
        try:
            results[index] = work[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_with_a_scheduler_of_their_own_give_the_same_bits(pipe):
    want = [draw(pipe, seed=seed, num_inference_steps=8) for seed in range(3)]
    mine = [
        Echo4oPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config))
        for _ in range(3)
    ]
    for one in mine:
        one.set_progress_bar_config(disable=True)
    got = in_threads([lambda s=s: draw(mine[s], seed=s, num_inference_steps=8) for s in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shared", ["pipeline", "scheduler"])
def test_threads_that_share_a_pipeline_or_a_scheduler_are_reported(pipe, shared):
    other = pipe if shared == "pipeline" else Echo4oPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    want, inside = draw(pipe), threading.Event()
    errors = []

    def second(*_):
        if not inside.is_set():
            inside.set()
            errors.extend(in_threads([lambda: draw(other, seed=1)]))
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=second), want)
    assert isinstance(errors[0], RuntimeError) and "from_pipe" in str(errors[0])
    assert torch.equal(draw(other), want)  # nothing stays locked


def test_what_changes_the_shared_model_excludes_other_calls(pipe):
    """A scaled adapter and a step cache are state of the model."""
    mine = Echo4oPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config))
    mine.set_progress_bar_config(disable=True)
    errors = []

    def second(*_):
        errors.extend(in_threads([lambda: draw(mine, attention_kwargs={"scale": 1.0})]))
        return {}

    draw(pipe, num_inference_steps=1, callback_on_step_end=second)
    assert isinstance(errors[0], RuntimeError) and "BagelTransformer2DModel is in use" in str(errors[0])
