"""BLIP3-o's objective: flow matching towards EVA-CLIP features, conditioned on the states of learned queries.

Noise, times and dropped conditions are arguments; this file samples no random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from echo4o.modeling.blip3o.conditions_blip3o import query_states


class TimeTable(NamedTuple):
    """The whole times of the scheduler, from noise to data, after its shift."""

    timesteps: torch.Tensor  # (N,) in 0..1000, float32
    sigmas: torch.Tensor  # (N,) share of the noise

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any]) -> TimeTable:
        """From the configuration of a `FlowMatchEulerDiscreteScheduler`."""
        fresh: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler_config))
        return cls(fresh.timesteps.float().cpu(), fresh.sigmas[: len(fresh.timesteps)].float().cpu())

    def index(self, u: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - not a search
        """Rows of the table for uniform numbers in [0, 1)."""
        return (u * len(self.timesteps)).long()


class NoisedFeatures(NamedTuple):
    """The head's input and target for a batch."""

    hidden_states: torch.Tensor  # (B, C, rows, columns): (1 - sigma) * features + sigma * noise
    timestep: torch.Tensor  # (B,)
    target: torch.Tensor  # (B, C, rows, columns): noise - features


def add_noise(features: torch.Tensor, noise: torch.Tensor, u: torch.Tensor, table: TimeTable) -> NoisedFeatures:
    """Noise image features.

    Args:
        features, noise: (B, C, rows, columns).
        u: (B,) uniform in [0, 1); one time per image.
    """
    index = table.index(u.cpu())
    timestep, sigma = (values[index].to(features.device) for values in table)
    share = sigma[:, None, None, None]
    return NoisedFeatures((1.0 - share) * features + share * noise, timestep, noise - features)


class HeadCondition(NamedTuple):
    """What the head is conditioned on: texts for the language model, or its states.

    Args:
        ids: token ids of each row up to and including `[IMG]`.
        pad_id, image_pad_id: token ids of padding and of images.
        images: row -> (T, hidden) embeddings of the row's image tokens.
        dropped: (B,) bool; these rows get an all-zero condition.
        states: (B, K, hidden) states of frozen queries, computed before; `ids` are unused then.
    """

    ids: Sequence[Sequence[int]]
    pad_id: int
    dropped: torch.Tensor
    states: torch.Tensor | None = None
    images: dict[int, torch.Tensor] | None = None
    image_pad_id: int | None = None


def blip3o_errors(
    transformer: Any, language_model: Any, noised: NoisedFeatures, condition: HeadCondition
) -> torch.Tensor:
    """(B, C, rows, columns) squared errors of the predicted velocity, in float32; their mean is the loss."""

    def states(queries: torch.Tensor) -> torch.Tensor:
        if condition.states is not None:
            computed = condition.states.to(queries)
        else:
            computed = query_states(
                language_model, condition.ids, queries, condition.pad_id, condition.images, condition.image_pad_id
            )
        dropped = condition.dropped.to(computed.device)[:, None, None]
        return computed.masked_fill(dropped, 0.0).to(transformer.dtype)

    predicted = transformer(noised.hidden_states.to(transformer.dtype), noised.timestep, states, return_dict=False)[0]
    return (predicted.float() - noised.target.float()).square()
