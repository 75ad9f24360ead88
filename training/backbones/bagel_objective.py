"""BAGEL's objective: rectified flow on noised images, cross-entropy on labelled text (Echo-4o, section 3).

Noise and times are arguments; this file samples no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from echo4o.modeling.bagel.segments_bagel import NO_LABEL, PackedSequence


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move times in [0, 1] towards noise (t = 1) for `shift` > 1: s*t / (1 + (s-1)*t)."""
    return shift * t / (1 + (shift - 1) * t)


def raw_time_of(time: float, shift: float) -> float:
    """The raw time that [`add_noise`] turns into `time`, in (0, 1]; infinity for 1."""
    if time >= 1:
        return math.inf
    unshifted = time / (shift - (shift - 1) * time)
    return math.log(unshifted / (1 - unshifted))


class NoisedLatents(NamedTuple):
    """The transformer's input and target for the noised images of a batch."""

    hidden_states: torch.Tensor  # (G, C) clean latent tokens stay, noised ones are (1-t)*x0 + t*noise
    timestep: torch.Tensor  # (G,) 0 at clean tokens
    target: torch.Tensor  # (N, C) noise - x0 at the N noised tokens


def add_noise(sequence: PackedSequence, noise: torch.Tensor, raw_time: torch.Tensor, shift: float) -> NoisedLatents:
    """Noise the sequence's `noise` segments.

    Args:
        sequence: must carry the clean latents of all its VAE segments.
        noise: (N, C) standard normal, for the noised tokens in the sequence's order.
        raw_time: (P,) standard normal, one per noised image; the time is sigmoid(raw_time), shifted.
        shift: the training shift; 1 keeps the logit-normal distribution.

    Raises:
        ValueError: `noise` or `raw_time` has another size than the sequence asks for.
    """
    noised, latents = sequence.gen_noised, sequence.latents
    assert latents is not None
    images, image = torch.unique_consecutive(sequence.gen_segment[noised], return_inverse=True)
    if raw_time.shape != images.shape or noise.shape != latents[noised].shape:
        raise ValueError(
            f"The batch has {len(images)} noised images and noised tokens of shape "
            f"{tuple(latents[noised].shape)}, but got {tuple(raw_time.shape)} times and noise of shape "
            f"{tuple(noise.shape)}."
        )
    time = shift_time(torch.sigmoid(raw_time.float()), shift)[image]  # (N,)
    clean = latents[noised]
    mixed = (1 - time[:, None]) * clean + time[:, None] * noise
    timestep = torch.zeros(len(noised), device=noise.device).masked_scatter(noised, time)
    hidden_states = latents.masked_scatter(noised[:, None], mixed.to(clean.dtype))
    return NoisedLatents(hidden_states, timestep, noise - clean)


class BagelLosses(NamedTuple):
    """Losses per token, before any reduction."""

    mse: torch.Tensor  # (N, C) squared error of the velocity at every noised token and channel
    cross_entropy: torch.Tensor  # (L,) at every labelled token
    weights: torch.Tensor  # (L,) square-root weights of the labels
    correct: torch.Tensor | None  # (L,) without gradients: whether the likeliest token is the label


def _only_used_for_logits(transformer) -> Iterator[torch.nn.Parameter]:
    """Parameters that get a gradient from the logits alone."""
    for module in (transformer.lm_head, transformer.norm_out["und"], transformer.layers[-1].und):
        yield from module.parameters()


def bagel_losses(transformer, vision_model, sequence: PackedSequence, noised: NoisedLatents | None) -> BagelLosses:
    """One forward pass in training mode; `noised` is None for a batch without VAE images.

    Inputs that a batch lacks become empty tensors, so every parameter gets a (zero) gradient and all ranks reduce the
    same set.
    """
    patches, lengths = sequence.patches, sequence.patch_lengths
    if patches is None:
        values = vision_model.config.patch_size**2 * vision_model.config.num_channels
        patches, lengths = torch.zeros(0, values, device=sequence.input_ids.device), [0]
    vision = vision_model(patches, sequence.patch_position_ids, lengths).embeds  # (V, hidden)
    labelled = (sequence.labels != NO_LABEL).nonzero()[:, 0]  # (L,)
    # Without labels the logits only give zero gradients; skip them when no trainable parameter needs even those.
    needs_logits = len(labelled) > 0 or any(p.requires_grad for p in _only_used_for_logits(transformer))
    out = transformer(
        None if noised is None else noised.hidden_states,
        None if noised is None else noised.timestep,
        sequence,
        vision,
        logit_index=labelled if needs_logits else None,
    )
    velocity = out.sample[sequence.gen_noised].float()  # (N, C)
    mse = (velocity if noised is None else velocity - noised.target.float()).square()
    cross_entropy, correct = mse.new_zeros(0), None
    if needs_logits:
        labels = sequence.labels[labelled]
        cross_entropy = F.cross_entropy(out.logits.float(), labels, reduction="none")
        correct = None if torch.is_grad_enabled() else out.logits.argmax(-1) == labels
    return BagelLosses(mse, cross_entropy, sequence.label_weights[labelled], correct)
