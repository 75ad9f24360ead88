"""Answers of OmniGen2's language model, and images that it asks for."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ..common.adapter_presets import uses_adapter_preset
from ..common.images import qwen_vision_inputs
from ..common.mixin_base import PipelineMixin
from .inputs_omnigen2 import check_sampling, check_settings, read_requests
from .output_omnigen2 import OmniGen2PipelineOutput
from .prompts_omnigen2 import END_TOKENS, GENERATE_TOKEN, IMAGE_TOKEN, chat_text


class OmniGen2ChatMixin(PipelineMixin):
    """`chat` and `respond`. Put it before `DiffusionPipeline`."""

    mllm: Any
    tokenizer: Any
    image_processor: Any
    token_ids: Callable[[str], list[int]]
    _generate: Callable[..., Any]

    def chat_inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Arguments of the `mllm` for a question about images of any size, on the execution device."""
        inputs = {}
        text = chat_text(prompt, len(images))
        if images:
            inputs = dict(qwen_vision_inputs(self.image_processor, images))
            merged = self.image_processor.merge_size**2
            for grid in inputs["image_grid_thw"]:
                text = text.replace(IMAGE_TOKEN, "\0" * (int(grid.prod()) // merged), 1)
            text = text.replace("\0", IMAGE_TOKEN)
        ids = torch.tensor([self.token_ids(text)])
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            inputs["mm_token_type_ids"] = (ids == self.mllm.config.image_token_id).long()
            inputs["pixel_values"] = inputs["pixel_values"].to(self.mllm.dtype)
        return {name: tensor.to(self._execution_device) for name, tensor in inputs.items()}

    def chat_features(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """What the transformer reads of a question: last hidden states without those of the images' tokens."""
        inputs = self.chat_inputs(prompt, images)
        output = self.mllm(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1, return_dict=True)
        is_text = inputs["input_ids"][0] != self.mllm.config.image_token_id
        return output.hidden_states[-1][0][is_text]

    def end_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS]

    def _answer(self, prompt: str, images: list, max_new_tokens: int, do_sample: bool, temperature: float) -> str:
        """The answer with its special tokens, without the end of the turn."""
        inputs = self.chat_inputs(prompt, images)
        options = {"do_sample": True, "temperature": temperature} if do_sample else {"do_sample": False}
        output = self.mllm.generate(
            **inputs, max_new_tokens=max_new_tokens, eos_token_id=self.end_token_ids(), **options
        )
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).replace("<|im_end|>", "")

    @torch.no_grad()
    def chat(
        self,
        prompt: str | list[str],
        image: Image.Image | list | None = None,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 0.3,
    ) -> str | list[str]:
        """Answer questions, about images or without.

        Args:
            prompt, image: as in the pipeline's call.
            max_new_tokens: of each answer.
            do_sample, temperature: sample the answer instead of taking the likeliest token.

        Returns:
            The answer, or a list of answers for a list of prompts. Special tokens other than the end of the turn are
            kept: an answer that begins with `<|img|>` asks for an image, see [`respond`].
        """
        check_settings(max_new_tokens=max_new_tokens)
        check_sampling(do_sample, temperature)
        presets = self.config["presets"]
        requests = read_requests(
            prompt,
            None,
            image,
            None,
            None,
            presets["text_to_image"],
            presets=presets,
            max_references=self.config["max_references"],
            align_res=True,
        )
        answers = [self._answer(r.prompt, r.references, max_new_tokens, do_sample, temperature) for r in requests]
        self.maybe_free_model_hooks()
        return answers[0] if isinstance(prompt, str) else answers

    @torch.no_grad()
    @uses_adapter_preset
    def respond(
        self,
        prompt: str,
        image: Image.Image | list | None = None,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 0.3,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_range: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        max_pixels: int = 1024 * 1024,
        max_input_image_side_length: int = 1024,
        align_res: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
    ):
        """Answer a request, with an image if the answer begins with `<|img|>`.

        As the original's chat pipeline: the transformer then reads the question with its images through the language
        model. Arguments as in [`chat`] and in the pipeline's call.

        Returns:
            [`OmniGen2PipelineOutput`] with the answer, and with images or None.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"respond takes one prompt with text, not {prompt!r:.100}.")
        counts = {"max_pixels": max_pixels, "max_input_image_side_length": max_input_image_side_length}
        counts |= {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        check_settings(max_new_tokens=max_new_tokens, output_type=output_type, **counts)
        check_sampling(do_sample, temperature)
        requests = read_requests(
            prompt,
            None,
            image,
            height,
            width,
            {
                "guidance_scale": guidance_scale,
                "image_guidance_scale": image_guidance_scale,
                "guidance_range": guidance_range,
            },
            presets=self.config["presets"],
            max_references=self.config["max_references"],
            align_res=align_res,
        )
        images = requests[0].references
        text = self._answer(prompt, images, max_new_tokens, do_sample, temperature)
        results = None
        if text.startswith(GENERATE_TOKEN):
            results = self._generate(
                requests,
                lambda words: self.chat_features(words, images if words == prompt else []),
                steps=num_inference_steps,
                times=None,
                copies=num_images_per_prompt,
                limits={"max_pixels": max_pixels, "max_side": max_input_image_side_length},
                generator=generator,
                latents=latents,
                output_type=output_type,
                callback=(callback_on_step_end, None),
            )
        self.maybe_free_model_hooks()
        return OmniGen2PipelineOutput(images=results, texts=[text])
