"""Trains the quickstart's VAE: FLUX's architecture, small enough for one thread, with 16 latent channels.

Every width is a multiple of 32, because FLUX's original code has 32 groups in each normalisation and the conversion to
the original layout, which stores no such number, must give back the same model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from echo4o.evaluation.benchmarks.shapes4o.rendering import render
from echo4o.evaluation.benchmarks.shapes4o.scene import CELL, COLOURS, GRID, IMAGE_SIZE, SHAPES, SIZES, SceneObject

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": IMAGE_SIZE,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class VaeTraining:
    """How the VAE is trained. Counted in steps, so that a slow machine gives the same weights as a fast one.

    ``minutes``, where given, ends the training earlier if the steps are not done by then: the learning rate and the
    change to whole pictures follow whichever of the two is further on.
    """

    small_steps: int = 7000  # on crops of 2 x 2 cells, where a step is cheap
    whole_steps: int = 2500
    decoder_steps: int = 300  # after the latents are normalised
    small_batch: int = 8
    whole_batch: int = 4
    measured: int = 256  # pictures whose latents are measured for the normalisation
    lr: float = 2e-3
    kl_weight: float = 3e-4
    seed: int = 0
    minutes: float | None = None


def train_vae(settings: VaeTraining, say: Callable[[str], None] = print) -> AutoencoderKL:
    """Trains the VAE from random weights and normalises its latents; float32, in eval mode."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    vae = AutoencoderKL(**CONFIG)
    start_as_linear(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    steps = settings.small_steps + settings.whole_steps
    began, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        optimizer.param_groups[0]["lr"] = settings.lr * _schedule(done)
        small = done < settings.small_steps / steps
        pictures = pictures_for_training(
            settings.small_batch if small else settings.whole_batch, rng, 2 if small else GRID
        )
        loss = _loss(vae, pictures, settings.kl_weight)
        _update(optimizer, loss)
        seconds = time.monotonic() - began
        if step % 250 == 0:
            say(f"VAE step {step}/{steps}: loss {loss.item():.4f}, {seconds:.0f} s")
        step += 1
        done = max(step / steps, seconds / 60 / settings.minutes if settings.minutes else 0.0)
    normalise_latents(vae, pictures_for_training(settings.measured, rng))
    _tune_decoder(vae, settings, rng)
    say(f"VAE trained for {step} steps in {time.monotonic() - began:.0f} s")
    return vae.eval()


def _loss(vae: AutoencoderKL, pictures: torch.Tensor, kl_weight: float) -> torch.Tensor:
    posterior = vae.encode(pictures).latent_dist
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return _error(vae.decode(posterior.sample()).sample, pictures) + kl_weight * divergence


def _schedule(done: float) -> float:
    """The learning rate's factor: a short warm-up, then down to almost nothing."""
    return min(1.0, done * 100 + 0.02) * (0.02 + 0.98 * (1 - done))


def _error(drawn: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    difference = drawn - pictures
    return difference.abs().mean() + difference.square().mean()


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def start_as_linear(vae: AutoencoderKL) -> None:
    """Starts from a linear autoencoder: residual branches silent, the rest orthogonal, almost no latent noise.

    From the usual random weights the pictures' colours drown in what the random branches add, and training spends its
    first thousands of steps on a grey average.
    """
    latents = vae.config.latent_channels
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith(("conv2", "to_out.0")):
                module.weight.zero_()
                module.bias.zero_()
            elif isinstance(module, nn.Conv2d) and ("sampler" in name or name.endswith(("conv_in", "conv_shortcut"))):
                nn.init.orthogonal_(module.weight)
                module.bias.zero_()
        out = vae.encoder.conv_out
        out.weight[:latents] *= 3
        out.weight[latents:].zero_()
        out.bias[latents:] = -5.0


def pictures_for_training(number: int, rng: np.random.Generator, cells: int = GRID) -> torch.Tensor:
    """Crowded scenes without any prompt: (number, 3, cells * 16, cells * 16) in [-1, 1].

    Objects stand in the cells' middles, as in all of Shapes-4o, so this VAE is for these pictures alone. The background
    is always the same: a VAE that learns to keep the rows' different backgrounds spends a third of its latents'
    variance on them, and the model that must predict those latents learns half as fast.
    """
    shapes, colours, sizes = rng.integers((len(SHAPES), len(COLOURS), 4), size=(number, GRID * GRID, 3)).transpose(
        2, 0, 1
    )
    there = rng.random((number, GRID * GRID)) < rng.uniform(0.1, 0.9, (number, 1))
    names = (*SIZES, "medium")
    pictures = [
        render(
            [
                SceneObject(
                    SHAPES[shapes[n, i]], list(COLOURS)[colours[n, i]], i // GRID, i % GRID, names[sizes[n, i]]
                )
                for i in np.flatnonzero(there[n])
                if i // GRID < cells and i % GRID < cells
            ],
        )
        for n in range(number)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels[:, : cells * CELL, : cells * CELL].permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1, inside the weights.

    The configuration has room for one shift and one scale for all channels, and the original layout for no more, so
    each channel's own are folded into the encoder's last and the decoder's first convolution. The decoder pads with
    zeros, which meant "no latent" before and means "the mean" after, so borders change: tune the decoder afterwards.

    The latents' noise, which kept them smooth while the VAE learned, is divided by e^1.5: up to 0.8 of a channel's
    spread after the scaling, it would be most of what the model cannot predict.
    """
    channels = vae.config.latent_channels
    latents = vae.encode(pictures).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log() + 3.0
    into.bias += (into.weight * mean[:, None, None]).sum((1, 2, 3))
    into.weight *= std[:, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def _tune_decoder(vae: AutoencoderKL, settings: VaeTraining, rng: np.random.Generator) -> None:
    """Trains the decoder on fixed latents: borders after the fold, and latents without the encoder's own noise."""
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), settings.lr / 10, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.decoder_steps):
        optimizer.param_groups[0]["lr"] = settings.lr / 10 * (1 - step / settings.decoder_steps)
        pictures = pictures_for_training(settings.whole_batch, rng)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample()
        _update(optimizer, _error(vae.decode(latents).sample, pictures))


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: torch.Tensor) -> np.ndarray:
    """The pictures encoded and decoded again: uint8 (n, height, width, 3)."""
    drawn = vae.decode(vae.encode(pictures.to(vae.dtype)).latent_dist.mode()).sample
    return ((drawn.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
