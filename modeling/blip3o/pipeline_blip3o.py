"""BLIP3-o as a diffusers pipeline: text to image, reconstruction of images, and answers about images.

Published as `pipeline.py` (common/publishing.py). It calls components through their methods and does not import their
files, so that it works in the package and beside component folders on the Hub.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.outputs import BaseOutput
from PIL import Image

from ..common.images import qwen_vision_inputs
from ..common.loading import PortablePipelineMixin, qwen_names
from ..common.lora import TransformerLoraMixin, scales_lora
from .chat_blip3o import Blip3oChatMixin
from .conditions_blip3o import eva_pixels, image_states, onload, query_states, square
from .decoder_blip3o import Blip3oDecoderMixin, Noise
from .inputs_blip3o import check_numbers, check_whole_numbers, read_images, read_prompts
from .prompts_blip3o import (
    IMAGE,
    NEGATIVE_PROMPT,
    RECONSTRUCT,
    check_tokenizer,
    encode,
    generation_text,
    image_tokens,
    reconstruction_text,
    special_tokens_in,
)
from .sampling_blip3o import CLIP_MEAN, CLIP_STD, sample_features

logger = logging.get_logger(__name__)


@dataclass
class Blip3oPipelineOutput(BaseOutput):
    """Result of a call.

    Args:
        images: in the order of the prompts, those of one prompt side by side: a list of PIL images; or an array
            (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1]; or latents (B, 4, H / 8, W / 8); or, for
            `output_type="features"`, image features (B, tokens, C).
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class Blip3oPipeline(
    Blip3oChatMixin, Blip3oDecoderMixin, PortablePipelineMixin, TransformerLoraMixin, DiffusionPipeline
):
    """Generates images from text in two stages: image features, and the SDXL decoder of these features.

    Sampling follows the released code. What is hidden state there is an argument here: the noise of the negative
    features, which the original draws once per pipeline object.

    Args:
        transformer: the diffusion head with the learned queries.
        language_model: transformers' `Qwen2_5_VLForConditionalGeneration`.
        unet, vae: the decoder.
        scheduler: flow matching to the image features; decoder_scheduler: of the decoder.
        tokenizer, image_processor: of the language model.
        vision_model: the EVA-CLIP tower; only `reconstruct` and training need it. Pass `vision_model=None` to
            `from_pretrained` to leave its weights out (8.7 GB in the release).
        default_size: pixels per side of an image whose size is not given.
        tokenizer_max_length: tokens of a training row, queries included; longer captions are cut there.
        max_references: reference images of a prompt: none.
    """

    model_cpu_offload_seq = "vision_model->language_model->transformer->unet->vae"
    _optional_components = ["vision_model"]
    _callback_tensor_inputs = ["latents"]
    _original_files = ("diffusion-decoder/model_index.json",)
    _conversion_module = ".convert"
    _card_family = "blip3o"  # model_cards/families/blip3o.yaml
    _published_modules = (
        ".chat_blip3o",
        ".conditions_blip3o",
        ".decoder_blip3o",
        ".inputs_blip3o",
        ".prompts_blip3o",
        ".sampling_blip3o",
        "..common.adapter_presets",
        "..common.concurrency",
        "..common.image_files",
        "..common.images",
        "..common.loading",
        "..common.lora",
        "..common.lora_files",
        "..common.lora_formats",
        "..common.mixin_base",
        "..common.placement",
        "..common.publishing",
        "..common.weights",
    )

    def __init__(
        self,
        transformer,
        language_model,
        unet,
        vae,
        scheduler,
        decoder_scheduler,
        tokenizer,
        image_processor,
        vision_model=None,
        default_size: int = 1024,
        tokenizer_max_length: int = 512,
        max_references: int = 0,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            language_model=language_model,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            decoder_scheduler=decoder_scheduler,
            tokenizer=tokenizer,
            image_processor=image_processor,
            vision_model=vision_model,
        )
        check_whole_numbers(default_size=default_size, tokenizer_max_length=tokenizer_max_length)
        if max_references != 0:
            raise ValueError(f"max_references={max_references}: BLIP3-o generates from text only; it must be 0.")
        self.register_to_config(
            default_size=default_size, tokenizer_max_length=tokenizer_max_length, max_references=max_references
        )
        self._interrupt = False
        self._num_timesteps = 0
        if tokenizer is not None:
            rows = None if language_model is None else language_model.config.text_config.vocab_size
            check_tokenizer(tokenizer, rows)

    @classmethod
    def _comparable_names(cls, component: str, module, names) -> set[str]:
        is_qwen = component == "language_model"
        return qwen_names(module, names) if is_qwen else super()._comparable_names(component, module, names)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- conditions and features --------------------------------------------------------------------------------------

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None = None) -> torch.Tensor:
        """States of the queries behind texts that are complete with their template: (B, K, hidden).

        Args:
            images: one per text, each with one `<image>` in its text.
        """
        onload(self.language_model)
        tokens, device = self.token_ids, self._execution_device
        queries = self.transformer.queries().to(device, self.language_model.dtype)
        embeds = {}
        if images is not None:
            for row, image in enumerate(images):
                embeds[row] = self._image_states(square(image))[0]
            texts = [t.replace(IMAGE, image_tokens(len(embeds[row])), 1) for row, t in enumerate(texts)]
        ids = [[*encode(self.tokenizer, text), tokens.image_start] for text in texts]
        return query_states(self.language_model, ids, queries, tokens.pad, embeds, tokens.image_pad)

    def _image_states(self, image: Image.Image) -> tuple[torch.Tensor, dict]:
        """What the language model reads of an image, (T, hidden), and the processed image."""
        inputs = qwen_vision_inputs(self.image_processor, [image]).to(self._execution_device)
        states = image_states(self.language_model, inputs["pixel_values"], inputs["image_grid_thw"])
        return states, inputs

    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """EVA-CLIP features of an RGB image, (tokens, C), row by row: what the head is trained to generate."""
        if self.vision_model is None:
            raise ValueError("This needs the EVA-CLIP tower: load the pipeline with its vision_model.")
        return self._encode_pixels(eva_pixels(image, self.vision_model.config.image_size, CLIP_MEAN, CLIP_STD))

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        onload(self.vision_model)
        hidden_states = self.vision_model(pixels[None].to(self._execution_device))
        return self.vision_model.pool(hidden_states)[0].flatten(1).T

    def _features(
        self, condition: torch.Tensor, noise: torch.Tensor, num_steps: int, guidance_scale: float
    ) -> torch.Tensor:
        """(B, K, hidden) and (B, C, rows, columns) -> image features (B, tokens, C) in float32."""
        condition = condition.to(self.transformer.dtype)
        progress_bar: Any = self.progress_bar  # diffusers' decorator hides its signature from type checkers
        with progress_bar(total=num_steps) as progress:
            features = sample_features(
                self.transformer,
                self.scheduler,
                condition,
                noise.to(self._execution_device),
                num_steps,
                guidance_scale,
                lambda *step: progress.update(),
            )
        return features.flatten(2).transpose(1, 2)

    # --- the decoder ------------------------------------------------------------------------------------------------------

    def _negative_features(
        self, prompts: list[str], noise: torch.Tensor, per_prompt: int, sampler: tuple
    ) -> torch.Tensor:
        """Features of the negative prompts, which are used without the template; one row if all images share it."""
        condition = self.encode_texts(prompts)
        if len(prompts) > 1:
            condition = condition.repeat_interleave(per_prompt, dim=0)
            noise = noise.expand(len(condition), -1, -1, -1)
        return self._features(condition.expand(len(noise), -1, -1), noise, *sampler)

    def _finish(self, images, return_dict: bool):
        self.maybe_free_model_hooks()
        return Blip3oPipelineOutput(images=images) if return_dict else (images,)

    # --- public calls -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @scales_lora
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        feature_steps: int = 30,
        feature_guidance_scale: float = 3.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        feature_latents: torch.Tensor | None = None,
        negative_feature_latents: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        *,
        attention_kwargs: dict | None = None,
    ) -> Blip3oPipelineOutput | tuple:
        """Generate images from text.

        The prompts of a batch may differ in length; every image equals one that is generated alone.

        Args:
            prompt: one text or a list of texts, put into the caption template.
            negative_prompt: of the decoder's guidance, used without the template: one for all, or one per prompt.
                None: a single space, as in the release.
            height, width: pixels. None: `default_size` (release: 1024). The image is rounded down to multiples of 8;
                the decoder is conditioned on the size that was asked for.
            num_inference_steps, guidance_scale: updates and guidance of the decoder; guidance is on above 1.
            feature_steps, feature_guidance_scale: updates and guidance of the image features; 1 is off.
            original_size, crops_coords_top_left: (height, width) and (top, left) in pixels that the decoder is
                conditioned on, as in SDXL. None: the default size squared.
            num_images_per_prompt: images that share one reading of the prompt.
            generator: one per image, or one for all in turn. Each image draws in this order: noise of its features,
                noise of the negative features (with guidance in the decoder), noise of its latents.
            feature_latents: (B, C, rows, columns) noise of the features, B = prompts x images per prompt.
            negative_feature_latents: noise of the negative features, (B, C, rows, columns), or one for all images.
            latents: (B, 4, height / 8, width / 8) noise of the decoder.
            output_type: "pil", "np", "pt", "latent", or "features": the image features, without running the decoder.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every update of the
                decoder; may return changed latents.
            attention_kwargs: {"scale": s} multiplies the weights of the active adapters by `s` for this call.

        Returns:
            [`Blip3oPipelineOutput`], or (images,) with `return_dict=False`.

        Raises:
            ValueError: for an invalid argument, before any computation.
        """
        prompts = read_prompts(prompt)
        check_whole_numbers(num_images_per_prompt=num_images_per_prompt)
        negatives = self._read_negative(negative_prompt, len(prompts))
        settings = self._settings(
            height, width, original_size, crops_coords_top_left, num_inference_steps, guidance_scale, output_type,
            callback_on_step_end,
        )  # fmt: skip
        sampler = self._feature_sampler(feature_steps, feature_guidance_scale)
        given = {"features": feature_latents, "negative": negative_feature_latents, "latents": latents}
        noise = self._noise(len(prompts) * num_images_per_prompt, generator, given, settings, from_image=False)
        self._warn_of_special_tokens(prompts)
        condition = self.encode_texts([generation_text(p) for p in prompts])
        condition = condition.repeat_interleave(num_images_per_prompt, dim=0)
        return self._finish(
            self._generate(condition, negatives, num_images_per_prompt, noise, sampler, settings), return_dict
        )

    @torch.no_grad()
    @scales_lora
    def reconstruct(
        self,
        image: Image.Image | list[Image.Image],
        through: str = "vision_model",
        prompt: str = RECONSTRUCT,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        feature_steps: int = 30,
        feature_guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        feature_latents: torch.Tensor | None = None,
        negative_feature_latents: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        attention_kwargs: dict | None = None,
    ) -> Blip3oPipelineOutput | tuple:
        """Generate an image like a given one.

        Args:
            image: one image or a list of images.
            through: "vision_model": decode the image's EVA-CLIP features, which shows how much the decoder can keep;
                "language_model": the language model reads the image and `prompt`, and features are generated. The
                model was not trained to edit images, and the result resembles the image loosely.
            prompt: beside the image, for `through="language_model"`.

        The other arguments are those of the pipeline's call. Raises ValueError for an invalid argument.
        """
        if through not in ("vision_model", "language_model"):
            raise ValueError(f"through={through!r} must be 'vision_model' or 'language_model'.")
        images, prompts = read_images(image), read_prompts(prompt)
        settings = self._settings(height, width, None, (0, 0), num_inference_steps, guidance_scale, output_type, None)
        sampler = self._feature_sampler(feature_steps, feature_guidance_scale)
        given = {"features": feature_latents, "negative": negative_feature_latents, "latents": latents}
        encoded = through == "vision_model"
        noise = self._noise(len(images), generator, given, settings, from_image=encoded)
        if encoded:
            condition = None
            features = torch.stack([self.encode_image(one) for one in images])
        else:
            texts = [reconstruction_text(prompts[0])] * len(images)
            condition, features = self.encode_texts(texts, images), None
        out = self._generate(condition, [NEGATIVE_PROMPT], 1, noise, sampler, settings, features)
        return self._finish(out, return_dict)

    def _feature_sampler(self, num_steps: int, guidance_scale: float) -> tuple[int, float]:
        check_whole_numbers(feature_steps=num_steps)
        check_numbers(feature_guidance_scale=guidance_scale)
        return num_steps, guidance_scale

    def _read_negative(self, negative_prompt, count: int) -> list[str]:
        if negative_prompt is None:
            return [NEGATIVE_PROMPT]
        negatives = read_prompts(negative_prompt, "negative_prompt")
        if len(negatives) not in (1, count):
            raise ValueError(
                f"negative_prompt has {len(negatives)} texts; give one, or one for each of {count} prompts."
            )
        return negatives

    def _warn_of_special_tokens(self, prompts: list[str]) -> None:
        for prompt in prompts:
            if found := special_tokens_in(self.tokenizer, prompt):
                logger.warning(f"The prompt contains {', '.join(found)}, which the model reads as special tokens.")

    def _generate(
        self, condition, negatives, per_prompt, noise: Noise, sampler, settings, features: torch.Tensor | None = None
    ):
        """Images from the states of the queries, or from image features where these are given."""
        encoded, negative = features is not None, None
        if features is None:
            assert noise.features is not None
            features = self._features(condition, noise.features, *sampler)
        if settings.guided and encoded:  # the original guides these against the features of an all-zero input
            side = self.vision_model.config.image_size
            negative = self._encode_pixels(torch.zeros(3, side, side))[None]
        elif settings.guided:
            assert noise.negative is not None
            negative = self._negative_features(negatives, noise.negative, per_prompt, sampler)
        return self._decode(features, negative, noise, settings)
