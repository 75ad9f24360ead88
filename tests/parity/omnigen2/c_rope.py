"""Position ids and rotary angles."""

from __future__ import annotations

import torch

from echo4o.modeling.omnigen2.transformer_omnigen2 import Reference, rotary_angles, row_positions

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    transformer = golden.pipe.transformer
    axes = transformer.config.axes_dim_rope
    for name, layout in file.json["layouts"].items():
        with check.trying(name):
            _check_layout(transformer, layout, file.tensors.under(name), check.of(name))
    for name in [n for n in file.tensors if n.startswith("table.")]:
        with check.trying(name):
            axis = int(name.split(".")[1].removeprefix("axis"))
            table = file.tensors[name]  # (cos and sin, positions, pairs)
            positions = torch.zeros(table.shape[1], len(axes))
            positions[:, axis] = torch.arange(table.shape[1])
            start = sum(axes[:axis]) // 2
            angles = [x[:, 0, start : start + axes[axis] // 2] for x in rotary_angles(positions, axes)]
            check(name, torch.stack(angles), table, SINGLE)


def _check_layout(transformer, case, tensors, check) -> None:
    patch = transformer.config.patch_size
    lengths, targets = case["text_lengths"], case["target_latent_hw"]
    references = case["refs_latent_hw"] or [None] * len(lengths)
    channels = transformer.config.in_channels
    listed = [
        Reference(torch.zeros(channels, *size), index, row)
        for row, sizes in enumerate(references)
        for index, size in enumerate(sizes or ())
    ]
    texts = [torch.zeros(length, transformer.config.text_feat_dim) for length in lengths]
    with torch.no_grad():
        layout = transformer.prepare(texts, listed, [tuple(size) for size in targets]).layout
    cosines, sines = (x[:, 0].split(layout.row_lengths) for x in layout.joint_angles)
    ids, cos, sin = tensors["position_ids"], tensors["cos"], tensors["sin"]
    check("rows", len(lengths), ids.shape[0])
    check("longest", max(layout.row_lengths), ids.shape[1])
    for row, length in enumerate(layout.row_lengths):
        grids = [(h // patch, w // patch) for h, w in references[row] or ()]
        target = (targets[row][0] // patch, targets[row][1] // patch)
        check(f"position_ids.{row}", row_positions(lengths[row], grids, target), ids[row, :length])
        check(f"position_ids.{row}: padding", ids[row, length:].abs().sum(), 0)
        check(f"cos.{row}", cosines[row], cos[row, :length], SINGLE)
        check(f"sin.{row}", sines[row], sin[row, :length], SINGLE)
        check(f"cos.{row}: padding", cos[row, length:], torch.ones_like(cos[row, length:]))
        check(f"sin.{row}: padding", sin[row, length:], torch.zeros_like(sin[row, length:]))
