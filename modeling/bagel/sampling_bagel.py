"""From noise to latents: Euler steps over all pictures and guidance branches at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..common.step_cache import forget_updates, update_context
from .guidance_bagel import Guidance, guide
from .segments_bagel import SpecialTokens, image_segment


class Branch(NamedTuple):
    """What one guidance branch of a picture sees: the first `length` tokens of `cache`; the picture stands at rotary
    `position` after them."""

    cache: object
    length: int
    position: int


@dataclass
class Picture:
    """A picture being drawn."""

    grid: tuple[int, int]  # latent tokens (rows, columns)
    guidance: Guidance
    condition: Branch
    text_free: Branch  # a prefix of the condition
    image_free: Branch | None
    tokens: torch.Tensor | None = None  # (rows*columns, C) float32

    def branches(self, t: float) -> list[Branch]:
        """The branches that a step at time `t` evaluates, the condition first."""
        text, image = self.guidance.branches(t)
        return [self.condition, *([self.text_free] if text else []), *([self.image_free] if image else [])]


class Rows(NamedTuple):
    """All (picture, branch) rows of a step, packed."""

    sequence: object
    contexts: list
    owner: list[int]  # the picture of each row
    plan: object | None = None  # the transformer's, which the steps over these rows share


def pack_rows(pictures: list[Picture], t: float, tokens: SpecialTokens, pack: Callable) -> Rows:
    """Rows of a step at time `t`; they stay the same until a branch goes off. `pack`: the pipeline's."""
    owner = [index for index, picture in enumerate(pictures) for _ in picture.branches(t)]
    branches = [branch for picture in pictures for branch in picture.branches(t)]
    noised = [[image_segment("noise", pictures[index].grid, tokens)] for index in owner]
    sequence = pack(noised, [branch.position for branch in branches])
    return Rows(sequence, [branch.cache.first(branch.length) for branch in branches], owner)


def predict_velocity(transformer, pictures: list[Picture], t: float, rows: Rows) -> list[torch.Tensor]:
    """Guided velocity (noise - data) of every picture at time `t`: one (n, C) float32 tensor each."""
    tokens = torch.cat([pictures[index].tokens for index in rows.owner])  # (G, C)
    timestep = torch.full((1,), t, device=tokens.device)
    v = transformer(tokens, timestep, rows.sequence, contexts=rows.contexts, plan=rows.plan).sample.float()
    by_row = iter(v.split([len(pictures[index].tokens) for index in rows.owner]))
    velocities = []
    for picture in pictures:
        text, image = picture.guidance.branches(t)
        velocities.append(guide(*(next(by_row) if on else None for on in (True, text, image)), picture.guidance))
    return velocities


def sample(transformer, scheduler, pictures: list[Picture], steps: int, pack_at: Callable, on_step_end: Callable):
    """Integrate every picture's `tokens` from t = 1 (noise) to t = 0 (data) in `steps` updates of equal raw size.

    `pack_at(t)` packs the rows; `on_step_end(step, timestep)` runs after each update and returns True to stop.
    The scheduler shifts the times (tests/parity/golden/README.md, "Sampling").
    """
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=pictures[0].tokens.device)
    sizes = [len(picture.tokens) for picture in pictures]
    rows = pattern = None
    for step, timestep in enumerate(scheduler.timesteps):
        t = float(scheduler.sigmas[step])
        active = [picture.guidance.branches(t) for picture in pictures]
        if active != pattern:
            forget_updates(transformer)
            pattern, rows = active, pack_at(t)
            rows = rows._replace(plan=transformer.plan(rows.sequence, rows.contexts))
        with update_context(transformer):
            velocity = torch.cat(predict_velocity(transformer, pictures, t, rows))
        tokens = torch.cat([picture.tokens for picture in pictures])
        tokens = scheduler.step(velocity, timestep, tokens, return_dict=False)[0]
        for picture, part in zip(pictures, tokens.split(sizes), strict=True):
            picture.tokens = part
        if on_step_end(step, timestep):
            return
