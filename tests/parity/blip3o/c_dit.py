"""The diffusion head: single forward passes, what happens inside, and sampling runs."""

from __future__ import annotations

import torch

from echo4o.modeling.blip3o.sampling_blip3o import sample_features

from ..golden import GoldenFile, Record
from ..report import Check
from .golden_set import GoldenSet
from .tolerances import FORWARD, TRAJECTORY, close

# Times of the pass with a zero condition, which the file does not name; others are searched for.
ZERO_CONDITION_TIMES = (700.0, 200.0, 3.0)


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    arguments, tensors, model = file.json["arguments"], file.tensors, golden.pipeline.transformer
    x, z = tensors["x"], tensors["z"]
    for number, (name, times) in enumerate(arguments["forward_timesteps"].items()):
        with check.trying(f"forward.{name}"):
            inside: dict[str, torch.Tensor] = {}
            hooks = _watch(model, inside)
            out = model(x, torch.tensor(times), z, return_dict=False)[0]
            for hook in hooks:
                hook.remove()
            close(check, f"forward.{name}", out, tensors[f"forward.{name}"])
            if number == 0:
                for part in tensors.under("inside"):
                    close(check, f"inside.{part}", inside[part], tensors[f"inside.{part}"])
    with check.trying("forward.zero_condition"):
        _check_zero_condition(model, x, z, tensors["forward.zero_condition"], check)
    with check.trying("freqs_cis"):
        want = tensors["freqs_cis_real"]
        angles = model.rotary_angles(*want.shape[:2])
        close(check, "freqs_cis_real", torch.view_as_real(angles), want)
        # The original keeps a table for 384 x 384 tokens; ours is computed for the tokens that there are.
        shape = arguments["rope_check"]["freqs_cis_shape"]
        check("freqs_cis_shape", list(model.rotary_angles(shape[0], shape[1]).shape), shape)
    for name, run in arguments["runs"].items():
        with check.trying(name):
            _check_run(golden, run, tensors["cond"], tensors.under(name), check.of(name))
    arguments.note("note")


def _watch(model, inside: dict[str, torch.Tensor]) -> list:
    modules = {"time_caption_embed": model.time_caption_embed, "caption_projection": model.caption_projection}
    modules |= {f"layer.{number}": layer for number, layer in enumerate(model.layers)}
    return [m.register_forward_hook(lambda _, args, out, n=n: inside.update({n: out})) for n, m in modules.items()]


def _check_zero_condition(model, x: torch.Tensor, z: torch.Tensor, want: torch.Tensor, check: Check) -> None:
    """The file does not say at which times this pass was made: a row passes at any whole time, and there must be one."""
    zeros, scale = torch.zeros_like(z), want.abs().clamp_min(1)
    times = torch.tensor(ZERO_CONDITION_TIMES[: len(x)] + (0.0,) * (len(x) - len(ZERO_CONDITION_TIMES)))
    best = model(x, times, zeros, return_dict=False)[0]

    def off(values: torch.Tensor) -> torch.Tensor:
        return ((values - want).abs() / scale).flatten(1).max(1).values

    for time in range(1001):
        wrong = off(best) > FORWARD
        if not wrong.any():
            break
        other = model(x, torch.full((len(x),), float(time)), zeros, return_dict=False)[0]
        better = off(other) < off(best)
        best = torch.where(better[:, None, None, None], other, best)
    close(check, "forward.zero_condition", best, want)


def _check_run(golden: GoldenSet, run: Record, conditions: torch.Tensor, tensors, check: Check) -> None:
    pipe, noise, seen, given = golden.pipeline, tensors["noise"], {}, []
    per_prompt, steps = run.get("num_images_per_prompt", 1), run["num_inference_steps"]
    condition = conditions[: len(noise) // per_prompt].repeat_interleave(per_prompt, dim=0)
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args: given.append(args[1]))
    out = sample_features(
        pipe.transformer,
        pipe.scheduler,
        condition,
        noise,
        steps,
        run["guidance_scale"],
        lambda step, velocity, features: seen.update({step: (velocity, features)}),
    )
    hook.remove()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    close(check, "sigmas", scheduler.sigmas, tensors["sigmas"])
    close(check, "timesteps", scheduler.timesteps, tensors["timesteps"])
    check("timesteps_given_to_dit", torch.stack([t[0] for t in given]), tensors["timesteps_given_to_dit"])
    for step, (velocity, features) in seen.items():
        if f"velocity.{step}" in tensors:
            close(check, f"velocity.{step}", velocity, tensors[f"velocity.{step}"], TRAJECTORY)
            close(check, f"after.{step}", features, tensors[f"after.{step}"], TRAJECTORY)
    close(check, "latents", out, tensors["latents"], TRAJECTORY)
