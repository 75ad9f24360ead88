"""BAGEL's objective: rectified flow on noised pictures, cross-entropy on labelled text (Echo-4o, section 3).

Nothing here draws a random number: noise and times are inputs. They come from generators that are named by sample
([`named_generator`]), so that a run sees the same draws however its samples are batched or spread over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from echo4o.modeling.bagel.segments_bagel import NO_LABEL, PackedSequence


def named_generator(seed: int, sample_id: str, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its name alone: the run's seed, the sample, the epoch and what it is used for."""
    name = f"{seed}\0{epoch}\0{purpose}\0{sample_id}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big"))


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move times in [0, 1] towards noise (t = 1) for `shift` > 1: s*t / (1 + (s-1)*t)."""
    return shift * t / (1 + (shift - 1) * t)


class NoisedLatents(NamedTuple):
    """What the transformer reads and what it should answer."""

    hidden_states: torch.Tensor  # (G, C) clean latent tokens stay, noised ones are (1-t)*x0 + t*noise
    timestep: torch.Tensor  # (G,) 0 at clean tokens
    target: torch.Tensor  # (N, C) noise - x0 at the N noised tokens


def add_noise(sequence: PackedSequence, noise: torch.Tensor, raw_time: torch.Tensor, shift: float) -> NoisedLatents:
    """Noise the sequence's `noise` segments.

    Args:
        sequence: must carry the clean latents of all its VAE segments.
        noise: (N, C) standard normal, for the noised tokens in the sequence's order.
        raw_time: (P,) standard normal, one per noised picture; the time is sigmoid(raw_time), shifted.
        shift: the training shift (1 leaves the logit-normal as it is).
    """
    noised = sequence.gen_noised
    pictures, picture = torch.unique_consecutive(sequence.gen_segment[noised], return_inverse=True)
    if raw_time.shape != pictures.shape or noise.shape != sequence.latents[noised].shape:
        raise ValueError(
            f"The batch has {len(pictures)} noised pictures and noised tokens of shape "
            f"{tuple(sequence.latents[noised].shape)}, but got {tuple(raw_time.shape)} times and noise of shape "
            f"{tuple(noise.shape)}."
        )
    time = shift_time(torch.sigmoid(raw_time.float()), shift)[picture]  # (N,)
    clean = sequence.latents[noised]
    mixed = (1 - time[:, None]) * clean + time[:, None] * noise
    timestep = torch.zeros(len(noised), device=noise.device).masked_scatter(noised, time)
    hidden_states = sequence.latents.masked_scatter(noised[:, None], mixed.to(clean.dtype))
    return NoisedLatents(hidden_states, timestep, noise - clean)


class LossTerms(NamedTuple):
    """Losses per token, so that sums and denominators can be taken over processes and accumulation steps.

    The mean losses are `mse.sum() / mse.numel()` and `cross_entropy.sum() / len(cross_entropy)`, or, reweighted,
    `(cross_entropy * weights).sum() / weights.sum()`.
    """

    mse: torch.Tensor  # (N, C) squared error of the velocity at every noised token and channel
    cross_entropy: torch.Tensor  # (L,) at every labelled token
    weights: torch.Tensor  # (L,) the square-root weights of the labels

    def sums(self, reweight: bool = False) -> torch.Tensor:
        """(4,): mse sum, mse count, cross-entropy sum, cross-entropy count (or sum of weights)."""
        weights = self.weights if reweight else torch.ones_like(self.weights)
        count = self.mse.new_tensor(float(self.mse.numel()))
        return torch.stack([self.mse.sum(), count, (self.cross_entropy * weights).sum(), weights.sum()])


def _behind_logits(transformer) -> Iterator[torch.nn.Parameter]:
    """Parameters that have no gradient but through the logits."""
    for module in (transformer.lm_head, transformer.norm_out["und"], transformer.layers[-1].und):
        yield from module.parameters()


def loss_terms(transformer, vision_model, sequence: PackedSequence, noised: NoisedLatents | None) -> LossTerms:
    """One forward pass in training mode; `noised` is None for a batch without VAE pictures.

    What a batch has nothing for runs on nothing: every parameter is in every graph and gets a gradient, if only of
    zeros, so that processes with different batches agree on what to reduce.
    """
    patches, lengths = sequence.patches, sequence.patch_lengths
    if patches is None:
        values = vision_model.config.patch_size**2 * vision_model.config.num_channels
        patches, lengths = torch.zeros(0, values, device=sequence.input_ids.device), [0]
    vision = vision_model(patches, sequence.patch_position_ids, lengths).embeds
    labelled = (sequence.labels != NO_LABEL).nonzero()[:, 0]
    # Zero labels give zeros as gradients, at the price of a backward pass through the end of the und stream.
    asks = len(labelled) > 0 or any(p.requires_grad for p in _behind_logits(transformer))
    out = transformer(
        None if noised is None else noised.hidden_states,
        None if noised is None else noised.timestep,
        sequence,
        vision,
        logit_index=labelled if asks else None,
    )
    velocity = out.sample[sequence.gen_noised].float()  # (N, C)
    mse = (velocity if noised is None else velocity - noised.target.float()).square()
    cross_entropy = mse.new_zeros(0)
    if asks:
        cross_entropy = F.cross_entropy(out.logits.float(), sequence.labels[labelled], reduction="none")
    return LossTerms(mse, cross_entropy, sequence.label_weights[labelled])
