"""The Echo-4o pipeline: BAGEL generates and edits images from texts and images, and answers questions about images.

Published as `pipeline.py` (common/publishing.py). It calls components through their methods and does not import their
files, so that it works in the package and beside component folders on the Hub.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from PIL import Image

from ..common.activation_limit import activation_limit
from ..common.adapter_presets import uses_adapter_preset
from ..common.concurrency import in_use
from ..common.flow_schedulers import check_scheduler
from ..common.images import to_uint8
from ..common.loading import PortablePipelineMixin
from ..common.lora import TransformerLoraMixin, scales_lora
from ..common.pipeline_outputs import callback_tensors, images_as, stack_equal
from ..common.step_cache import cached_update, check_step_cache, reset_step_cache
from .denoising_bagel import (
    NoisyImage,
    Prepared,
    group_images,
    pack_branches,
    predict_velocity,
    take_step,
)
from .inputs_bagel import (
    check_components,
    check_negative_prompt,
    check_settings,
    read_generators,
    read_latents,
    read_prompt_inputs,
    read_prompts,
    read_sigmas,
)
from .options_bagel import read_options
from .prompt_encoding_bagel import PromptEncodingMixin
from .segments_bagel import KVCache, check_tokenizer, patchify, unpatchify
from .text_generation_bagel import generate_text


def runs_alone(call):
    """Decorator of the pipeline's call: raises RuntimeError if another thread uses the pipeline or its scheduler, and
    forgets the state of the call when it ends."""

    @functools.wraps(call)
    def alone(self, *args, **kwargs):
        with in_use(alone=(self, self.scheduler)):
            try:
                return call(self, *args, **kwargs)
            finally:
                self._guidance_scale = self._current_timestep = self._attention_kwargs = None

    return alone


@dataclass
class Echo4oPipelineOutput(BaseOutput):
    """Output of the pipeline.

    Args:
        images: in the order of the prompts; the images of a prompt are consecutive. A list of PIL images, or for
            other output types an array (B, H, W, 3) or a tensor (B, C, H, W), or a list of these if sizes differ.
        texts: the plan written before the images of each prompt; None without `think`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor | list
    texts: list[str] | None


