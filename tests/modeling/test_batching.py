"""Samples that run together do not know of each other; batches may lack any kind of picture."""

import copy

import pytest
import torch

from echo4o.modeling.bagel.segments_bagel import drop, image_segment, text_segment
from echo4o.training.backbones.bagel_objective import add_noise, bagel_losses

FORWARD, TRAJECTORY = {"atol": 1e-4, "rtol": 0}, {"atol": 3e-4, "rtol": 0}


class Maker:
    """Segments of random content for one checkpoint; equal seeds give equal content."""

    def __init__(self, pipe, seed: int = 0):
        self.pipe, self.tokens = pipe, pipe.special_tokens
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, length: int, loss: bool = False):
        ids = torch.randint(0, 256, (length,), generator=self.generator).tolist()
        return text_segment(ids, self.tokens, loss=loss)

    def picture(self, kind: str, rows: int, columns: int):
        vision, transformer = self.pipe.vision_model.config, self.pipe.transformer.config
        patch = vision.patch_size**2 * vision.num_channels
        channels = patch if kind == "vit" else transformer.latent_channels * transformer.latent_patch_size**2
        data = torch.randn(rows * columns, channels, generator=self.generator)
        return image_segment(kind, (rows, columns), self.tokens, data)

    def samples(self) -> dict[str, list]:
        """One sample of each shape: references from none to two, sizes all different."""
        return {
            "text to image": [self.text(5), self.picture("noise", 3, 2)],
            "one reference": [*self.reference(2, 2), self.text(7), self.picture("noise", 1, 4)],
            "two references": [
                *self.reference(3, 1),
                *self.reference(2, 4),
                self.text(3),
                self.picture("noise", 4, 4),
            ],
            "answer": [self.picture("vit", 2, 3), self.text(4), self.text(6, loss=True)],
            "text alone": [self.text(3), self.text(5, loss=True)],
        }

    def reference(self, rows: int, columns: int) -> list:
        return [self.picture("vae", rows, columns), self.picture("vit", columns, rows)]


def forward(pipe, samples: list[list], dtype: torch.dtype = torch.float32, models=None):
    """Velocities, logits and hidden states of packed samples, sample by sample; clean pictures stay clean (t = 0)."""
    transformer, vision_model = models or (pipe.transformer, pipe.vision_model)
    sequence = pipe.pack(samples)
    vision = None
    if sequence.patches is not None:
        vision = vision_model(sequence.patches, sequence.patch_position_ids, sequence.patch_lengths).embeds
    time = None if sequence.latents is None else torch.where(sequence.gen_noised, 0.6, 0.0)
    index = torch.arange(len(sequence.input_ids))
    with torch.no_grad():
        out = transformer(sequence.latents, time, sequence, vision, logit_index=index)
    parts = []
    for spans in sequence.spans:
        und, gen = (slice(getattr(spans[0], s).start, getattr(spans[-1], s).stop) for s in ("und", "gen"))
        parts.append((out.sample[gen].float(), out.logits[und].float(), out.und_states[und], out.gen_states[gen]))
    return parts


def test_a_packed_batch_equals_its_samples_alone(pipe):
    samples = Maker(pipe).samples()
    together = forward(pipe, list(samples.values()))
    for (name, sample), part in zip(samples.items(), together, strict=True):
        for got, want in zip(part, forward(pipe, [sample])[0], strict=True):
            torch.testing.assert_close(got, want, **FORWARD, msg=lambda text, name=name: f"{name}: {text}")


def test_changing_one_sample_leaves_the_others_alone(pipe):
    samples, others = Maker(pipe).samples(), Maker(pipe, seed=1).samples()
    before = forward(pipe, list(samples.values()))
    for index, name in enumerate(samples):
        changed = [*samples.values()]
        changed[index] = others[name]
        after = forward(pipe, changed)
        for other in range(len(changed)):
            difference = max((a - b).abs().max().item() for a, b in zip(before[other], after[other]) if a.numel())
            assert (difference > 1e-3) if other == index else (difference <= 1e-6), (name, other, difference)


def test_a_sample_of_another_size_leaves_the_others_alone(pipe):
    """Nothing is padded: a much larger neighbour changes the shapes of the batch and nothing else."""
    maker = Maker(pipe)
    sample = maker.samples()["two references"]
    large = [*maker.reference(7, 9), maker.text(50), maker.picture("noise", 12, 13)]
    alone, beside = forward(pipe, [sample])[0], forward(pipe, [large, sample, large])[1]
    for got, want in zip(beside, alone, strict=True):
        torch.testing.assert_close(got, want, **FORWARD)


def test_dropped_segments_are_as_if_they_had_never_been(pipe):
    """Condition dropout leaves no tokens; only a dropped picture's position stays spent."""
    maker = Maker(pipe)
    vae, vit = maker.reference(2, 3)
    text, noise = maker.text(4), maker.picture("noise", 2, 2)
    got = forward(pipe, [[drop(vae), vit, drop(text), noise]])[0]
    sequence = pipe.pack([[drop(vae), vit, drop(text), noise]])
    assert len(sequence.input_ids) == 2 + vit.size + 2 and sequence.und_position[0] == 1
    for a, b in zip(got, forward(pipe, [[vit, noise]])[0], strict=True):
        torch.testing.assert_close(a, b, **FORWARD)  # rotary angles are relative


