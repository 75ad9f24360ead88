"""Readings kept for later calls: the same numbers bit for bit, what is shared, what is not, and when it is forgotten."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig

DRAW = {"num_inference_steps": 2, "output_type": "latent"}
TARGETS = r"layers\.\d+\.(gen|und)\.to_[qkv]"


@dataclass
class Work:
    """What was computed since the last look."""

    tokens: list[int] = field(default_factory=list)  # of every pass that reads
    patches: list[int] = field(default_factory=list)  # of every call of the vision model
    pictures: int = 0  # encoded by the VAE

    def taken(self) -> tuple[list[int], list[int], int]:
        seen = (self.tokens, self.patches, self.pictures)
        self.tokens, self.patches, self.pictures = [], [], 0
        return seen


NOTHING = ([], [], 0)


@pytest.fixture
def mine(pipe):
    """A pipeline of its own: these tests change weights."""
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in ("transformer", "vision_model", "vae")}
    made = type(pipe)(**{**pipe.components, **parts}, **options(pipe))
    made.set_progress_bar_config(disable=True)
    return made


def options(pipe) -> dict:
    return {name: pipe.config[name] for name in ("vae_image_limits", "vision_image_limits")}


@pytest.fixture
def work(mine, monkeypatch):
    work = Work()
    encode = mine.vae.encode

    def note_pass(module, args, kwargs, out):
        sequence = args[2]
        if out.logits is None and not bool(sequence.gen_noised.any()):
            work.tokens.append(len(sequence.input_ids) + len(sequence.gen_segment))

    def count(x):
        work.pictures += 1
        return encode(x)

    mine.transformer.register_forward_hook(note_pass, with_kwargs=True)
    mine.vision_model.register_forward_hook(lambda module, args, out: work.patches.append(len(args[0])))
    monkeypatch.setattr(mine.vae, "encode", count)
    return work


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt="a red dot", seed=0, **settings):
    return pipe(prompt, generator=seeded(seed), **DRAW | settings).images


def test_off_by_default_and_nothing_is_kept(mine, work):
    assert mine.prefill_cache is None
    draw(mine)
    first = work.taken()
    draw(mine)
    assert work.taken() == first != NOTHING


@pytest.mark.long
def test_every_kind_of_call_is_the_same_bit_for_bit(mine, work, pictures):
    """Without the cache, with it when it is empty, and from it."""
    a, b, c = (pictures[f"img_{x}"] for x in "abc")
    calls = [
        lambda: draw(mine, guidance_interval=(0.0, 1.0), height=32, width=48),
        lambda: draw(mine, "make it blue", image=a),
        lambda: draw(mine, ["one", "two"], image=[[b, c], None], height=32, width=32),
        lambda: draw(mine, None, inputs=["like", a, "but with", b]),
        lambda: mine("a dot", think=True, max_think_tokens=5, image=a, generator=seeded(), **DRAW).texts,
        lambda: mine.chat(["what is this?", "and this?"], image=[a, b], max_new_tokens=5),
    ]
    plain = [call() for call in calls]
    mine.enable_prefill_cache()
    work.taken()
    filled = [call() for call in calls]
    assert work.taken() != NOTHING
    recalled = [call() for call in calls]
    plan = len(mine.text_segment(recalled[4][0]))
    assert work.taken() == ([plan], [], 0)  # what was thought is read again: it continues a context
    for want, *others in zip(plain, filled, recalled, strict=True):
        for got in others:
            assert got == want if isinstance(want[0], str) else all(map(torch.equal, got, want))


def test_another_seed_shares_a_prompt_and_encodes_sampled_latents_again(mine, work, pictures):
    mine.enable_prefill_cache()
    draw(mine, seed=0)
    work.taken()
    draw(mine, seed=1)
    assert work.taken() == NOTHING
    draw(mine, "make it blue", image=pictures["img_a"], seed=0)
    tokens, patches, encoded = work.taken()
    assert (len(tokens), len(patches), encoded) == (2, 1, 1)
    draw(mine, "make it blue", image=pictures["img_a"], seed=1)
    assert work.taken() == (tokens, [], 0)


def test_another_last_text_shares_what_stands_before_it(mine, work, pictures):
    mine.enable_prefill_cache()
    for ask in (
        lambda text: mine.chat(text, image=pictures["img_a"], max_new_tokens=2),
        lambda text: draw(mine, text, image=pictures["img_b"], guidance_scale=1.0, image_guidance_scale=1.0),
        lambda text: draw(mine, text, think=True, max_think_tokens=1),
    ):
        ask("what is this?")
        work.taken()
        ask("a longer question: what is it?")
        tokens, patches, encoded = work.taken()
        assert tokens[0] == len(mine.text_segment("a longer question: what is it?"))
        assert (patches, encoded) == ([], 0)


def test_chat_and_generation_share_the_features_of_an_image(mine, work, pictures):
    """Only those: the contexts differ from the first token on, because drawing also reads the picture's latents."""
    picture = mine.vae_limits.resize(pictures["img_a"])  # at another size they would see other pixels
    mine.enable_prefill_cache()
    mine.chat("what is this?", image=picture, max_new_tokens=1)
    work.taken()
    draw(mine, "what is this?", image=picture)
    tokens, patches, encoded = work.taken()
    assert (len(tokens), patches, encoded) == (2, [], 1)


