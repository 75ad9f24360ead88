"""Where each tensor of mmdet's Mask2Former (Swin) goes in a transformers checkpoint, as names on disk."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COPY, UNFOLD = "copy", "unfold_to_blocks"
THIRDS = ("third_1", "third_2", "third_3")  # query, key, value along dimension 0

_BACKBONE = "model.pixel_level_module.encoder"
_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"

# (pattern of the name without .weight/.bias, name with groups, change). A name with {} is filled with three names.
_RULES = tuple(
    (re.compile(pattern), target, change)
    for pattern, target, change in (
        (r"backbone\.patch_embed\.projection", rf"{_BACKBONE}.embeddings.patch_embeddings.projection", COPY),
        (r"backbone\.patch_embed\.norm", rf"{_BACKBONE}.embeddings.norm", COPY),
        (r"backbone\.norm0", rf"{_BACKBONE}.hidden_states_norms.stage1", COPY),
        (r"backbone\.norm1", rf"{_BACKBONE}.hidden_states_norms.stage2", COPY),
        (r"backbone\.norm2", rf"{_BACKBONE}.hidden_states_norms.stage3", COPY),
        (r"backbone\.norm3", rf"{_BACKBONE}.hidden_states_norms.stage4", COPY),
        (
            r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)",
            rf"{_BACKBONE}.encoder.layers.\1.downsample.\2",
            UNFOLD,
        ),
        *(
            (rf"backbone\.stages\.(\d+)\.blocks\.(\d+)\.{source}", rf"{_BACKBONE}.encoder.layers.\1.blocks.\2.{target}", change)
            for source, target, change in (
                (r"norm1", "layernorm_before", COPY),
                (r"norm2", "layernorm_after", COPY),
                (r"attn\.w_msa\.qkv", "attention.self.{}", "query key value"),
                (r"attn\.w_msa\.proj", "attention.output.dense", COPY),
                (r"attn\.w_msa\.relative_position_bias_table", "attention.self.relative_position_bias_table", COPY),
                (r"ffn\.layers\.0\.0", "intermediate.dense", COPY),
                (r"ffn\.layers\.1", "output.dense", COPY),
            )
        ),
        *(
            (rf"panoptic_head\.pixel_decoder\.{source}", rf"{_PIXELS}.{target}", COPY)
            for source, target in (
                (r"input_convs\.(\d+)\.conv", r"input_projections.\1.0"),
                (r"input_convs\.(\d+)\.gn", r"input_projections.\1.1"),
                (r"encoder\.layers\.(\d+)\.attentions\.0\.(\w+)", r"encoder.layers.\1.self_attn.\2"),
                (r"encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0", r"encoder.layers.\1.fc1"),
                (r"encoder\.layers\.(\d+)\.ffns\.0\.layers\.1", r"encoder.layers.\1.fc2"),
                (r"encoder\.layers\.(\d+)\.norms\.0", r"encoder.layers.\1.self_attn_layer_norm"),
                (r"encoder\.layers\.(\d+)\.norms\.1", r"encoder.layers.\1.final_layer_norm"),
                (r"lateral_convs\.0\.conv", "adapter_1.0"),
                (r"lateral_convs\.0\.gn", "adapter_1.1"),
                (r"output_convs\.0\.conv", "layer_1.0"),
                (r"output_convs\.0\.gn", "layer_1.1"),
                (r"mask_feature", "mask_projection"),
            )
        ),
        *(
            (rf"panoptic_head\.transformer_decoder\.layers\.(\d+)\.{source}", rf"{_QUERIES}.decoder.layers.\1.{target}", change)
            for source, target, change in (
                (r"attentions\.0\.attn\.(in_proj_weight|in_proj_bias|out_proj)", r"cross_attn.\2", COPY),
                (r"attentions\.1\.attn\.out_proj", "self_attn.out_proj", COPY),
                (r"attentions\.1\.attn\.in_proj_(weight|bias)", r"self_attn.{}.\2", "q_proj k_proj v_proj"),
                (r"ffns\.0\.layers\.0\.0", "fc1", COPY),
                (r"ffns\.0\.layers\.1", "fc2", COPY),
                (r"norms\.0", "cross_attn_layer_norm", COPY),
                (r"norms\.1", "self_attn_layer_norm", COPY),
                (r"norms\.2", "final_layer_norm", COPY),
            )
        ),
        (r"panoptic_head\.transformer_decoder\.post_norm", rf"{_QUERIES}.decoder.layernorm", COPY),
        (r"panoptic_head\.query_embed", rf"{_QUERIES}.queries_embedder", COPY),
        (r"panoptic_head\.query_feat", rf"{_QUERIES}.queries_features", COPY),
        (r"panoptic_head\.level_embed", rf"{_QUERIES}.level_embed", COPY),
        (r"panoptic_head\.cls_embed", "class_predictor", COPY),
        (r"panoptic_head\.mask_embed\.0", rf"{_QUERIES}.decoder.mask_predictor.mask_embedder.0.0", COPY),
        (r"panoptic_head\.mask_embed\.2", rf"{_QUERIES}.decoder.mask_predictor.mask_embedder.1.0", COPY),
        (r"panoptic_head\.mask_embed\.4", rf"{_QUERIES}.decoder.mask_predictor.mask_embedder.2.0", COPY),
    )
)  # fmt: skip
# Computed by transformers, or without effect on the output.
_UNUSED = re.compile(r"relative_position_index$|criterion|loss_")
_LEVEL_ENCODING = "panoptic_head.pixel_decoder.level_encoding.weight"


def targets_of(name: str) -> list[tuple[str, str]]:
    """The tensors that a tensor of mmdet fills, as (name, change); none for a buffer that is computed.

    Raises:
        ValueError: the name is not one of mmdet's Mask2Former with a Swin backbone.
    """
    if _UNUSED.search(name):
        return []
    if name == _LEVEL_ENCODING:  # a parameter in transformers, an embedding in mmdet
        return [(f"{_PIXELS}.level_embed", COPY)]
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        stem, dot, kind = name, "", ""
    for pattern, target, change in _RULES:
        match = pattern.fullmatch(stem)
        if match:
            filled = f"{match.expand(target)}{dot}{kind}"
            if change in (COPY, UNFOLD):
                return [(filled, change)]
            return [(filled.format(part), third) for part, third in zip(change.split(), THIRDS)]
    raise ValueError(f"{name} is not a tensor of mmdet's Mask2Former with a Swin backbone")


def changed(tensor: "torch.Tensor", change: str) -> "torch.Tensor":
    """The tensor of transformers."""
    if change in THIRDS:
        return tensor.chunk(3, dim=0)[THIRDS.index(change)].contiguous()
    if change == UNFOLD:
        # mmdet orders the 4 * C inputs of a merge by channel, transformers by block; blocks 1 and 2 are exchanged.
        by_channel = tensor.reshape(*tensor.shape[:-1], -1, 4)[..., [0, 2, 1, 3]]
        return by_channel.transpose(-1, -2).reshape(tensor.shape).contiguous()
    return tensor.contiguous()
