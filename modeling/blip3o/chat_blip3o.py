"""Answers about images, by the language model as it is."""

from typing import Any

import torch
from PIL import Image

from ..common.images import qwen_vision_inputs
from ..common.mixin_base import PipelineMixin
from .conditions_blip3o import onload
from .inputs_blip3o import check_numbers, check_whole_numbers, read_chats
from .prompts_blip3o import TokenIds, encode, image_tokens, user_turn


class Blip3oChatMixin(PipelineMixin):
    """`chat`. Put it before `DiffusionPipeline`."""

    language_model: Any
    tokenizer: Any
    image_processor: Any

    @property
    def token_ids(self) -> TokenIds:
        return TokenIds.from_tokenizer(self.tokenizer)

    @torch.no_grad()
    def chat(
        self,
        prompt: str | list[str],
        image: Image.Image | list | None = None,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 0.3,
    ) -> str | list[str]:
        """Answer questions about images, or without images. The language model is used as it is, without the queries.

        Args:
            prompt: one question or a list of questions.
            image: images of the question: one, a list, or None; for a list of questions, a list with one such entry
                for each.
            max_new_tokens: of each answer.
            do_sample, temperature: sample tokens (from torch's global generator) instead of taking the likeliest.

        Returns:
            The answer, or a list of answers for a list of questions.
        """
        check_whole_numbers(max_new_tokens=max_new_tokens)
        check_numbers(temperature=temperature)
        sampling = {"do_sample": True, "temperature": temperature} if do_sample else {"do_sample": False}
        answers = []
        for text, images in read_chats(prompt, image):
            inputs = self.chat_inputs(text, images)
            onload(self.language_model)
            ids = self.language_model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
            answers.append(self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        self.maybe_free_model_hooks()
        return answers[0] if isinstance(prompt, str) else answers

    def chat_inputs(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """The language model's inputs for a question about RGB images."""
        inputs, pad, device = {}, self.token_ids.image_pad, self._execution_device
        if pad in encode(self.tokenizer, text):
            raise ValueError("The question contains <|image_pad|>, which stands for images; pass images as `image`.")
        counts: list[int] = []
        if images:
            inputs = dict(qwen_vision_inputs(self.image_processor, images).to(device))
            counts = (inputs["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        ids = encode(self.tokenizer, user_turn("".join(map(image_tokens, counts)) + text))
        inputs["input_ids"] = torch.tensor([ids], device=device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == pad).int()
        return inputs