class Echo4oPipeline(PromptEncodingMixin, PortablePipelineMixin, TransformerLoraMixin, DiffusionPipeline):
    """Text-to-image generation, editing, several references, interleaved inputs, plans before images, and chat.

    Args:
        transformer, vision_model, vae, scheduler, tokenizer: the components.
        presets: default guidance by task ("text_to_image", "with_references").
        think_prompts: system prompts for `think` ("image": for generation, "text": for chat).
        vae_image_limits, vision_image_limits: {"max_size", "min_size"} in pixels of images for the VAE and for the
            vision model. None: from the position tables (release: 1024 / 512 and 980 / 224).
        max_references: largest number of reference images per prompt.
    """

    model_cpu_offload_seq = "vision_model->transformer->vae"
    _callback_tensor_inputs = ["latents"]
    _original_files = ("llm_config.json", "ema.safetensors")
    _conversion_module = ".convert"
    _card_family = "bagel"  # model_cards/families/bagel.yaml
    _published_modules = (
        ".denoising_bagel",
        ".guidance_bagel",
        ".image_processor_bagel",
        ".inputs_bagel",
        ".options_bagel",
        ".prompt_encoding_bagel",
        ".segments_bagel",
        ".text_generation_bagel",
        "..common.activation_limit",
        "..common.adapter_presets",
        "..common.concurrency",
        "..common.flow_schedulers",
        "..common.image_files",
        "..common.images",
        "..common.loading",
        "..common.lora",
        "..common.lora_files",
        "..common.lora_formats",
        "..common.mixin_base",
        "..common.pipeline_outputs",
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
        self.scheduler: Any
        check_components(transformer=transformer, vision_model=vision_model, vae=vae)
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
        self._guidance_scale = self._current_timestep = self._attention_kwargs = None
        if tokenizer is not None:
            check_tokenizer(tokenizer, transformer.config.vocab_size)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float | None:
        """The largest guidance scale of the call that runs; None between calls."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call that runs guides any of its images."""
        return self._guidance_scale is not None and self._guidance_scale > 1

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's timestep of the update that runs, from 1000 to 0; None outside of updates."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict | None:
        """The argument of the call that runs."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @uses_adapter_preset
    @scales_lora
    @runs_alone
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
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> Echo4oPipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: description of the image, or a list of descriptions.
            image: reference images of the prompt (one or a list). For a list of prompts: a list with an image, a list
                of images or None per prompt.
            inputs: instead of both, an interleaved list of texts and images, or a list of such lists.
            height, width: pixels, multiples of 16 (one value, or one per prompt). None: the size of the prompt's last
                reference, or else the largest square (release: 1024).
            num_inference_steps: number of updates; BAGEL's `num_timesteps=50` corresponds to 49. Active few-step
                adapters have presets for this argument, the guidance and the time shift; arguments that are passed
                take precedence.
            guidance_scale, image_guidance_scale: weights of the difference to the text-free and to the image-free
                branch; 1 turns a branch off.
            guidance_interval: (low, high): guidance is on while low < t <= high; t runs from 1 (noise) to 0.
            guidance_renorm: "global", "channel" or "text_channel". For this argument and the three before it, None
                means the checkpoint's preset for the task.
            guidance_renorm_min: smallest factor of the renormalization.
            think: first write a plan of at most `max_think_tokens` tokens, and generate with it.
            do_sample, temperature: sample the plan instead of taking the likeliest token.
            num_images_per_prompt: number of images that share one encoding of the prompt.
            generator: one per image, or one that is used for all in turn. A prompt's reference latents and plan use
                the generator of its first image. Order of draws: reference latents, then noise, then sampled text.
            latents: initial noise (B, 16, H/8, W/8), B = prompts x images per prompt, or a list of (16, h, w).
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every update. It can
                return changed latents, and can end the loop by setting `pipeline._interrupt = True`.
            attention_kwargs: {"scale": s} multiplies the weights of the active adapters by `s` for this call.
            sigmas: times of the updates instead of `num_inference_steps` equal ones: they decrease from 1, before the
                scheduler's shift. `timesteps`: the same times 1000.
            negative_prompt: not supported; guidance compares with the same inputs without their last text.

        Returns:
            [`Echo4oPipelineOutput`], or (images, texts) with `return_dict=False`.

        Raises:
            ValueError: an argument is invalid; raised before any computation.
        """
        # 1. Check the arguments
        check_settings(
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            max_think_tokens=max_think_tokens,
            do_sample=do_sample,
            temperature=temperature,
            output_type=output_type,
        )
        check_negative_prompt(negative_prompt)
        check_components(**self.components)
        check_scheduler(self.scheduler)
        sigmas = read_sigmas(sigmas, timesteps, num_inference_steps)
        num_inference_steps = len(sigmas)
        check_step_cache(self.transformer, num_inference_steps)
        prompts = read_prompt_inputs(
            read_prompts(prompt, image, inputs, self.config["max_references"]),
            height,
            width,
            {
                "guidance_scale": guidance_scale,
                "image_guidance_scale": image_guidance_scale,
                "guidance_interval": guidance_interval,
                "guidance_renorm": guidance_renorm,
                "guidance_renorm_min": guidance_renorm_min,
            },
            presets=self.config["presets"],
            limits=self.vae_limits,
            largest=self.transformer.config.max_latent_size * self.latent_stride,
        )
        generators = read_generators(generator, len(prompts) * num_images_per_prompt)
        prompt_generators = generators[::num_images_per_prompt]
        shapes = [self._latent_shape(p.height, p.width) for p in prompts for _ in range(num_images_per_prompt)]
        noise = read_latents(latents, shapes)
        tensor_names = callback_tensors(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        self._num_timesteps, self._interrupt = num_inference_steps, False
        self._guidance_scale = max(p.guidance.scale for p in prompts)
        self._attention_kwargs = attention_kwargs

        # 2. Encode the prompts and sample the noise
        room = max_think_tokens + 2 if think else 0  # for the plan, with its start and end token
        encoded = [self.encode_prompt(p, g, room) for p, g in zip(prompts, prompt_generators, strict=True)]
        if noise is None:
            noise = [self.sample_noise(shape, g) for shape, g in zip(shapes, generators, strict=True)]
        prepared = Prepared(encoded, noise)

        # 3. Prefill the caches, and write plans
        self.prefill(prepared.contexts())
        plans = None
        if think:
            caches = [prompt.cache for prompt in prepared.prompts]
            plans = self._generate_texts(caches, max_think_tokens, do_sample, temperature, prompt_generators)
            self.prefill([(cache, [self.text_segment(p)]) for cache, p in zip(caches, plans, strict=True)])

        # 4. Denoise
        images = prepared.noisy_images(self.transformer.config.latent_patch_size, self._execution_device)
        self.scheduler.set_timesteps(sigmas=np.array(sigmas), device=self._execution_device)
        limit = activation_limit(self._execution_device)
        active, batches = None, []
        with self._progress(num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                t = float(self.scheduler.sigmas[step])
                previous, active = active, [image.guidance.active(t) for image in images]
                if active != previous:
                    reset_step_cache(self.transformer)
                    groups = group_images(self.transformer, images, t, limit)
                    batches = [
                        pack_branches(self.transformer, group, t, self.special_tokens, self.pack) for group in groups
                    ]
                self._current_timestep = timestep
                velocities = []
                for group, batch in enumerate(batches):
                    with cached_update(self.transformer, group, step):
                        velocities += predict_velocity(self.transformer, batch, t)
                take_step(self.scheduler, images, velocities, timestep)
                if callback_on_step_end is not None:
                    tensors = {"latents": self._latents(images)} if tensor_names else {}
                    changed = callback_on_step_end(self, step, timestep, tensors) or {}
                    if "latents" in changed:
                        self._set_latents(images, changed["latents"])
                progress.update()
                if self._interrupt:
                    break
        self._current_timestep = None

        # 5. Decode
        decoded = self._decode(images, output_type)
        self.maybe_free_model_hooks()
        return Echo4oPipelineOutput(images=decoded, texts=plans) if return_dict else (decoded, plans)

    # --- chat -------------------------------------------------------------------------------------------------------

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
        callback_on_token: Callable[[int, list[int]], Any] | None = None,
    ) -> str | list[str]:
        """Answer questions, with or without images.

        The vision model receives images in their own size, as in the original's chat. With `think` they are resized
        for the VAE before, as in the original's inferencer (tests/parity/golden/README.md, surprise 2).

        Args:
            prompt, image: as in the pipeline's call.
            think: write the reasoning first; it is part of the answer.
            max_new_tokens: largest number of tokens of each answer.
            generator: one per answer, used with `do_sample`.
            attention_kwargs: as in the pipeline's call.
            callback_on_token: called as (index of the answer, its token ids so far) after every token, for streaming;
                the answer ends if it returns True.

        Returns:
            The answer, or a list of answers for a list of prompts.

        Raises:
            ValueError: an argument is invalid; raised before any computation.
        """
        check_settings(max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature)
        check_components(**{name: part for name, part in self.components.items() if name != "scheduler"})
        prompts = read_prompts(prompt, image, None, self.config["max_references"])
        generators = read_generators(generator, len(prompts))
        rows = []
        for items in prompts:
            segments = [self.text_segment(self.config["think_prompts"]["text"])] if think else []
            for item in items:
                if isinstance(item, str):
                    segments.append(self.text_segment(item))
                else:
                    segments.append(self.vision_segment(self.vae_limits.resize(item) if think else item))
            cache = self.transformer.new_cache()
            cache.reserve(sum(map(len, segments)) + max_new_tokens)
            rows.append((cache, segments))
        self.prefill(rows)
        answers = self._generate_texts(
            [cache for cache, _ in rows], max_new_tokens, do_sample, temperature, generators, callback_on_token
        )
        self.maybe_free_model_hooks()
        return answers[0] if isinstance(prompt, str) else answers

    # --- steps of a call --------------------------------------------------------------------------------------------

    def _generate_texts(
        self,
        caches: list[KVCache],
        max_new_tokens: int,
        do_sample: bool,
        temperature: float,
        generators: list[torch.Generator | None],
        on_token: Callable[[int, list[int]], Any] | None = None,
    ) -> list[str]:
        """Generate a text of at most `max_new_tokens` tokens after every cache; the caches do not change."""
        with self._progress(max_new_tokens) as progress:
            token_ids = generate_text(
                self.transformer,
                caches,
                self.special_tokens,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                generators=generators,
                device=self._execution_device,
                progress=progress,
                on_token=on_token,
            )
        return [self.tokenizer.decode(ids).split("<|im_end|>")[0].split("<|im_start|>")[0] for ids in token_ids]

    def _progress(self, total: int) -> Any:
        """A progress bar of diffusers, whose decorator hides its signature from type checkers."""
        progress_bar: Any = self.progress_bar
        return progress_bar(total=total)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H/8, W/8) of an image's latent."""
        factor = self.vae_scale_factor
        return self.transformer.config.latent_channels, height // factor, width // factor

    def _latents(self, images: Sequence[NoisyImage]) -> Any:
        """Latents of all images, (B, C, H/8, W/8), or a list if sizes differ."""
        patch = self.transformer.config.latent_patch_size
        return stack_equal([unpatchify(image.tokens, image.grid, patch) for image in images])

    def _set_latents(self, images: Sequence[NoisyImage], latents: Any) -> None:
        """Replace the latents of all images. Raises ValueError for wrong shapes and non-finite values."""
        stride, patch = self.latent_stride, self.transformer.config.latent_patch_size
        shapes = [self._latent_shape(image.grid[0] * stride, image.grid[1] * stride) for image in images]
        for image, latent in zip(images, read_latents(latents, shapes) or (), strict=True):
            image.tokens = patchify(latent.to(self._execution_device, torch.float32), patch)

    def _decode(self, images: Sequence[NoisyImage], output_type: str) -> Any:
        """The images in the form of `output_type`."""
        latents = self._latents(images)
        if output_type == "latent":
            return latents
        pixels = [self.decode_latent(latent) for latent in latents]
        return images_as(output_type, pixels, to_uint8)

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Scaled latent (C, H/8, W/8) -> pixels (3, H, W) in about [-1, 1]."""
        latent = latent / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latent[None].to(self.vae.dtype), return_dict=False)[0][0]
