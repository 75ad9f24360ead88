"""Trains the VAE of the quickstart: the architecture of FLUX with 16 latent channels, small enough for one CPU thread.

Every width is a multiple of 32: the original code of FLUX has 32 groups in each normalisation and its layout does not
store this number, so only such a model survives the conversion to the original layout and back.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
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
    """Settings of the training. Its length is counted in steps, so the weights do not depend on the speed of the machine.

    ``minutes`` limits the time: progress is then the larger of the shares of steps and of minutes, and it determines the
    learning rate and the change from crops to full images.
    """

    small_steps: int = 7000  # on crops of 2 x 2 cells, where a step is fast
    whole_steps: int = 2500
    decoder_steps: int = 300  # after normalising the latents
    small_batch: int = 8
    whole_batch: int = 4
    measured: int = 256  # images whose latents determine the normalisation
    lr: float = 2e-3
    kl_weight: float = 3e-4
    seed: int = 0
    minutes: float | None = None


def train_vae(settings: VaeTraining, say: Callable[[str], None] = print) -> AutoencoderKL:
    """Trains the VAE from random weights and normalises its latents. Returns it in float32 and eval mode."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    vae = AutoencoderKL(**CONFIG)
    start_as_linear(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    steps = settings.small_steps + settings.whole_steps
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = settings.lr * _schedule(progress)
        small = progress < settings.small_steps / steps
        images = training_images(settings.small_batch if small else settings.whole_batch, rng, 2 if small else GRID)
        loss = _loss(vae, images, settings.kl_weight)
        _update(optimizer, loss)
        seconds = time.monotonic() - start
        if step % 250 == 0:
            say(f"VAE step {step}/{steps}: loss {loss.item():.4f}, {seconds:.0f} s")
        step += 1
        progress = max(step / steps, seconds / 60 / settings.minutes if settings.minutes else 0.0)
    normalise_latents(vae, training_images(settings.measured, rng))
    _tune_decoder(vae, settings, rng)
    say(f"VAE trained for {step} steps in {time.monotonic() - start:.0f} s")
    return vae.eval()


def _posterior(vae: AutoencoderKL, images: torch.Tensor) -> DiagonalGaussianDistribution:
    return cast(AutoencoderKLOutput, vae.encode(images)).latent_dist


def _decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    return cast(DecoderOutput, vae.decode(cast(torch.FloatTensor, latents))).sample


def _loss(vae: AutoencoderKL, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    posterior = _posterior(vae, images)
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return _error(_decoded(vae, posterior.sample()), images) + kl_weight * divergence


def _schedule(progress: float) -> float:
    """Factor of the learning rate: a short warm-up, then a linear decay to 2%."""
    return min(1.0, progress * 100 + 0.02) * (0.02 + 0.98 * (1 - progress))


def _error(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    difference = decoded - images
    return difference.abs().mean() + difference.square().mean()


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def start_as_linear(vae: AutoencoderKL) -> None:
    """Initialises the VAE as a linear autoencoder: residual branches zero, other convolutions orthogonal, small latent noise.

    With the default initialisation, the output of the random branches is much larger than the colours of the image, and
    the VAE decodes grey images for the first thousands of steps.
    """
    latents = vae.config["latent_channels"]
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith(("conv2", "to_out.0")):
                for parameter in module.parameters(recurse=False):
                    parameter.zero_()
            elif isinstance(module, nn.Conv2d) and ("sampler" in name or name.endswith(("conv_in", "conv_shortcut"))):
                nn.init.orthogonal_(module.weight)
                _bias(module).zero_()
        out = vae.encoder.conv_out
        out.weight[:latents] *= 3
        out.weight[latents:].zero_()
        _bias(out)[latents:] = -5.0


def _bias(convolution: nn.Conv2d) -> torch.Tensor:
    if convolution.bias is None:
        raise ValueError("every convolution of the VAE has a bias")
    return convolution.bias


def training_images(number: int, rng: np.random.Generator, cells: int = GRID) -> torch.Tensor:
    """Renders random scenes with many objects: (number, 3, cells * 16, cells * 16) in [-1, 1].

    Objects are in the centres of the cells, as in all of Shapes-4o, so the VAE encodes only such images. The background
    is constant: a VAE that encodes the varying backgrounds of the rows spends a third of the variance of its latents on
    them, and the model that predicts these latents learns half as fast.
    """
    shapes, colours, sizes = rng.integers((len(SHAPES), len(COLOURS), 4), size=(number, GRID * GRID, 3)).transpose(
        2, 0, 1
    )
    occupied = rng.random((number, GRID * GRID)) < rng.uniform(0.1, 0.9, (number, 1))
    names = (*SIZES, "medium")
    images = [
        render(
            [
                SceneObject(
                    SHAPES[shapes[n, i]],
                    list(COLOURS)[colours[n, i]],
                    int(i // GRID),
                    int(i % GRID),
                    names[sizes[n, i]],
                )
                for i in np.flatnonzero(occupied[n])
                if i // GRID < cells and i % GRID < cells
            ],
        )
        for n in range(number)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels[:, : cells * CELL, : cells * CELL].permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Changes the weights so that every latent channel has mean 0 and variance 1 over `images`.

    The configuration and the original layout have one shift and one scale for all channels. The values of each channel
    are therefore folded into the last convolution of the encoder and the first one of the decoder. Because the decoder
    pads latents with zeros, which now stand for the mean, its output changes at the borders: tune it afterwards.

    The standard deviation of the sampled noise is divided by e^1.5. Without this it would be up to 0.8 of the standard
    deviation of a channel, most of the error of a model that predicts the latents.
    """
    channels = vae.config["latent_channels"]
    latents = _posterior(vae, images).mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:channels] /= std[:, None, None, None]
    bias = _bias(out)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log() + 3.0
    _bias(into).add_((into.weight * mean[:, None, None]).sum((1, 2, 3)))
    into.weight *= std[:, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def _tune_decoder(vae: AutoencoderKL, settings: VaeTraining, rng: np.random.Generator) -> None:
    """Trains the decoder on fixed latents: it adapts to the changed borders and to the smaller noise."""
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), settings.lr / 10, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.decoder_steps):
        optimizer.param_groups[0]["lr"] = settings.lr / 10 * (1 - step / settings.decoder_steps)
        images = training_images(settings.whole_batch, rng)
        with torch.no_grad():
            latents = _posterior(vae, images).sample()
        _update(optimizer, _error(_decoded(vae, latents), images))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> np.ndarray:
    """Encodes and decodes images in [-1, 1]; returns uint8 (n, height, width, 3)."""
    decoded = _decoded(vae, _posterior(vae, images.to(vae.dtype)).mode())
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