CHANGES = {
    "in place": lambda pipe: pipe.transformer.layers[1].und.to_k.weight.data.mul_(1.01),
    "one value": lambda pipe: torch.nn.init.constant_(
        pipe.transformer.embed_tokens.weight[pipe.special_tokens.text_start], 0.5
    ),
    "vision": lambda pipe: pipe.vision_model.connector.fc1.weight.data.mul_(1.01),
    "vae": lambda pipe: pipe.vae.encoder.conv_in.weight.data.mul_(1.5),
    "dtype": lambda pipe: pipe.transformer.to(torch.float64),
    "adapter": lambda pipe: add_adapter(pipe),
    "configuration": lambda pipe: pipe.transformer.register_to_config(rope_theta=1e4),
    "attention": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
}


def add_adapter(pipe):
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_read_anew(mine, work, pictures, change):
    cache = mine.enable_prefill_cache()
    before = draw(mine, image=pictures["img_a"])
    work.taken()
    assert torch.equal(draw(mine, image=pictures["img_a"]), before)
    assert work.taken() == NOTHING and cache.hits > 0
    with torch.no_grad():
        CHANGES[change](mine)
    got = draw(mine, image=pictures["img_a"])
    assert len(work.taken()[0]) == 2
    mine.disable_prefill_cache()
    assert torch.equal(got, draw(mine, image=pictures["img_a"])) and not torch.equal(got, before)


@pytest.mark.long
def test_tiles_and_autocast_have_readings_of_their_own(mine, work, pictures):
    mine.enable_prefill_cache()
    mine.vae.tile_sample_min_size, mine.vae.tile_latent_min_size = 32, 4
    edit = {"image": pictures["img_a"], "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    plain = draw(mine, "make it blue", **edit)

    def differs_from_plain_and_is_right() -> None:
        got, cache = draw(mine, "make it blue", **edit), mine.prefill_cache
        mine.disable_prefill_cache()
        assert torch.equal(got, draw(mine, "make it blue", **edit)) and not torch.equal(got, plain)
        mine.prefill_cache = cache

    mine.vae.enable_tiling()
    differs_from_plain_and_is_right()
    mine.vae.disable_tiling()
    with torch.autocast("cpu", torch.bfloat16):
        differs_from_plain_and_is_right()
    work.taken()
    assert torch.equal(draw(mine, "make it blue", **edit), plain)
    assert work.taken() == NOTHING


def test_adapters_on_off_scaled_and_merged_have_readings_of_their_own(mine, work):
    mine.enable_prefill_cache()
    exact = draw(mine, guidance_scale=1.0)
    add_adapter(mine)

    def state():
        return draw(mine, guidance_scale=1.0)

    pictures = [state()]
    for module in mine.transformer.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 0.5
    pictures.append(state())
    mine.transformer.disable_adapters()
    assert torch.equal(state(), exact)
    mine.transformer.enable_adapters()
    mine.transformer.fuse_lora()
    mine.transformer.unload_lora()  # leaves weights that no name tells from those at the start
    pictures.append(state())
    mine.disable_prefill_cache()
    assert torch.equal(state(), pictures[-1])
    assert not torch.equal(pictures[-1], exact)
    torch.testing.assert_close(pictures[1], pictures[2], atol=3e-4, rtol=0)
    assert not torch.equal(pictures[0], pictures[1])


def test_memory_is_bounded_reported_and_given_back(mine, work, caplog):
    cache = mine.enable_prefill_cache()
    draw(mine, "1 2", guidance_scale=1.0)
    size = cache.nbytes
    config = mine.transformer.config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = config.num_layers * 2 * config.num_key_value_heads * head_dim * 4
    assert size == len(mine.text_segment("1 2")) * per_token
    cache = mine.enable_prefill_cache(max_bytes=2 * size)
    for prompt in ("1 2", "3 4", "1 2", "5 6"):  # room for two of them, and "3 4" is the older one
        draw(mine, prompt, guidance_scale=1.0)
    assert len(cache) == 2 and cache.nbytes == 2 * size and (cache.hits, cache.misses) == (1, 3)
    work.taken()
    draw(mine, "1 2", guidance_scale=1.0)
    assert work.taken() == NOTHING
    draw(mine, "3 4", guidance_scale=1.0)
    assert work.taken() != NOTHING
    assert (
        repr(cache)
        == f"PrefillCache(2 entries, {2 * size / 2**20:.1f} of {2 * size / 2**20:.1f} MiB, 2 hits, 4 misses)"
    )
    cache.clear()
    assert len(cache) == cache.nbytes == 0
    draw(mine, "3 4", guidance_scale=1.0)
    assert work.taken() != NOTHING
    cache = mine.enable_prefill_cache(max_bytes=size - 1)
    draw(mine, "1 2", guidance_scale=1.0)
    assert len(cache) == 0 and "is not kept" in caplog.text


def test_what_is_kept_is_not_written_to(mine, pictures):
    """Thinking, drawing and chatting all write behind or before a context."""
    cache = mine.enable_prefill_cache()
    mine.chat("what is this?", image=pictures["img_a"], max_new_tokens=4)
    before = {key: [x.clone() for x in entry] for key, entry in cache._entries.items()}
    for _ in range(2):
        mine.chat("what is this?", image=pictures["img_a"], max_new_tokens=4)
        draw(mine, "what is this?", image=pictures["img_a"], think=True, max_think_tokens=3)
    assert all(torch.equal(x, y) for key, entry in before.items() for x, y in zip(cache._entries[key], entry))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "1GB"])
def test_impossible_sizes_are_named(mine, size):
    with pytest.raises(ValueError, match="max_bytes="):
        mine.enable_prefill_cache(size)


def test_weights_that_cannot_be_distinguished_are_refused(mine):
    mine.enable_prefill_cache()
    mine.transformer.layers[0].und.to_q.to("meta")
    with pytest.raises(ValueError, match=r"layers\.0\.und\.to_q\.weight changes: its values are offloaded"):
        draw(mine)
