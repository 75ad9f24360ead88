"""Watches the public pipeline at work: what it reads, predicts, decodes and says; and hands it recorded noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.segments_bagel import PackedSequence, Segment

from ..golden import Record
from ..report import Check
from .golden_set import GoldenSet
from .sequences import segments_and_positions


def build_pipeline(golden: GoldenSet, transforms: Record, shift: float | None = None) -> Echo4oPipeline:
    """The pipeline of the golden checkpoint with the golden file's bounds on pictures."""
    bounds = {}
    for ours, theirs in (("vae_image_limits", "vae_transform"), ("vision_image_limits", "vit_transform")):
        transform = transforms[theirs]
        bounds[ours] = {"max_size": transform["max_image_size"], "min_size": transform["min_image_size"]}
        if "max_pixels" in transform:
            bounds[ours]["max_pixels"] = transform["max_pixels"]
    components = dict(golden.components)
    # A copy, always: the recorder looks over the shoulder of this one.
    changes = {} if shift is None else {"shift": shift}
    components["scheduler"] = type(components["scheduler"]).from_config(components["scheduler"].config, **changes)
    pipe = Echo4oPipeline(**components, max_references=64)
    pipe.register_to_config(
        **bounds
    )  # afterwards: the original takes bounds that no checkpoint may be configured with
    pipe.set_progress_bar_config(disable=True)
    for ours, theirs in (("vae_limits", "vae_transform"), ("vision_limits", "vit_transform")):
        assert getattr(pipe, ours).stride == transforms[theirs]["image_stride"], theirs
    return pipe


@dataclass
class Read:
    """A segment that went into a cache."""

    cache: int
    kind: str
    before: int  # tokens in the cache before it
    after: int
    positions: list[int]  # rotary, in the golden order
    text_ids: list[int]  # without the places of picture tokens


@dataclass
class Row:
    """One (picture, branch) row of a denoising step."""

    context: int  # tokens of its cache that it sees
    position: int
    sequence: PackedSequence


class Recorder:
    """Wraps one pipeline instance. Use as a context manager: the models are shared and must get their hooks back."""

    def __init__(self, pipe: Echo4oPipeline, noises: Iterable[torch.Tensor] = ()):
        self.pipe = pipe
        self.noises = list(noises)  # of the conditions, in the order of their draws
        self.reads: list[Read] = []
        self.condition_latents: list[torch.Tensor] = []
        self.steps: list[list[Row]] = []
        self.velocities: list[torch.Tensor] = []
        self.times: list[float] = []
        self.latents: list[torch.Tensor] = []  # after each step
        self.decoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fed: list[int] = []  # tokens fed while generating text
        self.logits: list[torch.Tensor] = []
        self.generation_start: tuple[int, int] | None = None  # cache length and rotary position
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        pipe = self.pipe
        pipe.sample_noise = lambda shape, generator: self.noises.pop(0).reshape(shape)
        pipe.prefill = self._around_prefill(pipe.prefill)
        pipe.encode_latent = self._keep(pipe.encode_latent, lambda out, *args: self.condition_latents.append(out))
        pipe.decode_latent = self._keep(pipe.decode_latent, lambda out, latent: self.decoded.append((latent, out)))
        pipe.scheduler.step = self._keep(pipe.scheduler.step, lambda out, v, *args, **kw: self.velocities.append(v))
        self._hooks = [pipe.transformer.register_forward_hook(self._after_forward, with_kwargs=True)]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        for name in ("sample_noise", "prefill", "encode_latent", "decode_latent"):
            delattr(self.pipe, name)
        del self.pipe.scheduler.step

    def on_step_end(self, pipe, step: int, timestep: torch.Tensor, given: dict) -> dict:
        """The callback to pass to the pipeline."""
        self.times.append(float(timestep) / pipe.scheduler.config.num_train_timesteps)
        self.latents.append(given["latents"][0].clone())
        return {}

    @staticmethod
    def _keep(function, note):
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            note(out, *args, **kwargs)
            return out

        return wrapper

    def _around_prefill(self, prefill):
        def wrapper(rows, *args, **kwargs):
            rows = list(rows)
            for cache, segments in rows:
                self._note_segments(cache, segments)
            return prefill(rows, *args, **kwargs)

        return wrapper

    def _note_segments(self, cache, segments: list[Segment]) -> None:
        length, position = cache.length, cache.position
        for segment in segments:
            sequence = self.pipe.pack([[segment]], [position])
            text = torch.ones(len(sequence.input_ids), dtype=torch.bool)
            text[sequence.vision_index] = False
            after, positions = length + len(segment), segments_and_positions(sequence)[1].tolist()
            ids = sequence.input_ids[text].tolist()
            self.reads.append(Read(id(cache), segment.kind, length, after, positions, ids))
            length, position = after, position + segment.step

    def _after_forward(self, module, args, kwargs, out) -> None:
        sequence = args[2] if len(args) > 2 else kwargs["sequence"]
        contexts = args[4] if len(args) > 4 else kwargs.get("contexts")
        if out.logits is not None:
            # The cache already holds the token just fed, but its position is moved on by the caller afterwards.
            if self.generation_start is None:
                self.generation_start = (contexts[0].cache.length - 1, contexts[0].cache.position)
            self.fed.append(int(sequence.input_ids[0]))
            self.logits.append(out.logits[0].clone())
        elif bool(sequence.gen_noised.any()):
            rows = zip(contexts, sequence.spans, strict=True)
            self.steps.append(
                [Row(c.length, int(sequence.und_position[spans[0].und.start]), sequence) for c, spans in rows]
            )


def check_prefills(reads: list[Read], calls: list[Record], check: Check) -> None:
    """The original's prefill calls, sorted by the context that they extend, against what our caches read.

    The original always fills a second context with the texts alone; ours only where a guidance branch needs it.
    """
    chains: list[list[dict]] = [[], []]  # the condition; the context without pictures
    lengths = [0, 0]
    for call in calls:
        call = call.plain()
        which = 0 if call["kv_len_before"] == lengths[0] or call["kind"] != "text" else 1
        chains[which].append(call)
        lengths[which] = call["kv_len_after"]
    caches = dict.fromkeys(read.cache for read in reads)
    ours = [[read for read in reads if read.cache == cache] for cache in caches]
    if len(ours) == 1:
        ours.append(_without_pictures(ours[0])[: len(chains[1])])
    for got, chain, name in zip(ours, chains, ("cond", "without_pictures"), strict=True):
        check(f"{name}.kind", [read.kind for read in got], [call["kind"] for call in chain])
        check(f"{name}.kv_len_before", [read.before for read in got], [call["kv_len_before"] for call in chain])
        check(f"{name}.kv_len_after", [read.after for read in got], [call["kv_len_after"] for call in chain])
        for field, key in (("positions", "position_ids"), ("text_ids", "text_ids")):
            values = [x for read in got for x in getattr(read, field)]
            check(f"{name}.{key}", values, [x for call in chain for x in call[key]])


def _without_pictures(reads: list[Read]) -> list[Read]:
    """The texts of a context, as they would stand in one of their own."""
    texts, length = [], 0
    for read in reads:
        if read.kind == "text":
            after = length + read.after - read.before
            texts.append(replace(read, before=length, after=after, positions=list(range(length, after))))
            length = after
    return texts