def test_a_batch_of_prompts_equals_its_prompts_alone(pipe, pictures):
    """Different numbers of references, sizes and interleaving in one call, each with noise of its own."""
    a, b, c, d = (pictures[f"img_{x}"] for x in "abcd")
    inputs = [["a red dot"], [a, "make it blue"], [b, c, "both, please"], [d, "like this", a, "and this"], ["dots", c]]
    sizes = {"height": [32, None, None, 48, None], "width": [64, None, None, 32, None]}
    options = {"num_inference_steps": 4, "output_type": "latent"}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(len(inputs))]

    together = pipe(inputs=inputs, generator=generators(), **sizes, **options).images
    for index, generator in enumerate(generators()):
        size = {key: value[index] for key, value in sizes.items()}
        alone = pipe(inputs=inputs[index], generator=generator, **size, **options).images[0]
        torch.testing.assert_close(together[index], alone, **TRAJECTORY)


def test_another_prompt_in_the_batch_changes_nothing(pipe, pictures):
    options = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 32}

    def draw(text, picture):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(
            [text, "the one to keep"], image=[picture, pictures["img_b"]], generator=generators, **options
        ).images

    first, second = draw("a dot", pictures["img_a"]), draw("a line", pictures["img_c"])
    assert (first[0] - second[0]).abs().max() > 1e-3
    assert (first[1] - second[1]).abs().max() <= 1e-6


def test_thinking_in_a_batch_equals_thinking_alone(pipe, pictures):
    prompts, images = ["make it bigger", "two dots"], [[pictures["img_d"]], []]
    options = {"num_inference_steps": 3, "output_type": "latent", "think": True, "max_think_tokens": 6}
    options |= {"height": 32, "width": 32}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    together = pipe(prompts, image=images, generator=generators(), **options)
    for index, generator in enumerate(generators()):
        alone = pipe(prompts[index], image=images[index] or None, generator=generator, **options)
        assert alone.texts[0] == together.texts[index]
        torch.testing.assert_close(alone.images[0], together.images[index], **TRAJECTORY)


@pytest.mark.parametrize("pictures_per_prompt", [1, 3])
def test_images_of_a_prompt_need_one_reading(pipe, pictures, monkeypatch, pictures_per_prompt):
    """The tokens of the context pass the transformer once, however many pictures are drawn."""
    clean, forward = [], pipe.transformer.forward

    def counting(hidden_states, timestep, sequence, *args, **kwargs):
        if not bool(sequence.gen_noised.any()):
            clean.append(len(sequence.input_ids) + len(sequence.gen_segment))
        return forward(hidden_states, timestep, sequence, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", counting)
    encodings, encode = [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: (encodings.append(x), encode(x))[1])
    count = {"num_images_per_prompt": pictures_per_prompt, "num_inference_steps": 2}
    images = pipe("a dot", image=[pictures["img_a"], pictures["img_d"]], **count).images
    text, latents, patches = len(pipe.text_segment("a dot")), (2 * 4 + 2) + (2 * 2 + 2), (2 * 4 + 2) + (2 * 2 + 2)
    assert len(images) == pictures_per_prompt
    assert clean == [latents + patches, 2 * text]  # the pictures; the text behind them, and once more without them
    assert len(encodings) == 2


@pytest.mark.parametrize("name", ["text to image", "two references"])
def test_bfloat16_stays_close_to_float32(pipe, name):
    sample = Maker(pipe).samples()[name]
    low = [copy.deepcopy(model).to(torch.bfloat16) for model in (pipe.transformer, pipe.vision_model)]
    noised = pipe.pack([sample]).gen_noised
    want, got = (forward(pipe, [sample], models=models)[0][0][noised] for models in (None, low))
    assert torch.linalg.vector_norm(got - want) <= 2e-2 * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("names", [["text to image"], ["answer"], ["text alone"], ["one reference", "text alone"]])
def test_training_works_without_images_of_a_kind(pipe, names):
    """No ViT picture, no VAE picture, no labelled text: losses are finite and every parameter gets a gradient, so that
    processes with different batches agree on what to reduce."""
    samples = [Maker(pipe).samples()[name] for name in names]
    sequence = pipe.pack(samples)
    noised = None
    if sequence.latents is not None:
        shape = sequence.latents[sequence.gen_noised].shape
        noised = add_noise(sequence, torch.randn(shape), torch.zeros(len(samples) if len(names) == 1 else 1), 1.0)
    models = [copy.deepcopy(model).requires_grad_(True).train() for model in (pipe.transformer, pipe.vision_model)]
    terms = bagel_losses(*models, sequence, noised)
    loss = sum(values.sum() / max(1, values.numel()) for values in (terms.mse, terms.cross_entropy))
    assert torch.isfinite(loss) and loss > 0
    loss.backward()
    parameters = [item for model in models for item in model.named_parameters()]
    assert [name for name, parameter in parameters if parameter.grad is None] == []
    assert all(bool(torch.isfinite(parameter.grad).all()) for _, parameter in parameters)
