"""The benchmarks' yardstick computes what ours does: else the comparison would mean nothing."""

import numpy as np
import pytest
import torch

from benchmarks.plain_model import PlainBagel, PlainContext, noised
from echo4o.modeling.bagel.guidance_bagel import Guidance

STEPS = 4


@pytest.mark.parametrize("names", [[], ["img_a"], ["img_b", "img_c"]])
@torch.no_grad()
def test_a_whole_image_is_the_same(pipe, pictures, names):
    """The prompt, its references, every branch and every update."""
    guidance = Guidance(4.0, 2.0 if names else 1.0, (0.4, 1.0), "text_channel")
    noise = torch.randn(16, pipe.transformer.proj_in.in_features, generator=torch.Generator().manual_seed(0))
    latents = pipe.transformer.config.latent_channels, 8, 8
    images = [pictures[name] for name in names]
    segments = [pipe.text_segment("make it blue")]
    generator = torch.Generator().manual_seed(1)
    for image in reversed(images):
        segments.insert(0, pipe.vision_segment(pipe.vae_limits.resize(image)))
    for index, image in enumerate(images):
        segments.insert(2 * index, pipe.latent_segment(pipe.vae_limits.resize(image), generator))

    plain, contexts = PlainBagel(pipe.transformer), [PlainContext() for _ in range(3)]
    for segment in segments:
        embeds = None
        if segment.kind == "vit":
            sequence = pipe.pack([[segment]])
            embeds = pipe.vision_embeds(sequence)
        for context, reads in zip(contexts, (True, segment is not segments[-1], segment.kind == "text"), strict=True):
            if reads:
                plain.read(context, segment, embeds)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, STEPS + 1)[:-1])
    sigmas, tokens = pipe.scheduler.sigmas.tolist(), noise
    picture = noised((4, 4), pipe.special_tokens)
    for t, after in zip(sigmas, sigmas[1:]):
        branches = contexts[: 1 + sum(guidance.active(t))]
        tokens = tokens + (after - t) * plain.guided(branches, picture, tokens, t, guidance)

    patch = pipe.transformer.config.latent_patch_size
    from echo4o.modeling.bagel.segments_bagel import patchify, unpatchify

    options = {"image_guidance_scale": guidance.image_scale} if names else {}
    drawn = pipe(
        "make it blue",
        image=images or None,
        latents=unpatchify(noise, (4, 4), patch).reshape(1, *latents),
        generator=torch.Generator().manual_seed(1),
        guidance_scale=guidance.scale,
        guidance_interval=guidance.interval,
        guidance_renorm=guidance.renorm,
        num_inference_steps=STEPS,
        height=4 * pipe.latent_stride,
        width=4 * pipe.latent_stride,
        output_type="latent",
        **options,
    ).images[0]
    torch.testing.assert_close(patchify(drawn, patch), tokens, atol=3e-4, rtol=0)
