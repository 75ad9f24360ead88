"""A loaded pipeline as a server sees it: its options, its adapters, and calls for batches of tasks."""

import inspect
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from echo4o.common.image_metadata import ImageMetadata, pixels_sha256, versions
from echo4o.modeling.pipelines import supported_options
from echo4o.serving.limits import Limits
from echo4o.serving.tasks import Adapters, Answer, ChatTask, GeneratedImage, ImageTask, Task, Text
from echo4o.serving.watching import AnswerWatcher, StepWatcher, before_stop

# Arguments that the server sets itself, or that only Python code can pass.
_RESERVED = {
    "prompt", "image", "inputs", "height", "width", "generator", "latents", "output_type", "return_dict",
    "num_images_per_prompt", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "attention_kwargs",
    "callback_on_token",
}  # fmt: skip
_SHORT_NAMES = {"steps": "num_inference_steps"}
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class ModelOrigin:
    """Where a model comes from, for the metadata of its images.

    Args:
        revision: the commit of a Hub repository, or the fingerprint of a folder.
        adapters: by name: the public name and the revision of each adapter.
        loading: how it was loaded: dtype, device type and so on.
    """

    revision: str = "unknown"
    adapters: dict[str, dict[str, str]] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)


class ServedModel:
    """A pipeline of any class of this package.

    Args:
        pipe: the pipeline, on its device, with its adapters loaded.
        name: the name that clients use.
        source: the folder or Hub repository that it was loaded from.
        adapters: the adapters that act unless a request selects others, with their scales.
        limits: what requests may ask for.
        origin: what the metadata of an image says about the model.
        previews: make previews while sampling, where a request asks for them.
    """

    def __init__(
        self,
        pipe: Any,
        name: str = "echo4o",
        source: str = "",
        adapters: Adapters = (),
        limits: Limits | None = None,
        origin: ModelOrigin | None = None,
        previews: bool = True,
    ):
        self.pipe, self.name, self.source = pipe, name, source
        self.origin, self.previews = origin or ModelOrigin(), previews
        self.default_adapters, self.limits = adapters, limits or Limits()
        self.image_options = _options(type(pipe).__call__)
        self.can_chat = hasattr(type(pipe), "chat")
        self.chat_options = _options(type(pipe).chat) if self.can_chat else {}
        if self.can_chat:
            self.default_new_tokens = inspect.signature(type(pipe).chat).parameters["max_new_tokens"].default
        arguments = inspect.signature(type(pipe).__call__).parameters
        self.takes_references = "image" in arguments
        self.takes_inputs = "inputs" in arguments
        self.takes_size = "height" in arguments and "width" in arguments
        self.one_size = not (self.takes_size and "list" in str(arguments["height"].annotation))
        self.defaults = {n: arguments[n].default for n in self.image_options if arguments[n].default is not None}
        self.default_settings(False, adapters)  # raises if they need different sampling
        self._active: Adapters | None = None
        # Replaces `call_pipeline` where the call runs in another process, which has the GPU; without progress.
        self.call: Callable[..., tuple[list[Image.Image], list[str | None]]] | None = None
        self.call_chat: Callable[..., list[str]] | None = None
        pipe.set_progress_bar_config(disable=True)

    # --- what the model offers ---

    @property
    def adapter_names(self) -> list[str]:
        """Names of the loaded adapters."""
        loaded = self.pipe.get_list_adapters() if hasattr(self.pipe, "get_list_adapters") else {}
        return sorted({name for names in loaded.values() for name in names})

    @property
    def max_references(self) -> int | None:
        """Most images of a prompt; None: the checkpoint does not say. Without references, chat still takes images."""
        return self.pipe.config.get("max_references") if self.takes_references else None

    def preset(self, with_references: bool) -> dict[str, Any]:
        """The checkpoint's settings for a task, where it has some."""
        presets = self.pipe.config.get("presets") or {}
        return dict(presets.get("with_references" if with_references else "text_to_image", {}))

    def default_settings(self, with_references: bool, adapters: Adapters, steps: int | None = None) -> dict[str, Any]:
        """The settings of an image that a request does not give; it may give `steps`.

        Raises:
            ValueError: two of the adapters need different sampling.
        """
        active = [name for name, scale in adapters if scale]
        few_steps = self.pipe.sampling_preset_of(active) if active else None
        of_adapter = {} if few_steps is None else few_steps.arguments(self.pipe.scheduler, steps)
        return self.defaults | self.preset(with_references) | of_adapter

    # --- requests to tasks ---

    def read_options(self, given: dict[str, Any], chat: bool = False) -> dict[str, Any]:
        """Check options of a request against the pipeline's signature and the limits; None values are left out.

        Raises:
            ValueError: an option that this pipeline does not take, a value of a wrong type or above a limit.
        """
        known = self.chat_options if chat else self.image_options
        options = {}
        for written, value in given.items():
            name = _SHORT_NAMES.get(written, written)
            if name not in known:
                raise ValueError(
                    f"{written}: this model does not take this field; it takes {', '.join(sorted(known))}"
                )
            if value is None:
                continue
            try:
                options[name] = known[name].validate_json(json.dumps(value), strict=True)
            except (ValidationError, ValueError, TypeError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                raise ValueError(f"{written}: {reason} (given: {_short(value)})") from None
        self._check_limits(options)
        return options

    def _check_limits(self, options: dict[str, Any]) -> None:
        tokens = self.limits.new_tokens
        for name, most in (
            ("num_inference_steps", self.limits.steps),
            ("max_think_tokens", tokens),
            ("max_new_tokens", tokens),
        ):
            value = options.get(name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}: this server allows 1 to {most} (given: {value})")

    def read_adapters(self, names: str | Sequence[str] | None, scales: float | Sequence[float] | None) -> Adapters:
        """The adapters of a request: None takes the server's, "none" switches all off.

        Raises ValueError for unknown names, for scales that do not fit them, and for adapters that need different
        sampling.
        """
        if names is None and scales is None:
            return self.default_adapters
        if names is None:
            names = [name for name, _ in self.default_adapters]
            if not names:
                raise ValueError("adapter_scale: no adapter is active; select one with `adapter`")
        chosen = [] if names in ("none", "", []) else [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in chosen if name not in self.adapter_names]:
            have = ", ".join(self.adapter_names) or "no adapters; start it with --lora"
            raise ValueError(f"adapter: {_short(unknown[0])} is not loaded; this server has {have}")
        if len(set(chosen)) < len(chosen):
            raise ValueError("adapter: names an adapter twice")
        values = _as_list(1.0 if scales is None else scales, len(chosen))
        if len(values) != len(chosen):
            raise ValueError(f"adapter_scale: {len(values)} scales for {len(chosen)} adapters")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not -10 <= value <= 10:
                raise ValueError(f"adapter_scale: must be a number from -10 to 10 (given: {_short(value)})")
        adapters = tuple((name, float(value)) for name, value in zip(chosen, values))
        self.default_settings(False, adapters)  # raises if they need different sampling
        return adapters

    def image_tasks(
        self,
        items: list[str | Image.Image],
        *,
        count: int = 1,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        options: dict[str, Any] | None = None,
        adapters: Adapters | None = None,
        previews: int = 0,
    ) -> list[ImageTask]:
        """One task for each of `count` images; image number i has the seed `seed + i`, so that each can be made again
        alone. A missing seed is random.

        Args:
            items: texts and reference images in reading order.
            options: what `read_options` returned.
            previews: most previews of each image.

        Raises:
            ValueError: for what this pipeline or this server does not allow.
        """
        if not 1 <= count <= self.limits.images:
            raise ValueError(f"n: this server generates 1 to {self.limits.images} images per request (given: {count})")
        seed = read_seed(seed, count)
        self._check_items(items)
        for name, value in (("height", height), ("width", width)):
            if value is None:
                continue
            if not self.takes_size:
                raise ValueError(f"{name}: this model generates images of one size")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be a positive whole number (given: {_short(value)})")
        if (height or 1) * (width or 1) > self.limits.pixels:
            raise ValueError(f"size: {width}x{height} has more than {self.limits.pixels} pixels, this server's limit")
        return [
            ImageTask(
                items=items,
                options=dict(options or {}),
                seed=seed + i,
                adapters=self.default_adapters if adapters is None else adapters,
                height=height,
                width=width,
                one_size=self.one_size,
                previews=previews if self.previews else 0,
            )
            for i in range(count)
        ]

    def chat_task(
        self,
        prompt: str,
        images: list[Image.Image],
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        stops: list[str] | None = None,
    ) -> ChatTask:
        """A task for a question about images, or about none. Raises ValueError for what the model does not allow."""
        if not self.can_chat:
            raise ValueError(f"{type(self.pipe).__name__} generates images; it does not answer questions")
        self._check_items([*images, prompt], chat=True)
        return ChatTask(
            [*images, prompt], dict(options or {}), read_seed(seed), self.default_adapters, stops=stops or []
        )

    def _check_items(self, items: list[str | Image.Image], chat: bool = False) -> None:
        texts = [item for item in items if isinstance(item, str)]
        images = len(items) - len(texts)
        if not any(text.strip() for text in texts):
            raise ValueError("prompt: is empty; write what to generate")
        if sum(map(len, texts)) > self.limits.prompt_letters:
            raise ValueError(f"prompt: has more than {self.limits.prompt_letters} letters, this server's limit")
        if images and not chat and not self.takes_references:
            raise ValueError("image: this model takes no reference images")
        if self.max_references is not None and images > self.max_references:
            raise ValueError(f"image: {images} reference images; this model takes at most {self.max_references}")
        if not chat and not self.takes_inputs and (len(texts) != 1 or not isinstance(items[-1], str)):
            raise ValueError("inputs: this model takes reference images followed by one text")

    # --- running tasks ---

    @torch.no_grad()
    def generate(self, tasks: Sequence[ImageTask]) -> list[GeneratedImage]:
        """Generate one image for each task, in one call of the pipeline.

        Raises:
            Cancelled: every task was cancelled; and what the pipeline raises.
        """
        arguments = self._inputs(tasks) | self._sizes(tasks) | tasks[0].options
        seeds, adapters = [task.seed for task in tasks], tasks[0].adapters
        if self.call is None:
            images, plans = self.call_pipeline(arguments, seeds, adapters, self._callback(tasks, time.monotonic()))
        else:
            images, plans = self.call(arguments, seeds, adapters)
        return [
            GeneratedImage(image, task.seed, self._settings(task, image), self._metadata(task), plan, len(tasks))
            for task, image, plan in zip(tasks, images, plans, strict=True)
        ]

    def call_pipeline(
        self, arguments: dict[str, Any], seeds: list[int], adapters: Adapters, callback: dict[str, Any] | None = None
    ) -> tuple[list[Image.Image], list[str | None]]:
        """Call the pipeline; returns the images and the plans. Everything but `callback` can be pickled."""
        self._activate(adapters)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            result = self.pipe(**arguments, generator=generators, **(callback or {}))
        return result.images, getattr(result, "texts", None) or [None] * len(seeds)

    def _inputs(self, tasks: Sequence[Task]) -> dict[str, Any]:
        if self.takes_inputs:
            return {"inputs": [task.items for task in tasks]}
        references = [task.references for task in tasks]
        return {"prompt": [task.text for task in tasks]} | ({"image": references} if any(references) else {})

    def _sizes(self, tasks: Sequence[ImageTask]) -> dict[str, Any]:
        if not self.takes_size or all(task.height is None and task.width is None for task in tasks):
            return {}
        if self.one_size:
            return {"height": tasks[0].height, "width": tasks[0].width}
        return {"height": [task.height for task in tasks], "width": [task.width for task in tasks]}

    def _settings(self, task: ImageTask, image: Image.Image) -> dict[str, Any]:
        """Every setting of an image, those of the presets and defaults as well."""
        steps = task.options.get("num_inference_steps")
        settings = self.default_settings(bool(task.references), task.adapters, steps) | task.options
        if not settings.get("think"):
            for name in ("max_think_tokens", "do_sample", "temperature"):
                settings.pop(name, None)
        known = {name: value for name, value in settings.items() if name in self.image_options}
        size = {"height": image.height, "width": image.width}
        return known | size | {"adapters": [{"name": name, "scale": scale} for name, scale in task.adapters]}

    def _metadata(self, task: ImageTask) -> ImageMetadata:
        """What `echo4o generate --like` needs: each image can be made again alone."""
        size = {name: value for name in ("height", "width") if (value := getattr(task, name)) is not None}
        sources = self.origin.adapters
        return ImageMetadata(
            prompt=task.text,
            seeds=(task.seed,),
            settings=task.options | size,
            references=tuple(map(pixels_sha256, task.references)),
            model=self.source,
            revision=self.origin.revision,
            adapters=tuple(
                {"name": name, "scale": scale, "revision": "unknown"} | sources.get(name, {})
                for name, scale in task.adapters
            ),
            loading=self.origin.loading,
            versions=versions(),
        )

    def _activate(self, adapters: Adapters) -> None:
        if adapters == self._active or not self.adapter_names:
            return
        if adapters:
            self.pipe.enable_lora()
            self.pipe.set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])
        else:
            self.pipe.disable_lora()
        self._active = adapters

    def _callback(self, tasks: Sequence[ImageTask], started: float) -> dict[str, Any]:
        arguments = supported_options(type(self.pipe).__call__)
        if "callback_on_step_end" not in arguments:
            return {}
        watcher = StepWatcher(self.pipe, tasks, started)
        names = {"callback_on_step_end_tensor_inputs": ["latents"] if watcher.previews else []}
        return {"callback_on_step_end": watcher} | {name: names[name] for name in names if name in arguments}

    @torch.no_grad()
    def chat(self, tasks: Sequence[ChatTask]) -> list[Answer]:
        """Answer the questions of all tasks, in one call of the pipeline."""
        self._activate(tasks[0].adapters)
        options = dict(tasks[0].options)
        if "generator" in supported_options(type(self.pipe).chat):
            options["generator"] = [torch.Generator().manual_seed(task.seed) for task in tasks]
        images = [task.references for task in tasks]
        if "callback_on_token" in supported_options(type(self.pipe).chat) and self.call_chat is None:
            options["callback_on_token"] = AnswerWatcher(self.pipe.tokenizer, tasks)
        call = self.call_chat or self.pipe.chat
        answers = call([task.text for task in tasks], **({"image": images} if any(images) else {}), **options)
        done = []
        for task, text in zip(tasks, answers, strict=True):
            tokens = self.count_tokens(text)
            kept = before_stop(text, task.stops)
            cut = kept == text and tokens >= options.get("max_new_tokens", self.default_new_tokens)
            task.notify(Text(kept))
            done.append(Answer(kept, tokens, cut))
        return done

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text; 0 if the pipeline has no tokenizer."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        return 0 if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False))


def _as_list(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * count


def read_seed(seed: int | None, count: int = 1) -> int:
    """The seed of the first of `count` images; a random one for None. Raises ValueError for an invalid one."""
    if seed is None:
        return secrets.randbelow(2**31)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED - count:
        raise ValueError(f"seed: must be a whole number from 0 to {MAX_SEED - count} (given: {_short(seed)})")
    return seed


def _options(method: Callable) -> dict[str, TypeAdapter]:
    """Arguments of a pipeline's method that a request can set, with the check of their types."""
    options = {}
    for name, parameter in inspect.signature(method, eval_str=True).parameters.items():
        if name == "self" or name in _RESERVED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        try:
            options[name] = TypeAdapter(parameter.annotation, config=ConfigDict(allow_inf_nan=False))
        except (PydanticSchemaGenerationError, PydanticUserError):  # tensors and functions
            continue
    return options


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
