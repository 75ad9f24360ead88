"""Echo-4o as a diffusers pipeline: BAGEL draws from text, pictures or any mix of both, and talks about pictures.

Published as `pipeline.py` (common/publishing.py). It calls components through their methods and does not import their
files, so that it works in the package and beside component folders on the Hub.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..common.flow_schedulers import check_scheduler
from ..common.images import to_pixels, to_uint8, vae_scale_factor
from ..common.loading import PortablePipelineMixin
from ..common.lora import TransformerLoraMixin, scales_lora
from .image_processor_bagel import ImageLimits, to_patches
from .inputs_bagel import (
    Request,
    check_settings,
    read_generators,
    read_items,
    read_latents,
    read_requests,
)
from .options_bagel import image_limits, read_options
from .prefill_bagel import PrefillMixin, before_last_text
from .sampling_bagel import Branch, Picture, pack_rows, sample
from .segments_bagel import (
    Segment,
    SpecialTokens,
    end_position,
    image_segment,
    pack,
    patchify,
    text_segment,
    unpatchify,
)
from .text_generation_bagel import generate_text


@dataclass
class Echo4oPipelineOutput(BaseOutput):
    """Result of a call.

    Args:
        images: pictures in the order of the prompts, those of one prompt side by side: a list of PIL images, or for
            other output types an array (B, H, W, 3) / tensor (B, C, H, W), or a list of such when sizes differ.
        texts: the plan that was thought before each prompt's pictures; None without `think`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor | list
    texts: list[str] | None


