"""Regional compilation: one graph for all layers, both experts, any number of rows and tokens.

Graph breaks and recompiles are the tracer's doing, so most tests leave the slow code generation out.
"""

import copy
import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

SETTINGS = {"num_inference_steps": 6, "output_type": "latent"}
LATENT = {"output_type": "latent"}
HALVES = 2  # of an expert's work: before attention and after it


@pytest.fixture
def compiled(pipe):
    """Compiles a copy of the golden pipeline's transformer; a graph break or a recompile is an error."""
    original = pipe.transformer

    def compile(backend):
        pipe.transformer = copy.deepcopy(original)
        pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=True)
        return pipe

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield compile
    pipe.transformer = original
    torch._dynamo.reset()


def generations(pipe, pictures) -> list[torch.Tensor]:
    """From one row to six: guidance ends within the first, references of all sizes, two prompts."""

    def draw(*prompt, **options):
        return pipe(*prompt, generator=torch.Generator().manual_seed(0), **SETTINGS, **options).images

    return [
        *draw("a red dot", height=32, width=32, guidance_interval=(0.4, 1.0)),
        *draw("make it blue", image=pictures["img_a"]),
        *draw(["a dot", "both, please"], image=[None, [pictures["img_b"], pictures["img_c"]]], height=48, width=32),
    ]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole_generations_share_one_graph_for_each_half(compiled, pipe, pictures, backend):
    want = generations(pipe, pictures)
    got = generations(compiled(backend), pictures)
    assert counters["stats"]["unique_graphs"] == HALVES
    assert not counters["graph_break"]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=0)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="code generation for CPUs needs a C++ compiler")
def test_generated_code_equals_eager(compiled, pipe, pictures):
    want = generations(pipe, pictures)
    for a, b in zip(generations(compiled("inductor"), pictures), want, strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=0)


def test_compiled_experts_keep_their_names_and_copies_are_plain(compiled, pipe):
    names = list(pipe.transformer.state_dict())
    transformer = compiled("eager").transformer
    assert list(transformer.state_dict()) == names
    assert {"qkv", "finish"} <= vars(transformer.layers[0].gen).keys()
    copied = copy.deepcopy(transformer)
    assert not {"qkv", "finish"} & vars(copied.layers[0].gen).keys()
    assert list(copied.state_dict()) == names


def test_step_caches_work_on_compiled_layers(compiled, pipe):
    from .test_caches import FIRST_BLOCK, draw

    transformer = compiled("eager").transformer
    exact = draw(pipe)
    transformer.enable_cache(FIRST_BLOCK)
    assert not torch.equal(draw(pipe), exact)
    assert counters["stats"]["unique_graphs"] == HALVES


@pytest.mark.long
def test_the_whole_model_compiles_to_full_graphs(pipe, pictures):
    """`torch.compile(pipe.transformer)`: generation, editing and chat, as without it."""

    def results():
        generator = torch.Generator().manual_seed(0)
        edited = pipe("make it blue", image=pictures["img_a"], generator=generator, num_inference_steps=1, **LATENT)
        plain = pipe("a dot", height=32, width=32, generator=generator, num_inference_steps=1, **LATENT)
        return plain.images, edited.images, pipe.chat("what is it?", pictures["img_a"], max_new_tokens=2)

    want, original = results(), pipe.transformer
    torch._dynamo.reset()
    try:
        pipe.transformer = torch.compile(copy.deepcopy(original), fullgraph=True, backend="eager")
        got = results()
    finally:
        pipe.transformer = original
        torch._dynamo.reset()
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=0)
    assert got[2] == want[2]
