"""What is committed under base/: the tokenizer and the VAE, and the script that makes them again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS, captions, held_out_prompts, training_prompt
from echo4o.evaluation.benchmarks.shapes4o.rendering import render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import lay_out
from echo4o.quickstart.tiny_base import BASE, load_tokenizer, load_vae, main
from echo4o.quickstart.tiny_tokenizer import SPECIAL_TOKENS, train_tokenizer
from echo4o.quickstart.tiny_vae import CONFIG, VaeTraining, reconstruct, train_vae, training_images

BYTES = 12_000_000
VAE_BYTES = 2_000_000


@pytest.fixture(scope="module")
def vae():
    return load_vae()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_the_committed_tokenizer_is_what_the_script_makes(tokenizer):
    again = train_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert [again.encode(p.text) for p in held_out_prompts()] == [tokenizer.encode(p.text) for p in held_out_prompts()]


def test_qwen2_special_tokens_in_order(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.encode("<|im_start|>")[0] == ids[1] and len(tokenizer.encode("<|im_start|>")) == 1


def test_instructions_are_short_and_any_text_survives(tokenizer):
    assert 400 <= len(tokenizer) <= 600
    assert max(len(tokenizer.encode(text)) for text in captions(500)) <= 24
    for text in ("a photo of seven crosses", "Zürich, 12 °C\n\n", "星 🙂 tab\tend "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.long
def test_pictures_survive_the_vae(vae):
    rng = np.random.default_rng(7)
    prompts = [training_prompt(TAGS[index % len(TAGS)], rng) for index in range(108)]
    drawn = [np.asarray(render(lay_out(p.groups, "prompt", rng), tint(i))) for i, p in enumerate(prompts)]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
    right = [check(p.groups, detect(picture))[0] for p, picture in zip(prompts, reconstruct(vae, pictures))]
    assert sum(right) >= 0.97 * len(right), [p.text for p, ok in zip(prompts, right) if not ok]


def test_latents_are_normalised(vae):
    with torch.no_grad():
        latents = vae.encode(training_images(64, np.random.default_rng(8))).latent_dist.mean
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.shape[1:] == (16, 8, 8)
    assert latents.mean((0, 2, 3)).abs().max() < 0.15 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_the_vae_has_the_original_architecture(vae):
    assert not vae.config.use_quant_conv and not vae.config.use_post_quant_conv
    assert vae.config.norm_num_groups == 32 and all(width % 32 == 0 for width in vae.config.block_out_channels)
    assert {key: vae.config[key] for key in ("latent_channels", "layers_per_block")} == {
        key: CONFIG[key] for key in ("latent_channels", "layers_per_block")
    }


def test_what_is_committed_is_small_16_bit_and_names_no_machine():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BYTES
    assert (BASE / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size <= VAE_BYTES
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} <= {"BF16", "F16"}
        elif path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text())


@pytest.mark.long
def test_training_is_repeatable():
    settings = VaeTraining(small_steps=4, whole_steps=1, decoder_steps=1, small_batch=2, whole_batch=1, measured=4)
    first, again = (train_vae(settings, say=str).state_dict() for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first.values(), again.values()))


@pytest.mark.long
def test_a_time_limit_ends_the_training():
    said = []
    train_vae(VaeTraining(minutes=1e-6, decoder_steps=1, whole_batch=1, measured=4), say=said.append)
    assert "trained for 1 steps" in said[-1]


def test_the_script_checks_its_arguments(tmp_path, capsys):
    for wrong in (["--minutes", "0"], ["--threads", "0"], ["--part", "poem"]):
        with pytest.raises(SystemExit):
            main([*wrong, "--out", str(tmp_path / "base")])
    assert not (tmp_path / "base").exists()
    assert "--minutes is 0.0; it must be above 0" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="make tiny-base"):
        load_vae(tmp_path)


def test_the_script_makes_a_tokenizer(tmp_path, capsys):
    main(["--part", "tokenizer", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())])
    made = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    assert made == {path.name: path.read_bytes() for path in Path(BASE / "tokenizer").iterdir()}
    assert "next: echo4o quickstart" in capsys.readouterr().out
