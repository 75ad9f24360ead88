"""What each of our tensors is called in the original, against names written by hand and diffusers' own conversion."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo4o.modeling.bagel.convert import convert_to_diffusers

CHECKPOINT = Path(__file__).parents[1] / "parity/golden/checkpoint"

# Our name -> the original's, one pair of each kind, written out by hand; the VAE's names are compared with diffusers' below.
PAIRS = {
    "transformer": {
        "embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "time_embed.linear_1.weight": "time_embedder.mlp.0.weight",
        "time_embed.linear_1.bias": "time_embedder.mlp.0.bias",
        "time_embed.linear_2.weight": "time_embedder.mlp.2.weight",
        "time_embed.linear_2.bias": "time_embedder.mlp.2.bias",
        "proj_in.weight": "vae2llm.weight",
        "proj_in.bias": "vae2llm.bias",
        "proj_out.weight": "llm2vae.weight",
        "proj_out.bias": "llm2vae.bias",
        "pos_embed": "latent_pos_embed.pos_embed",
        "norm_out.und.weight": "language_model.model.norm.weight",
        "norm_out.gen.weight": "language_model.model.norm_moe_gen.weight",
        "layers.0.und.norm1.weight": "language_model.model.layers.0.input_layernorm.weight",
        "layers.1.gen.norm1.weight": "language_model.model.layers.1.input_layernorm_moe_gen.weight",
        "layers.1.und.norm2.weight": "language_model.model.layers.1.post_attention_layernorm.weight",
        "layers.0.gen.norm2.weight": "language_model.model.layers.0.post_attention_layernorm_moe_gen.weight",
        "layers.0.und.to_q.weight": "language_model.model.layers.0.self_attn.q_proj.weight",
        "layers.1.gen.to_q.bias": "language_model.model.layers.1.self_attn.q_proj_moe_gen.bias",
        "layers.1.und.to_k.bias": "language_model.model.layers.1.self_attn.k_proj.bias",
        "layers.0.gen.to_k.weight": "language_model.model.layers.0.self_attn.k_proj_moe_gen.weight",
        "layers.0.und.to_v.bias": "language_model.model.layers.0.self_attn.v_proj.bias",
        "layers.1.gen.to_v.weight": "language_model.model.layers.1.self_attn.v_proj_moe_gen.weight",
        "layers.1.und.to_out.weight": "language_model.model.layers.1.self_attn.o_proj.weight",
        "layers.0.gen.to_out.weight": "language_model.model.layers.0.self_attn.o_proj_moe_gen.weight",
        "layers.0.und.norm_q.weight": "language_model.model.layers.0.self_attn.q_norm.weight",
        "layers.1.gen.norm_q.weight": "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight",
        "layers.1.und.norm_k.weight": "language_model.model.layers.1.self_attn.k_norm.weight",
        "layers.0.gen.norm_k.weight": "language_model.model.layers.0.self_attn.k_norm_moe_gen.weight",
        "layers.0.und.ff.gate_proj.weight": "language_model.model.layers.0.mlp.gate_proj.weight",
        "layers.1.gen.ff.up_proj.weight": "language_model.model.layers.1.mlp_moe_gen.up_proj.weight",
        "layers.1.und.ff.down_proj.weight": "language_model.model.layers.1.mlp.down_proj.weight",
    },
    "vision_model": {
        "patch_embed.weight": "vit_model.vision_model.embeddings.patch_embedding.weight",
        "patch_embed.bias": "vit_model.vision_model.embeddings.patch_embedding.bias",
        "position_embedding.weight": "vit_model.vision_model.embeddings.position_embedding.weight",
        "layers.0.layer_norm1.weight": "vit_model.vision_model.encoder.layers.0.layer_norm1.weight",
        "layers.1.layer_norm2.bias": "vit_model.vision_model.encoder.layers.1.layer_norm2.bias",
        "layers.1.self_attn.k_proj.weight": "vit_model.vision_model.encoder.layers.1.self_attn.k_proj.weight",
        "layers.0.self_attn.out_proj.bias": "vit_model.vision_model.encoder.layers.0.self_attn.out_proj.bias",
        "layers.0.mlp.fc1.weight": "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight",
        "layers.1.mlp.fc2.bias": "vit_model.vision_model.encoder.layers.1.mlp.fc2.bias",
        "post_layernorm.weight": "vit_model.vision_model.post_layernorm.weight",
        "connector.fc1.weight": "connector.fc1.weight",
        "connector.fc2.bias": "connector.fc2.bias",
        "pos_embed": "vit_pos_embed.pos_embed",
    },
}


def test_names_stand_for_the_same_tensors(tmp_path):
    convert_to_diffusers(CHECKPOINT, tmp_path / "there")
    theirs = load_file(CHECKPOINT / "ema.safetensors")
    for component, pairs in PAIRS.items():
        ours = load_file(tmp_path / "there" / component / "diffusion_pytorch_model.safetensors")
        for name, original in pairs.items():
            assert torch.equal(ours[name], theirs[original]), (name, original)


def test_vae_names_agree_with_diffusers_own_conversion(tmp_path):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    if not hasattr(single_file, "convert_ldm_vae_checkpoint"):
        pytest.skip("this diffusers has no convert_ldm_vae_checkpoint")
    convert_to_diffusers(CHECKPOINT, tmp_path / "there")
    config = json.loads((tmp_path / "there/vae/config.json").read_text())
    theirs = single_file.convert_ldm_vae_checkpoint(load_file(CHECKPOINT / "ae.safetensors"), config)
    ours = load_file(tmp_path / "there/vae/diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
