"""The transformer's forward pass and its intermediate results."""

from __future__ import annotations

import torch

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .golden_set import GoldenSet


def inputs_of(tensors, rows: int) -> dict:
    """Arguments of the transformer for a case."""
    return {
        "hidden_states": [tensors[f"x.{row}"] for row in range(rows)],
        "timestep": tensors["timestep"],
        "encoder_hidden_states": tensors["text"],
        "encoder_attention_mask": tensors["text_mask"],
        "ref_image_hidden_states": [tensors.series(f"ref.{row}") for row in range(rows)],
    }


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    for name, case in file.json["cases"].items():
        with check.trying(name):
            _check_case(golden.pipe.transformer, case, file.tensors.under(name), check.of(name))


def _check_case(transformer, case, tensors, check) -> None:
    rows = case["rows"]
    inputs = inputs_of(tensors, rows)
    counts = [len(references) for references in inputs["ref_image_hidden_states"]]
    check("refs", counts, case["refs"] or [0] * rows)
    case.note("x")  # whether the original was given a list
    with Watch(transformer) as watch:
        out = transformer(**inputs).sample
    for row in range(rows):
        check(f"out.{row}", out[row], tensors[f"out.{row}"], SINGLE)
        # A row of a batch is the row alone.
        alone = {
            "hidden_states": inputs["hidden_states"][row : row + 1],
            "timestep": inputs["timestep"][row : row + 1],
            "encoder_hidden_states": inputs["encoder_hidden_states"][row : row + 1],
            "encoder_attention_mask": inputs["encoder_attention_mask"][row : row + 1],
            "ref_image_hidden_states": inputs["ref_image_hidden_states"][row : row + 1],
        }
        check(f"out.{row}: alone", transformer(**alone).sample[0], tensors[f"out.{row}"], SINGLE)
    for name in case["mid"]:
        with check.trying(f"mid.{name}"):
            got, lengths = watch.result(name)
            want = tensors[f"mid.{name}"]
            if lengths is None:
                check(f"mid.{name}", got, want, SINGLE)
                continue
            parts = got.split(lengths)
            kept = list(want)
            if name == "ref_refined":  # the original has an empty row for every text without references
                kept = [want[i] for i, row in enumerate(_reference_rows(counts)) if row is not None]
            check(f"mid.{name}: rows", len(parts), len(kept))
            for row, (part, padded) in enumerate(zip(parts, kept, strict=False)):
                check(f"mid.{name}.{row}", part, padded[: len(part)], SINGLE)


def _reference_rows(counts: list[int]) -> list[int | None]:
    """Row of each reference; None for the empty place of a row without any."""
    return [row for index, count in enumerate(counts) for row in ([index] * count or [None])]


class Watch:
    """Notes what the stacks of blocks compute, packed without padding."""

    def __init__(self, transformer):
        self.transformer, self.outputs, self.inputs, self.lengths, self._hooks = transformer, {}, {}, {}, []

    def __enter__(self) -> Watch:
        model = self.transformer
        embed = model.time_caption_embed
        self._watch("caption", embed.caption_embedder)
        self._watch("temb", embed.timestep_embedder)
        for name, blocks in (
            ("context_refined", model.context_refiner),
            ("noise_refined", model.noise_refiner),
            ("ref_refined", model.ref_image_refiner),
        ):
            self._watch(name, blocks[-1])
        for index, block in enumerate(model.layers):
            self._watch(f"layer.{index}", block)
        return self

    def _watch(self, name, module) -> None:
        def hook(module, args, output):
            self.outputs[name], self.inputs[name] = output, args
            self.lengths[name] = args[2] if len(args) > 2 else None

        self._hooks.append(module.register_forward_hook(hook))

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def result(self, name: str) -> tuple[torch.Tensor, list[int] | None]:
        """A packed result and the lengths of its rows; None for one vector per row."""
        if name == "temb":
            return self.outputs[name], None
        if name == "caption":
            return self.outputs[name], self.lengths["context_refined"]
        if name == "joint_in":
            return self.inputs["layer.0"][0], self.lengths["layer.0"]
        if name == "norm_out":
            last = f"layer.{len(self.transformer.layers) - 1}"
            _, _, lengths, temb, token_time = self.inputs[last]
            return self.transformer.norm_out(self.outputs[last], temb, token_time), lengths
        return self.outputs[name], self.lengths[name]