class Echo4oPipeline(PrefillMixin, PortablePipelineMixin, TransformerLoraMixin, DiffusionPipeline):
    """Text to image, editing, several references, interleaved inputs, plans before pictures, and answers.

    Args:
        transformer, vision_model, vae, scheduler, tokenizer: the components.
        presets: guidance by task ("text_to_image", "with_references"), where a call leaves it open.
        think_prompts: system prompts for `think` ("image": before drawing, "text": before answering).
        vae_image_limits, vision_image_limits: {"max_size", "min_size"} in pixels of pictures for the VAE and for the
            vision model. None: from the position tables (release: 1024 / 512 and 980 / 224).
        max_references: most pictures that one prompt may bring.
    """

    model_cpu_offload_seq = "vision_model->transformer->vae"
    _callback_tensor_inputs = ["latents"]
    _original_files = ("llm_config.json", "ema.safetensors")
    _conversion_module = ".convert"
    _card_family = "bagel"  # model_cards/families/bagel.yaml
    _published_modules = (
        ".guidance_bagel",
        ".image_processor_bagel",
        ".inputs_bagel",
        ".options_bagel",
        ".prefill_bagel",
        ".sampling_bagel",
        ".segments_bagel",
        ".text_generation_bagel",
        "..common.flow_schedulers",
        "..common.image_files",
        "..common.images",
        "..common.loading",
        "..common.lora",
        "..common.lora_files",
        "..common.lora_formats",
        "..common.placement",
        "..common.prefill_cache",
        "..common.publishing",
        "..common.step_cache",
        "..common.weights",
    )

    def __init__(
        self,
        transformer,
        vision_model,
        vae,
        scheduler,
        tokenizer,
        presets: dict | None = None,
        think_prompts: dict | None = None,
        vae_image_limits: dict | None = None,
        vision_image_limits: dict | None = None,
        max_references: int = 4,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vision_model=vision_model, vae=vae, scheduler=scheduler, tokenizer=tokenizer
        )
        patch = vision_model.config.patch_size
        options = read_options(
            presets=presets,
            think_prompts=think_prompts,
            vae_image_limits=vae_image_limits,
            vision_image_limits=vision_image_limits,
            max_references=max_references,
            vae_table=(transformer.config.max_latent_size, self.latent_stride),
            vision_table=(vision_model.config.max_patches_per_side, patch),
        )
        self.register_to_config(**options)
        self._num_timesteps, self._interrupt = 0, False
        if tokenizer is not None:
            SpecialTokens.from_tokenizer(tokenizer)
            if len(tokenizer) > transformer.config.vocab_size:
                raise ValueError(
                    f"The tokenizer has {len(tokenizer)} tokens and the transformer embeds "
                    f"{transformer.config.vocab_size}: they do not belong together."
                )

    # --- what the configuration means -------------------------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, per side."""
        return vae_scale_factor(self.vae.config)

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token, per side; heights and widths are multiples of it (release: 16)."""
        return self.vae_scale_factor * self.transformer.config.latent_patch_size

    @property
    def vae_limits(self) -> ImageLimits:
        """Sizes of pictures for the VAE, and of what is drawn."""
        return image_limits(self.config.vae_image_limits, self.latent_stride)

    @property
    def vision_limits(self) -> ImageLimits:
        """Sizes of pictures for the vision model."""
        return image_limits(self.config.vision_image_limits, self.vision_model.config.patch_size)

    @property
    def special_tokens(self) -> SpecialTokens:
        return SpecialTokens.from_tokenizer(self.tokenizer)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- pictures and texts to segments -----------------------------------------------------------------------------

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        """Standard normal noise in float32; everything random about a picture except sampled text comes from here."""
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def encode_latent(self, image: Image.Image, generator: torch.Generator | None) -> torch.Tensor:
        """Sampled and scaled latent of an RGB picture whose sides are multiples of the stride: (C, H/8, W/8) float32.

        BAGEL samples its condition latents at inference, too (tests/parity/golden/README.md, surprise 11).
        """
        mean, std = self.vae_moments(image)
        latent = mean + std * self.draw_noise(tuple(mean.shape), generator)
        return (latent - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Scaled latent (C, H/8, W/8) -> pixels (3, H, W) in about [-1, 1]."""
        latent = latent / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latent[None].to(self.vae.dtype), return_dict=False)[0][0]

    def text_segment(self, text: str) -> Segment:
        return text_segment(self.tokenizer.encode(text, add_special_tokens=False), self.special_tokens)

    def vision_segment(self, image: Image.Image) -> Segment:
        """What the understanding expert sees of an RGB picture of any size."""
        patch = self.vision_model.config.patch_size
        pixels = to_pixels(self.vision_limits.resize(image))
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        return image_segment("vit", grid, self.special_tokens, to_patches(pixels, patch))

    def latent_segment(self, image: Image.Image, generator: torch.Generator | None) -> Segment:
        """What the generation expert sees of an RGB picture that already has a size for the VAE."""
        latent, patch = self.encode_latent(image, generator), self.transformer.config.latent_patch_size
        grid = (latent.shape[1] // patch, latent.shape[2] // patch)
        return image_segment("vae", grid, self.special_tokens, patchify(latent, patch))

    def pack(self, samples: Sequence[Sequence[Segment]], starts: Sequence[int] | None = None):
        """Pack rows of segments for this checkpoint's position tables, on the execution device."""
        return pack(
            samples,
            latent_positions=self.transformer.config.max_latent_size,
            patch_positions=self.vision_model.config.max_patches_per_side,
            starts=starts,
        ).to(self._execution_device)

    # --- contexts ---------------------------------------------------------------------------------------------------

    def _read_request(self, request: Request, system: str | None, generator) -> list[Segment]:
        segments = [] if system is None else [self.text_segment(system)]
        for item in request.items:
            if isinstance(item, str):
                segments.append(self.text_segment(item))
            else:
                image = self.vae_limits.resize(item)
                segments += [self.latent_segment(image, generator), self.vision_segment(image)]
        return segments

    def _think(self, caches: list, max_new_tokens: int, do_sample: bool, temperature: float, generators) -> list[str]:
        """What the model says after each context, at most `max_new_tokens` tokens; the caches stay as they are."""
        with self.progress_bar(total=max_new_tokens) as progress:
            said = generate_text(
                self.transformer,
                caches,
                self.special_tokens,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                generators=generators,
                device=self._execution_device,
                progress=progress,
            )
        return [self.tokenizer.decode(ids).split("<|im_end|>")[0].split("<|im_start|>")[0] for ids in said]

    def _prepare(self, requests: list[Request], read: list[list[Segment]], think: dict | None, generators: list):
        """Prefill every context of every request (and think); one [`Picture`] per request, and plans.

        `read` holds each request's segments.
        """
        rows, pictures = [], []
        room = 0 if think is None else think["max_new_tokens"] + 2
        for request, segments in zip(requests, read, strict=True):
            texts = [segment for segment in segments if segment.kind == "text"]
            guided_by_image = request.guidance.scale > 1 and request.guidance.image_scale > 1
            grid = (request.height // self.latent_stride, request.width // self.latent_stride)
            caches = [self.transformer.new_cache() for _ in range(1 + guided_by_image)]
            for cache, read_by_it, more in zip(caches, (segments, texts), (room, 0), strict=False):
                cache.reserve(sum(map(len, read_by_it)) + more, scratch=grid[0] * grid[1] + 2)
                rows.append((cache, read_by_it))
            text_free = Branch(caches[0], *_extent(segments[: before_last_text(segments)]))
            image_free = Branch(caches[1], *_extent(texts)) if guided_by_image else None
            pictures.append(Picture(grid, request.guidance, Branch(caches[0], 0, 0), text_free, image_free))
        self.prefill(rows)
        caches = [picture.condition.cache for picture in pictures]
        plans = None
        if think is not None:
            plans = self._think(caches, generators=generators, **think)
            self.prefill([(cache, [self.text_segment(p)]) for cache, p in zip(caches, plans, strict=True)])
        for picture, cache in zip(pictures, caches, strict=True):
            picture.condition = Branch(cache, cache.length, cache.position)
        return pictures, plans

    # --- drawing ----------------------------------------------------------------------------------------------------

    def _latents(self, pictures: list[Picture]) -> torch.Tensor | list[torch.Tensor]:
        """Latents of all pictures, (B, C, H/8, W/8), or a list when sizes differ."""
        patch = self.transformer.config.latent_patch_size
        return _stack([unpatchify(picture.tokens, picture.grid, patch) for picture in pictures])

    def _set_latents(self, pictures: list[Picture], latents: Sequence[torch.Tensor]) -> None:
        patch = self.transformer.config.latent_patch_size
        channels = self.transformer.config.latent_channels
        shapes = [(channels, rows * patch, columns * patch) for rows, columns in (p.grid for p in pictures)]
        for picture, latent in zip(pictures, read_latents(latents, shapes), strict=True):
            picture.tokens = patchify(latent.to(self._execution_device, torch.float32), patch)

    def _decode(self, pictures: list[Picture], output_type: str):
        latents = self._latents(pictures)
        if output_type == "latent":
            return latents
        pixels = [self.decode_latent(latent) for latent in latents]
        if output_type == "pil":
            return [Image.fromarray(to_uint8(p)) for p in pixels]
        unit = [(p.float() * 0.5 + 0.5).clamp(0, 1) for p in pixels]  # (3, H, W) in [0, 1]
        return _stack(unit) if output_type == "pt" else _stack([p.permute(1, 2, 0).cpu().numpy() for p in unit])

    # --- public calls -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    @scales_lora
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list | None = None,
        inputs: list | None = None,
        height: int | list[int] | None = None,
        width: int | list[int] | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_renorm: str | None = None,
        guidance_renorm_min: float = 0.0,
        think: bool = False,
        max_think_tokens: int = 1000,
        do_sample: bool = False,
        temperature: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        *,
        attention_kwargs: dict | None = None,
    ) -> Echo4oPipelineOutput | tuple:
        """Draw pictures.

        Args:
            prompt: what to draw; a list draws a batch.
            image: reference pictures of the prompt (one or a list), or one entry per prompt of a list (a picture, a
                list of pictures or None).
            inputs: instead of both, an interleaved list of texts and pictures, or a list of such lists.
            height, width: pixels, multiples of 16 (one value, or one per prompt). None: the size of the prompt's last
                reference, else the largest square (release: 1024).
            num_inference_steps: updates of the picture; BAGEL's `num_timesteps=50` is 49.
            guidance_scale, image_guidance_scale: pull away from the text-free and the image-free branch; 1 is off.
            guidance_interval: (low, high): guidance acts while low < t <= high, t from 1 (noise) to 0.
            guidance_renorm: "global", "channel" or "text_channel"; guidance_renorm_min bounds it from below.
                None, for these four: the checkpoint's preset for the task.
            think: write a plan of at most `max_think_tokens` tokens first and draw with it.
            do_sample, temperature: sample the plan instead of taking the likeliest token.
            num_images_per_prompt: pictures that share one reading of the prompt.
            generator: one per picture, or one for all in turn. A prompt's condition latents and plan are drawn from
                the generator of its first picture. Order of draws: condition latents, then noise, then sampled text.
            latents: initial noise (B, 16, H/8, W/8), B = prompts x pictures per prompt, or a list of (16, h, w).
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every update; may
                return changed latents, and may stop the run by setting `pipeline._interrupt = True`.
            attention_kwargs: {"scale": s} multiplies the weights of the active adapters by `s` for this call.

        Returns:
            [`Echo4oPipelineOutput`], or (images, texts) with `return_dict=False`.

        Raises:
            ValueError: for any argument that cannot be honoured, before any work is done.
        """
        check_settings(
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            max_think_tokens=max_think_tokens,
            do_sample=do_sample,
            temperature=temperature,
            output_type=output_type,
        )
        check_scheduler(self.scheduler)
        requests = read_requests(
            read_items(prompt, image, inputs, self.config.max_references),
            height,
            width,
            {
                "guidance_scale": guidance_scale,
                "image_guidance_scale": image_guidance_scale,
                "guidance_interval": guidance_interval,
                "guidance_renorm": guidance_renorm,
                "guidance_renorm_min": guidance_renorm_min,
            },
            presets=self.config.presets,
            limits=self.vae_limits,
            largest=self.transformer.config.max_latent_size * self.latent_stride,
        )
        copies = [request for request in requests for _ in range(num_images_per_prompt)]
        generators = read_generators(generator, len(copies))
        channels, factor = self.transformer.config.latent_channels, self.vae_scale_factor
        shapes = [(channels, request.height // factor, request.width // factor) for request in copies]
        noise = read_latents(latents, shapes)
        callback_tensors = self._callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._interrupt = False

        firsts = generators[::num_images_per_prompt]
        system = self.config.think_prompts["image"] if think else None
        read = [self._read_request(request, system, g) for request, g in zip(requests, firsts, strict=True)]
        if noise is None:
            noise = [self.draw_noise(shape, g) for shape, g in zip(shapes, generators, strict=True)]
        thinking = {"max_new_tokens": max_think_tokens, "do_sample": do_sample, "temperature": temperature}
        pictures, plans = self._prepare(requests, read, thinking if think else None, firsts)
        pictures = [replace(picture) for picture in pictures for _ in range(num_images_per_prompt)]
        self._set_latents(pictures, noise)
        self._num_timesteps = num_inference_steps
        with self.progress_bar(total=num_inference_steps) as progress:
            sample(
                self.transformer,
                self.scheduler,
                pictures,
                num_inference_steps,
                pack_at=lambda t: pack_rows(pictures, t, self.special_tokens, self.pack),
                on_step_end=self._step_end(callback_on_step_end, callback_tensors, pictures, progress),
            )
        images = self._decode(pictures, output_type)
        self.maybe_free_model_hooks()
        return Echo4oPipelineOutput(images=images, texts=plans) if return_dict else (images, plans)

    def _callback_tensors(self, callback, names: list[str] | None) -> list[str]:
        """Names of what a callback is given: `latents` unless it asks for nothing."""
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end is a {type(callback).__name__}; give a function.")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        unknown = [name for name in names or () if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; known are {self._callback_tensor_inputs}."
            )
        return self._callback_tensor_inputs if names is None else names

    def _step_end(self, callback, names: list[str], pictures: list[Picture], progress):
        """What happens after each update: the caller's callback, then the progress bar."""

        def on_step_end(step: int, timestep: torch.Tensor) -> bool:
            if callback is not None:
                given = {"latents": self._latents(pictures)} if names else {}
                changed = callback(self, step, timestep, given) or {}
                if "latents" in changed:
                    self._set_latents(pictures, changed["latents"])
            progress.update()
            return self._interrupt

        return on_step_end

    @torch.no_grad()
    @scales_lora
    def chat(
        self,
        prompt: str | list[str],
        image: Image.Image | list | None = None,
        think: bool = False,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 0.3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        attention_kwargs: dict | None = None,
    ) -> str | list[str]:
        """Answer questions, about pictures or without.

        Pictures reach the vision model as they are, as in the original's chat; with `think`, they are first brought
        to a size for the VAE, as in its inferencer (tests/parity/golden/README.md, surprise 2).

        Args:
            prompt, image: as in the pipeline's call.
            think: reason first; the reasoning is part of the answer.
            max_new_tokens: of each answer.
            generator: one per answer, used with `do_sample`.
            attention_kwargs: as in the pipeline's call.

        Returns:
            The answer, or a list of answers for a list of prompts.
        """
        check_settings(max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature)
        conversations = read_items(prompt, image, None, self.config.max_references)
        generators = read_generators(generator, len(conversations))
        rows = []
        for items in conversations:
            segments = [self.text_segment(self.config.think_prompts["text"])] if think else []
            for item in items:
                if isinstance(item, str):
                    segments.append(self.text_segment(item))
                else:
                    segments.append(self.vision_segment(self.vae_limits.resize(item) if think else item))
            cache = self.transformer.new_cache()
            cache.reserve(sum(map(len, segments)) + max_new_tokens)
            rows.append((cache, segments))
        self.prefill(rows)
        answers = self._think([cache for cache, _ in rows], max_new_tokens, do_sample, temperature, generators)
        self.maybe_free_model_hooks()
        return answers[0] if isinstance(prompt, str) else answers


def _extent(segments: list[Segment]) -> tuple[int, int]:
    """(tokens, rotary position after them)."""
    return sum(map(len, segments)), end_position(segments)


def _stack(items: list):
    """One array or tensor when all have the same shape, else the list."""
    if any(item.shape != items[0].shape for item in items):
        return items
    return np.stack(items) if isinstance(items[0], np.ndarray) else torch.stack(items)
