"""`hf:MODEL` and `self`: judges that run in this process."""

import asyncio
from collections.abc import Callable
from typing import Any

from echo4o.endpoints.chat_endpoint import ChatRequest
from echo4o.endpoints.endpoint import CallFault, ModelAnswer
from echo4o.evaluation.judges.base import Judge

MAX_TOKENS = 512


class _LocalJudge(Judge):
    """Answers one question at a time, in a thread, so that the event loop can handle an interrupt meanwhile."""

    parallel = 1

    async def ask(self, request: ChatRequest, key: str) -> ModelAnswer:
        try:
            return await asyncio.to_thread(self.answer, request)
        except (ValueError, RuntimeError) as error:
            raise CallFault("model_error", f"{self.name}: {error}") from error

    def answer(self, request: ChatRequest) -> ModelAnswer:
        raise NotImplementedError


class TransformersJudge(_LocalJudge):
    """A vision-language model of transformers with a chat template; decodes greedily."""

    def __init__(self, model: str, device: str | None = None, max_tokens: int | None = None):
        self.model_id, self.name = model, f"hf:{model}"
        self.device, self.max_tokens = device or "auto", max_tokens or MAX_TOKENS
        self._model: Any = None
        self._processor: Any = None
        self._require_vision()

    def _require_vision(self) -> None:
        """Check the configuration alone, before any image is generated."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        config = AutoConfig.from_pretrained(self.model_id)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(f"--judge {self.name}: a {config.model_type} model does not see images, and a judge must")

    def identity(self) -> dict[str, Any]:
        self.prepare()
        return {
            "judge": self.name,
            "revision": getattr(self._model.config, "_commit_hash", None),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "max_tokens": self.max_tokens,
        }

    def prepare(self) -> None:
        if self._model is not None:
            return
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(self.model_id)
        if not getattr(self._processor, "chat_template", None):
            raise ValueError(f"--judge {self.name}: its processor does not have a chat template")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForImageTextToText.from_pretrained(self.model_id, dtype="auto")
        self._model = model.to(device).eval()

    def answer(self, request: ChatRequest) -> ModelAnswer:
        import torch

        from echo4o.modeling.common.image_files import open_image

        content = []
        for labelled in request.images:
            image = open_image(labelled.image.path)
            content += [{"type": "text", "text": f"{labelled.label}:"}, {"type": "image", "image": image}]
        content.append({"type": "text", "text": request.text})
        system = [{"role": "system", "content": [{"type": "text", "text": request.system}]}] if request.system else []
        inputs = self._processor.apply_chat_template(
            [*system, {"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        with torch.no_grad():
            output = self._model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        text = self._processor.decode(tokens, skip_special_tokens=True)
        ends = self._model.generation_config.eos_token_id
        ended = len(tokens) > 0 and int(tokens[-1]) in (ends if isinstance(ends, list) else [ends])
        cut = len(tokens) >= self.max_tokens and not ended
        return ModelAnswer(text, cut=cut, input_tokens=inputs["input_ids"].shape[1], output_tokens=len(tokens))


class PipelineJudge(_LocalJudge):
    """The evaluated pipeline itself, which judges its own images through its `chat`."""

    def __init__(self, model: str, load_pipeline: Callable | None = None, max_tokens: int | None = None):
        self.model_id, self.name = model, f"self:{model}"
        self._load, self.max_tokens = load_pipeline, max_tokens or MAX_TOKENS
        self._pipe: Any = None

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "max_tokens": self.max_tokens}

    def prepare(self) -> None:
        if self._pipe is None:
            if self._load is None:
                from echo4o.modeling.pipelines import pipeline_class

                self._load = pipeline_class(self.model_id).from_pretrained
            self._pipe = self._load(self.model_id)
            self._pipe.set_progress_bar_config(disable=True)

    def answer(self, request: ChatRequest) -> ModelAnswer:
        from echo4o.modeling.common.image_files import open_image

        self.prepare()
        images = [open_image(labelled.image.path) for labelled in request.images]
        prompt = "\n\n".join(part for part in (request.system, request.text) if part)
        return ModelAnswer(self._pipe.chat(prompt, image=images, max_new_tokens=self.max_tokens))
