"""With a constant und expert, what precedes the first VAE segment needs no backward pass; the numbers do not change."""

import random

import pytest
import torch

from echo4o.modeling.bagel.segments_bagel import NO_LABEL, SpecialTokens, image_segment, pack, text_segment

TOKENS = SpecialTokens(317, 318, 325, 326)


def text(loss=False):
    return text_segment([random.randint(0, 250) for _ in range(random.randint(2, 9))], TOKENS, loss=loss)


def image(kind, grid=(2, 2)):
    return image_segment(kind, grid, TOKENS)


SAMPLES = {
    "text to image": lambda: [text(), image("noise", (3, 2))],
    "references": lambda: [image("vae"), image("vit"), text(), image("noise")],
    "answer about a picture": lambda: [image("vit"), text(), text(loss=True)],
    "chain": lambda: [text(), image("vit"), image("vae"), text(), image("noise"), text(), image("noise")],
}


@pytest.fixture
def transformer(pipe):
    model = pipe.transformer
    yield model.requires_grad_(False).train()
    model.requires_grad_(True).eval().disable_gradient_checkpointing()
    model.zero_grad()


def run(transformer, samples, device="cpu"):
    """Output and gradients of everything of the generation side."""
    sequence = pack(samples, latent_positions=16, patch_positions=16).to(device)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(sequence.gen_segment), 64, generator=generator).to(device)
    vision = torch.randn(len(sequence.vision_index), 64, generator=generator).to(device)
    learning = {n: p for n, p in transformer.named_parameters() if ".gen." in n or n.startswith("proj_")}
    for parameter in learning.values():
        parameter.requires_grad_(True).grad = None
    index = (sequence.labels != NO_LABEL).nonzero()[:, 0]
    time = torch.rand(len(latents), generator=generator).to(device)
    out = transformer(latents, time, sequence, vision, logit_index=index)
    loss = out.sample[sequence.gen_noised].pow(2).mean()
    loss.backward()
    return out, {n: p.grad.clone() for n, p in learning.items()}


def saved_bytes(transformer, samples) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass."""
    held, weights = {}, {parameter.data_ptr() for parameter in transformer.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run(transformer, samples)
    return sum(held.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kinds", [[kind] for kind in SAMPLES if kind != "answer about a picture"] + [list(SAMPLES)])
def test_equal_outputs_and_gradients(transformer, kinds, checkpointing):
    random.seed(1)
    samples = [SAMPLES[kind]() for kind in kinds]
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    out, gradients = run(transformer, samples)
    # One learning parameter of the und expert turns the short cut off.
    transformer.layers[0].und.norm1.weight.requires_grad_(True)
    whole, expected = run(transformer, samples)
    transformer.layers[0].und.norm1.weight.requires_grad_(False)
    for name in ("sample", "logits", "und_states"):
        torch.testing.assert_close(out[name], whole[name], atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_less_is_kept_for_the_backward_pass(transformer):
    random.seed(2)
    samples = [[text_segment(list(range(100)), TOKENS), image("noise")]]
    short = saved_bytes(transformer, samples)
    transformer.layers[0].und.norm1.weight.requires_grad_(True)
    assert short < 0.5 * saved_bytes(transformer, samples)


def test_a_batch_of_answers_alone_is_all_prefix(transformer):
    random.seed(3)
    samples = [SAMPLES["answer about a picture"]()]
    out, _ = run(transformer, samples)
    assert out.sample.shape == (0, 64) and torch.isfinite(out.logits).all()
