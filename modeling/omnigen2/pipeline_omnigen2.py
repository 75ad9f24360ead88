"""OmniGen2 as a diffusers pipeline: text to image, editing, several references, and answers.

Published as `pipeline.py` (common/publishing.py). It calls components through their methods and does not import their
files, so that it works in the package and beside component folders on the Hub.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..common.adapter_presets import uses_adapter_preset
from ..common.images import vae_scale_factor
from ..common.loading import PortablePipelineMixin, qwen_names
from ..common.lora import TransformerLoraMixin, scales_lora
from ..common.pipeline_outputs import callback_tensors, images_as, stack_equal
from ..common.publishing import INDEX_NAME
from ..common.weights import read_json
from .chat_omnigen2 import OmniGen2ChatMixin
from .image_processor_omnigen2 import generated_size, reference_pixels, rounded_uint8, to_size
from .inputs_omnigen2 import (
    DEFAULT_SIZE,
    Request,
    check_settings,
    read_generators,
    read_latents,
    read_presets,
    read_requests,
    read_times,
)
from .original_adapter_omnigen2 import read_original_adapter
from .output_omnigen2 import OmniGen2PipelineOutput
from .prompts_omnigen2 import prompt_text
from .sampling_omnigen2 import SampledImage, check_scheduler, sample, set_latents, set_times

RELEASED_PROCESSOR = "processor"  # the release keeps tokenizer and image processor in one folder


class OmniGen2Pipeline(OmniGen2ChatMixin, PortablePipelineMixin, TransformerLoraMixin, DiffusionPipeline):
    """Text to image, editing with up to five references, and answers to questions.

    Args:
        transformer, vae, scheduler: the components that generate. A scheduler with the release's `dynamic_time_shift`
            is replaced by one with diffusers' name for it.
        mllm: Qwen2.5-VL, which reads prompts and answers.
        tokenizer, image_processor: of the `mllm`.
        presets: guidance by task ("text_to_image", "with_references"), used where a call does not set it.
        max_references: references that one prompt may have.
    """

    model_cpu_offload_seq = "mllm->transformer->vae"
    _callback_tensor_inputs = ["latents"]
    _conversion_module = ".convert"
    _card_family = "omnigen2"  # model_cards/families/omnigen2.yaml
    _published_modules = (
        ".chat_omnigen2",
        ".image_processor_omnigen2",
        ".inputs_omnigen2",
        ".original_adapter_omnigen2",
        ".output_omnigen2",
        ".prompts_omnigen2",
        ".sampling_omnigen2",
        "..common.adapter_presets",
        "..common.concurrency",
        "..common.image_files",
        "..common.images",
        "..common.loading",
        "..common.lora",
        "..common.lora_files",
        "..common.lora_formats",
        "..common.mixin_base",
        "..common.pipeline_outputs",
        "..common.placement",
        "..common.publishing",
        "..common.step_cache",
        "..common.weights",
    )

    def __init__(
        self,
        transformer,
        mllm,
        vae,
        scheduler,
        tokenizer,
        image_processor,
        presets: dict | None = None,
        max_references: int = 5,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            mllm=mllm,
            vae=vae,
            scheduler=_with_known_options(scheduler),
            tokenizer=tokenizer,
            image_processor=image_processor,
        )
        most = transformer.image_index_embedding.shape[0]
        if not isinstance(max_references, int) or isinstance(max_references, bool) or not 0 <= max_references <= most:
            raise ValueError(f"max_references={max_references!r} must be a whole number from 0 to {most}.")
        width, expected = mllm.config.get_text_config().hidden_size, transformer.config.text_feat_dim
        if width != expected:
            raise ValueError(f"The mllm's features have width {width}; the transformer takes {expected}.")
        self.register_to_config(presets=read_presets(presets), max_references=max_references)
        self._num_timesteps, self._interrupt = 0, False

    # --- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As `PortablePipelineMixin.from_pretrained`, also for the layout of the release, on the Hub or in a folder."""
        if cls._package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder = cls._local_folder(pretrained_model_name_or_path, kwargs)
        if cls.is_original(folder):
            kwargs = cls.conversion().read_processor(folder, skip=tuple(kwargs)) | kwargs
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def is_original(cls, folder) -> bool:
        """Whether a folder has the layout of the release, whose index names a processor."""
        index = Path(folder, INDEX_NAME)
        return index.is_file() and RELEASED_PROCESSOR in read_json(index)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """As in the base class; the index of the release is brought to ours."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = dict(loaded[0] if isinstance(loaded, tuple) else loaded)
        if cls._package() is not None and RELEASED_PROCESSOR in config:
            del config[RELEASED_PROCESSOR]
            config["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
            config["image_processor"] = ["transformers", "Qwen2VLImageProcessorPil"]
            config["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        return (config, *loaded[1:]) if isinstance(loaded, tuple) else config

    @classmethod
    def _comparable_names(cls, component: str, module, names) -> set[str]:
        is_qwen = component == "mllm"
        return qwen_names(module, names) if is_qwen else super()._comparable_names(component, module, names)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, return_lora_metadata: bool = False, **kwargs):
        """As in the base class; also reads the original's adapters, whose files hold no configuration."""
        read = super().lora_state_dict(pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs)
        state, settings = read if read[1] is not None else read_original_adapter(read[0])
        return (state, settings) if return_lora_metadata else state

    # --- what the configuration means -------------------------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, per side."""
        return vae_scale_factor(self.vae.config)

    @property
    def latent_stride(self) -> int:
        """Pixels per token, per side; images are generated at multiples of it (release: 16)."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- inputs to tensors ------------------------------------------------------------------------------------------

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        """Standard normal noise in float32; everything random about an image except sampled text comes from here."""
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def encode_image(self, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """(3, H, W) in [-1, 1] -> sampled and scaled latent (C, h, w) float32.

        OmniGen2 samples the latents of its references, at inference as well.
        """
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        moments = self.vae.encode(pixels[None]).latent_dist
        mean, std = moments.mean[0].float(), moments.std[0].float()
        latent = mean + std * self.draw_noise(tuple(mean.shape), generator)
        return (latent - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Scaled latent (C, h, w) -> pixels (3, H, W) in about [-1, 1]."""
        latent = latent / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latent[None].to(self.vae.dtype), return_dict=False)[0][0]

    def token_ids(self, text: str, max_length: int | None = None) -> list[int]:
        """Tokens of a text in the chat format, cut on the right."""
        return self.tokenizer(text, add_special_tokens=False).input_ids[:max_length]

    def text_features(self, ids: list[int]) -> torch.Tensor:
        """Token ids -> last hidden states (tokens, text_feat_dim) after the final norm."""
        input_ids = torch.tensor([ids], device=self._execution_device)
        # Through the whole model: offloading moves its weights when its `forward` is called.
        output = self.mllm(
            input_ids=input_ids, output_hidden_states=True, use_cache=False, logits_to_keep=1, return_dict=True
        )
        return output.hidden_states[-1][0]

    def _reference_latents(self, request: Request, limits: dict, generator) -> list[torch.Tensor]:
        pixels = [
            reference_pixels(image, limits["max_pixels"], limits["max_side"], self.latent_stride, f"reference {index}")
            for index, image in enumerate(request.references)
        ]
        return [self.encode_image(p, generator) for p in pixels]

    # --- generation -------------------------------------------------------------------------------------------------

    def _sizes(self, request: Request, max_pixels: int, max_side: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the result, and of what is generated."""
        if request.takes_reference_size:
            image = request.references[0]
            pixels = reference_pixels(image, max_pixels, max_side, self.latent_stride, "reference 0")
            size = pixels.shape[1], pixels.shape[2]
            return size, size
        result = request.height or DEFAULT_SIZE, request.width or DEFAULT_SIZE
        generated = generated_size(*result, max_pixels, self.latent_stride)
        if not all(generated):
            raise ValueError(
                f"height={result[0]} and width={result[1]} with max_pixels={max_pixels} leave {generated[0]} x "
                f"{generated[1]} pixels to generate; both sides must be {self.latent_stride} at least."
            )
        return result, generated

    @torch.no_grad()
    @uses_adapter_preset
    @scales_lora
    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | list | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | list[int] | None = None,
        width: int | list[int] | None = None,
        num_inference_steps: int = 28,
        timesteps: list[float] | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_range: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        max_pixels: int = 1024 * 1024,
        max_input_image_side_length: int = 1024,
        align_res: bool = True,
        max_sequence_length: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        *,
        attention_kwargs: dict | None = None,
    ) -> OmniGen2PipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: what to generate; a list generates a batch.
            image: reference images of the prompt (one or a list), or one entry per prompt of a list (an image, a list
                of images or None).
            negative_prompt: what to stay away from; one text, or one per prompt. None: an empty text.
            height, width: pixels of the result (one value, or one per prompt). None: 1024, or the size of the only
                reference. One prompt with exactly one reference always has the reference's size, unless
                `align_res=False`.
            num_inference_steps: updates of the image. Active few-step adapters have presets for this argument and the
                guidance; arguments that are passed take precedence.
            timesteps: times of the updates instead, rising from 0 (noise) and below 1 (data); they are not shifted.
            guidance_scale: strength of the prompt against the negative prompt; 1 disables guidance.
            image_guidance_scale: strength of the references, on top of text guidance; 1 disables it.
            guidance_range: (low, high): guidance is on while low <= step / steps <= high. None, for these three: the
                checkpoint's preset for the task.
            num_images_per_prompt: images that share one reading of the prompt and its references.
            max_pixels: references and generated images have at most so many; results are brought to their size.
            max_input_image_side_length: longest side of a reference in pixels.
            max_sequence_length: tokens after which a prompt is cut. None: it is not cut.
            generator: one per image, or one for all in turn. A prompt's reference latents are drawn from the generator
                of its first image. Order of draws: reference latents of all prompts, then noise of all images.
            latents: initial noise (B, C, h, w), B = prompts x images per prompt, or a list of (C, h, w). Its size
                decides at which size is generated.
            output_type: "pil", "np", "pt" or "latent" (the latents, at the size at which they were generated).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every update; may
                return changed latents, and may stop the run by setting `pipeline._interrupt = True`.
            attention_kwargs: {"scale": s} multiplies the weights of the active adapters by `s` for this call.

        Returns:
            [`OmniGen2PipelineOutput`], or (images, texts) with `return_dict=False`.

        Raises:
            ValueError: for any argument that cannot be used, before any work is done.
        """
        check_settings(
            output_type=output_type,
            max_sequence_length=max_sequence_length,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            max_pixels=max_pixels,
            max_input_image_side_length=max_input_image_side_length,
        )
        options = {
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
            "guidance_range": guidance_range,
        }
        requests = read_requests(
            prompt,
            negative_prompt,
            image,
            height,
            width,
            options,
            presets=self.config["presets"],
            max_references=self.config["max_references"],
            align_res=align_res,
        )
        images = self._generate(
            requests,
            lambda text: self.text_features(self.token_ids(prompt_text(text), max_sequence_length)),
            steps=num_inference_steps,
            times=read_times(timesteps),
            copies=num_images_per_prompt,
            limits={"max_pixels": max_pixels, "max_side": max_input_image_side_length},
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback=(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        return OmniGen2PipelineOutput(images=images, texts=None) if return_dict else (images, None)

    def _generate(
        self,
        requests: list[Request],
        features_of: Callable[[str], torch.Tensor],
        *,
        steps: int,
        times: list[float] | None,
        copies: int,
        limits: dict,
        generator,
        latents,
        output_type: str,
        callback: tuple[Any, Any] = (None, None),
    ):
        """Images of the requests; `features_of` reads a prompt. Everything is checked before it is called."""
        check_scheduler(self.scheduler)
        config, steps = self.transformer.config, steps if times is None else len(times)
        generators = read_generators(generator, len(requests) * copies)
        noise = read_latents(latents, len(generators), config.in_channels, config.patch_size)
        names = callback_tensors(*callback, self._callback_tensor_inputs)
        sizes = [self._sizes(request, **limits) for request in requests for _ in range(copies)]
        self._interrupt, self._num_timesteps = False, steps

        firsts = generators[::copies]
        reference_latents = [self._reference_latents(r, limits, g) for r, g in zip(requests, firsts, strict=True)]
        if noise is None:
            factor = self.vae_scale_factor
            shapes = [(config.in_channels, h // factor, w // factor) for _, (h, w) in sizes]
            noise = [self.draw_noise(shape, g) for shape, g in zip(shapes, generators, strict=True)]
        noise = [x.to(self._execution_device, torch.float32) for x in noise]

        texts: dict[str, int] = {}
        images, references = [], []
        for index, (request, encoded) in enumerate(zip(requests, reference_latents, strict=True)):
            guided = request.guidance.is_ever_on(steps)
            own = [
                texts.setdefault(text, len(texts)) for text in [request.prompt, request.negative_prompt][: 1 + guided]
            ]
            first = len(references)
            # The references of a prompt are refined once for all of its images, whose times are the same.
            references += [(latent, i, index * copies) for i, latent in enumerate(encoded)]
            images += [
                SampledImage(
                    latent=latent,
                    text=own[0],
                    negative=own[1] if guided else None,
                    references=tuple(range(first, len(references))),
                    guidance=request.guidance,
                    scheduler=type(self.scheduler).from_config(self.scheduler.config),
                )
                for latent in noise[index * copies : (index + 1) * copies]
            ]
        for item in images:
            set_times(item.scheduler, steps, item.latent.shape[1] * item.latent.shape[2], times)
        features = [features_of(text) for text in texts]
        progress_bar: Any = self.progress_bar  # diffusers' decorator hides its signature from type checkers
        with progress_bar(total=steps) as progress:
            predict = self._predictor(images, features, references)
            on_step_end = self._step_end(callback[0], names, images, progress)
            sample(images, steps, predict, self.transformer, on_step_end)
        results = self._decode(images, [size for size, _ in sizes], output_type)
        self.maybe_free_model_hooks()
        return results

    def _predictor(self, images: list[SampledImage], features: list[torch.Tensor], references: list[tuple]):
        """The function that predicts the velocities of all branches in one pass.

        Texts are refined and references embedded once; a change of the branches only changes where tokens go.
        """
        conditions: dict[tuple[bool, ...], object] = {}

        def rows(guided: tuple[bool, ...]) -> list:
            return [
                (text, own, target)
                for target, (image, is_guided) in enumerate(zip(images, guided, strict=True))
                for text, own in image.branches(is_guided)
            ]

        def predict(latents: list[torch.Tensor], times: torch.Tensor, guided: tuple[bool, ...]):
            if guided not in conditions and conditions:
                known = next(iter(conditions.values()))
                conditions[guided] = self.transformer.with_rows(known, references, rows(guided))
            elif not conditions:
                sizes = [tuple(latent.shape[1:]) for latent in latents]
                prepare = {"texts": features, "references": references, "target_sizes": sizes, "rows": rows(guided)}
                conditions[guided] = self.transformer(None, None, prepare=prepare)
            return self.transformer(latents, times, condition=conditions[guided]).sample

        return predict

    def _decode(self, images: list[SampledImage], sizes: list[tuple[int, int]], output_type: str):
        if output_type == "latent":
            return stack_equal([image.latent for image in images])
        pixels = [to_size(self.decode_latent(i.latent), *size) for i, size in zip(images, sizes, strict=True)]
        return images_as(output_type, pixels, rounded_uint8)

    def _step_end(self, callback, names: list[str], images: list[SampledImage], progress):
        """What happens after each update: the caller's callback, then the progress bar."""

        def on_step_end(step: int, timestep: torch.Tensor) -> bool:
            if callback is not None:
                given = {"latents": stack_equal([image.latent for image in images])} if names else {}
                changed = callback(self, step, timestep, given) or {}
                if "latents" in changed:
                    set_latents(images, changed["latents"])
            progress.update()
            return self._interrupt

        return on_step_end


def _with_known_options(scheduler):
    """The release's scheduler configuration in diffusers' terms; any other scheduler as it is."""
    if scheduler is None or scheduler.config.get("dynamic_time_shift") is None:
        return scheduler
    steps, is_dynamic = scheduler.config.num_train_timesteps, scheduler.config["dynamic_time_shift"]
    return FlowMatchEulerDiscreteScheduler(steps, use_dynamic_shifting=is_dynamic, time_shift_type="linear")
