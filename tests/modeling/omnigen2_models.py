"""Tiny OmniGen2 pipelines for the tests: the golden one, and one of another shape with random weights."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline
from echo4o.modeling.omnigen2.transformer_omnigen2 import OmniGen2Transformer2DModel
from tests.test_parity_omnigen2 import GOLDEN

CHECKPOINT = GOLDEN / "checkpoint"


def golden_pipeline(**options) -> OmniGen2Pipeline:
    pipe = OmniGen2Pipeline.from_original(CHECKPOINT, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def other_pipeline() -> OmniGen2Pipeline:
    """Other axes, depths, heads, channels and VAE scale; an untied language model."""
    torch.manual_seed(0)
    transformer = OmniGen2Transformer2DModel(
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=32,
        ffn_dim_multiplier=2,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 40, 40),
        text_feat_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    config = AutoConfig.from_pretrained(CHECKPOINT / "mllm")
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 32, 1, 2, 1
    text.layer_types = ["full_attention"]
    text.rope_parameters["mrope_section"] = [2, 3, 3]
    config.vision_config.out_hidden_size, config.tie_word_embeddings = 32, False
    pipe = OmniGen2Pipeline(
        transformer=transformer.eval(),
        mllm=Qwen2_5_VLForConditionalGeneration(config).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        tokenizer=AutoTokenizer.from_pretrained(CHECKPOINT / "processor"),
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT / "processor"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
