"""The judges that run here: pixels, the pipeline itself, and a vision-language model of transformers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.judges import make_judge
from echo4o.evaluation.judging import JudgingOptions
from echo4o.evaluation.run import evaluate_images

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
NO_PROBE = JudgingOptions(probe=False)


def shapes():
    """Prompts of Shapes-4o, as rows, with pictures: right, wrong count, wrong place, right."""
    from echo4o.evaluation.benchmarks.shapes4o.rendering import render
    from echo4o.evaluation.benchmarks.shapes4o.scene import ShapeGroup, lay_out

    rows = [
        {
            "tag": "colour",
            "prompt": "a photo of a red star",
            "include": [{"class": "star", "count": 1, "color": "red"}],
        },
        {"tag": "count", "prompt": "a photo of three hearts", "include": [{"class": "heart", "count": 3}]},
        {
            "tag": "colour/pos",
            "prompt": "a photo of a blue cross on the left and a green circle on the right",
            "include": [
                {"class": "cross", "count": 1, "color": "blue", "region": "left"},
                {"class": "circle", "count": 1, "color": "green", "region": "right"},
            ],
        },
        {
            "tag": "pos/size",
            "prompt": "a photo of a larger star on the left and a smaller heart on the right",
            "include": [
                {"class": "star", "count": 1, "size": "larger", "region": "left"},
                {"class": "heart", "count": 1, "size": "smaller", "region": "right"},
            ],
        },
    ]
    shown = [
        [ShapeGroup("star", "red")],
        [ShapeGroup("heart", count=2)],
        [ShapeGroup("cross", "blue", 1, "right"), ShapeGroup("circle", "green", 1, "left")],
        [ShapeGroup("star", None, 1, "left", "large"), ShapeGroup("heart", None, 1, "right", "small")],
    ]
    return rows, {str(number): render(lay_out(groups)) for number, groups in enumerate(shown, start=1)}


def test_pixels(tmp_path):
    rows, pictures = shapes()
    result = evaluate_images("shapes4o", pictures, "pixels", tmp_path, rows=rows, options=NO_PROBE)
    scores = {group: of["score"] for group, of in result["groups"].items()}
    assert scores == {"colour": 1.0, "count": 0.0, "colour/pos": 0.0, "pos/size": 1.0}
    assert result["score"] == 0.5 and result["judge"]["judge"] == "pixels"
    reasons = {record["id"]: record["reason"] for record in JsonLines(tmp_path / "records.jsonl")}
    assert reasons["2"] == "2 x heart, asked for 3"
    assert reasons["1"] == "exactly the objects that were asked for"
    assert evaluate_images("shapes4o", pictures, "pixels", tmp_path, rows=rows, options=NO_PROBE) == result


def test_shapes4o_is_for_pixels_only(tmp_path):
    rows, pictures = shapes()
    with pytest.raises(ValueError, match="can only be judged by pixels"):
        evaluate_images("shapes4o", pictures, "openai:judge", tmp_path, rows=rows)


def test_an_image_without_a_prompt(tmp_path):
    rows, pictures = shapes()
    with pytest.raises(ValueError, match="no prompt with the id '9'"):
        evaluate_images("shapes4o", pictures | {"9": pictures["1"]}, "pixels", tmp_path, rows=rows)


def test_in_a_notebook(tmp_path):
    import asyncio

    async def cell():
        rows, pictures = shapes()
        return evaluate_images("shapes4o", pictures, "pixels", tmp_path, rows=rows, options=NO_PROBE)

    assert asyncio.run(cell())["coverage"] == 1.0


def one_cup():
    row = {"tag": "counting", "prompt": "A photo of a cup", "include": [{"class": "cup", "count": 1}]}
    return [row], {"1": Image.new("RGB", (40, 30), "red")}


def test_the_pipeline_judges_itself(tmp_path):
    """The tiny golden model cannot write JSON: an honest judge_error, no score."""
    rows, pictures = one_cup()
    from echo4o import Echo4oPipeline

    def load(model):
        assert model == "golden"
        return Echo4oPipeline.from_original(
            GOLDEN / "checkpoint",
            vae_image_limits={"max_size": 64, "min_size": 32},
            vision_image_limits={"max_size": 56, "min_size": 28},
        )

    judge = make_judge("self", "golden", load, max_tokens=4)
    result = evaluate_images("genevalpp", pictures, judge, tmp_path, rows=rows, options=NO_PROBE)
    assert result["score"] is None and result["statuses"]["judge_error"] == 1
    (record,) = JsonLines(tmp_path / "records.jsonl")
    assert record["faults"][0]["kind"] in ("no_json", "empty")


def test_the_pipelines_answer_is_read(tmp_path):
    class Pipeline:
        def set_progress_bar_config(self, disable):
            pass

        def chat(self, prompt, image, max_new_tokens):
            assert "A photo of a cup" in prompt and [picture.size for picture in image] == [(40, 30)]
            return 'Let me see. {"reason": "one cup", "correct": 1}'

    rows, pictures = one_cup()
    judge = make_judge("self", "m", lambda model: Pipeline())
    assert evaluate_images("genevalpp", pictures, judge, tmp_path, rows=rows, options=NO_PROBE)["score"] == 1.0


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    """A LLaVA of a few thousand random weights, with the golden tokenizer."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
        Qwen2Tokenizer,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = Qwen2Tokenizer.from_pretrained(GOLDEN / "checkpoint")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def test_a_transformers_model_is_asked(tiny_llava, tmp_path):
    rows, pictures = one_cup()
    judge = make_judge(f"hf:{tiny_llava}", device="cpu", max_tokens=4)
    result = evaluate_images("genevalpp", pictures, judge, tmp_path, rows=rows, options=NO_PROBE)
    assert result["judge"]["dtype"] == "float32" and result["statuses"]["judge_error"] == 1
    (record,) = JsonLines(tmp_path / "records.jsonl")
    assert record["faults"][0]["kind"] == "cut_off"
    # The probe finds out before anything is judged.
    judge = make_judge(f"hf:{tiny_llava}", device="cpu", max_tokens=4)
    with pytest.raises(ValueError, match="cut_off.*--max-tokens"):
        evaluate_images("genevalpp", pictures, judge, tmp_path / "probed", rows=rows)


def test_a_transformers_model_without_vision(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="a qwen2 model does not see images, and a judge must"):
        make_judge(f"hf:{tmp_path}")
