"""BLIP3-o: a frozen Qwen2.5-VL with learned queries, a diffusion head towards EVA-CLIP features, an SDXL decoder."""
