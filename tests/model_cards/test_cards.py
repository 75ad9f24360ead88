"""The cards: what they say, what they leave out, whose words stay, and what the schema refuses."""

import re

import pytest
from pydantic import ValidationError

from echo4o.dataset_scripts.card import make_card
from echo4o.model_cards.cards import adapter_card, app_card, metric_card, pipeline_card, results_card
from echo4o.model_cards.facts import About, Dataset, ModelFamily, Result, Training, read_about, read_family
from echo4o.model_cards.merge import BEGIN, END, merged, own_words, split
from echo4o.model_cards.schema import SCHEMAS, usage_blocks, validate

BAGEL = read_family("bagel")
WEIGHTS = {"transformer": {"parameters": 1234567, "dtype": "bfloat16"}}
LORA = {"r": 8, "lora_alpha": 16, "use_rslora": False, "use_dora": True}
VALUES = {
    "benchmark": "genevalpp",
    "score": 0.5,
    "withheld": None,
    "coverage": 0.95,
    "groups": {
        "counting": {"score": 0.25, "scored": 4, "total": 5},
        "color_attr": {"score": None, "scored": 0, "total": 5},
    },
    "intervals": {"method": "bootstrap", "score": [0.4, 0.6], "groups": {"counting": [0.125, 0.375]}},
    "prompts": {"count": 280, "official": True, "part": None},
    "judge": {"judge": "openai:some-judge"},
}
MANIFEST = {
    "rows": {"given": 12, "accepted": 11, "rejected": 1},
    "configurations": {"multi_reference": {"rows": 11, "bytes": 2_500_000, "content_bytes": 3, "shards": []}},
    "source": {"name": "Echo-4o-Image", "revision": None},
}


def training(about: About | None = None) -> Training:
    return Training("steps: 3\n", "LoRA of rank 8.", 3, 1200, 61.7, [Dataset("rows", 12 if about else None, about)])


def cards() -> dict[str, str]:
    return {
        "pipeline": pipeline_card("ns/x", BAGEL, WEIGHTS, True),
        "adapter": adapter_card("ns/x", BAGEL, LORA, True, base_model="ns/base"),
        "dataset": make_card(MANIFEST, "ns/x"),
        "metric": metric_card("ns/x", "X", "X measures.\nMore.", "@article{}", ["correct"], "metric.compute()"),
        "app": app_card("ns/x", ["ns/model", "ns/lora"], "6.31.0"),
        "results": results_card("ns/x", Result("GenEval++", VALUES), "model", 3),
    }


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_kind_is_valid_and_names_its_repository_in_its_usage(kind):
    card = cards()[kind]
    validate(card, kind)
    blocks = usage_blocks(split(card)[1])
    assert blocks and all('"ns/x"' in block for block in blocks)
    for block in blocks:
        compile(block, "usage", "exec")
    assert "None" not in card.replace("`None`", "") and "\n\n\n" not in card
    assert not re.search(r"^[-|].*\n#", card, re.M), "a heading without a blank line above it"


def test_what_no_file_says_is_left_out():
    data, text = split(pipeline_card("ns/x", BAGEL, WEIGHTS, True))
    assert not {"base_model", "base_model_relation", "datasets", "widget", "model-index"} & data.keys()
    assert not re.search("## Training|## Evaluation|<Gallery|Fine-tuned from", text)
    assert "The training data of these weights is not known. If it includes Echo-4o-Image" in text
    assert "`transformer` | 1,234,567 | bfloat16" in text


def test_a_run_and_a_result_are_reported_with_their_numbers():
    card = pipeline_card(
        "ns/x", BAGEL, WEIGHTS, True, base_model="ns/base", datasets=("ns/rows",), training=training(About()),
        results=(Result("GenEval++", VALUES),), widget=({"text": "a cat", "output": {"url": "samples/1.png"}},),
    )  # fmt: skip
    validate(card, "pipeline")
    data, text = split(card)
    assert (data["base_model"], data["base_model_relation"], data["datasets"]) == ("ns/base", "finetune", ["ns/rows"])
    (metric,) = data["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 0.5 and metric["args"]["interval_95"] == [0.4, 0.6]
    assert (
        metric["args"] | {"coverage": 0.95, "judge": "openai:some-judge", "official_prompts": True} == metric["args"]
    )
    assert "3 optimizer steps over 1,200 samples in 62 seconds" in text and "```yaml\nsteps: 3\n```" in text
    assert "0.500, 95% interval 0.400 to 0.600. Coverage 95.0% of 280 prompts" in text
    assert "| counting | 0.250 | 0.125 to 0.375 | 4 of 5 |" in text and "| color_attr | none |  | 0 of 5 |" in text
    assert "`rows`, 12 rows. Images distilled from GPT-4o" in text and "<Gallery />" in text


def test_a_withheld_score_is_not_a_score():
    values = VALUES | {
        "score": None,
        "withheld": "coverage is 0.95",
        "intervals": VALUES["intervals"] | {"score": None},
    }
    values |= {"prompts": {"count": 280, "official": False, "part": None}}
    card = pipeline_card("ns/x", BAGEL, WEIGHTS, True, results=(Result("GenEval++", values),))
    validate(card, "pipeline")
    data, text = split(card)
    assert "model-index" not in data
    assert "(not the official prompts): no overall score, because coverage is 0.95" in text


def test_the_provenance_of_training_images():
    said = {
        None: "is not known",
        About(): "The training data includes images that were generated by a model of OpenAI",
        About(title="Shapes", pictures="Drawn.", from_openai=False): "do not come from a model of OpenAI",
    }
    for about, words in said.items():
        assert words in adapter_card("ns/x", BAGEL, LORA, True, base_model="ns/base", training=training(about))
    assert "were generated by a model of OpenAI" in make_card(MANIFEST)
    about = {"title": "Shapes", "pictures": "Drawn by a program.", "from_openai": False, "license": "apache-2.0"}
    own = make_card(MANIFEST | {"source": MANIFEST["source"] | {"about": about}})
    assert "OpenAI" not in own and "# Shapes" in own and split(own)[0]["license"] == "apache-2.0"
    assert "license" not in split(make_card(MANIFEST))[0]


def test_licences_say_where_they_come_from():
    text = split(pipeline_card("ns/x", BAGEL, WEIGHTS, True))[1]
    for part in (
        "| BAGEL | Apache-2.0 |",
        "| FLUX VAE | Apache-2.0 |",
        "see its card | [Qwen/",
        "[google/siglip",
    ):
        assert part in text
    assert "but other sizes than the released checkpoint" in split(pipeline_card("ns/x", BAGEL, WEIGHTS, False))[1]


def test_a_release_says_what_it_is_or_is_refused():
    assert read_about("title: T\npictures: P").from_openai
    for wrong in ("titel: T", "title: ''", "[", "- a"):
        with pytest.raises(ValueError, match="about.yaml cannot be used"):
            read_about(wrong)


# --- whose words stay ------------------------------------------------------------------------------------------------


def test_words_around_the_marks_stay_and_facts_are_renewed():
    first = cards()["adapter"]
    mine = first.replace(BEGIN, f"My words above.\n\n{BEGIN}").replace(END, f"{END}\n\nMy words below.")
    mine = mine.replace("license: apache-2.0", "license: mit\nthumbnail: cat.png").replace("- lora", "- lora\n- cats")
    new = adapter_card("ns/x", BAGEL, LORA | {"r": 99}, True, base_model="ns/newer")
    card = merged(new, mine)
    validate(card, "adapter")
    data, text = split(card)
    assert text.startswith("My words above.\n\n" + BEGIN) and text.endswith(END + "\n\nMy words below.")
    assert "rank 99" in text and "rank 8" not in text and text.count("## Usage") == 1
    assert data["license"] == "mit" and data["thumbnail"] == "cat.png" and data["base_model"] == "ns/newer"
    assert data["tags"] == ["echo-4o", "bagel", "lora", "template:sd-lora", "cats"]
    assert merged(new, card) == card, "once more changes nothing"


@pytest.mark.parametrize("before", ["# Mine\n\nBy hand.\n", "---\nlicense: mit\n---\n\n# Mine\n\nBy hand.\n"])
def test_a_card_written_by_hand_stays_whole(before):
    card = merged(cards()["pipeline"], before)
    validate(card, "pipeline")
    data, text = split(card)
    assert text.startswith("# Mine\n\nBy hand.\n\n" + BEGIN) and own_words(card) == "# Mine\n\nBy hand."
    assert data["license"] == ("mit" if "mit" in before else "apache-2.0")


def test_without_anything_before_it_is_as_written():
    assert merged(cards()["pipeline"], None) == cards()["pipeline"] and own_words(cards()["pipeline"]) == ""
    with pytest.raises(ValueError, match="README.md: its YAML cannot be read"):
        merged(cards()["pipeline"], "---\na: [\n---\n")


# --- the schema ------------------------------------------------------------------------------------------------------

WRONG = [
    ("pipeline", "library_name: diffusers", "library_name: transformers", "library_name: Input should be 'diffusers'"),
    ("pipeline", "license: apache-2.0", "licence: apache-2.0", "license: Field required"),
    ("pipeline", "license: apache-2.0", "licence: apache-2.0", "licence: unknown key"),
    ("pipeline", "pipeline_tag: any-to-any", "pipeline_tag: text-to-text", "pipeline_tag: "),
    ("pipeline", "## Limits", "## Limit", "the section '## Limits' is missing"),
    ("pipeline", "```python", "```py", "'## Usage' shows no Python code"),
    ("pipeline", "- en", "- english", "language.0: "),
    ("pipeline", END, "", "the two markers around the generated part must each occur once"),
    ("adapter", "base_model: ns/base", "base_model: base", "base_model: "),
    ("adapter", "base_model_relation: adapter", "base_model_relation: finetune", "base_model_relation: "),
    ("adapter", "base_model: ns/base\n", "", "base_model: Field required"),
    ("dataset", "configs:", "config:", "configs: Field required"),
    ("dataset", "num_examples: 11", "num_examples: many", "splits.0.num_examples: "),
    ("metric", "sdk: gradio", "sdk: streamlit", "sdk: "),
    ("results", "split: test", "name: test", "configs.0.data_files.0.split: Field required"),
]


@pytest.mark.parametrize("tag", ["image-text-to-image", "image-to-image"])
def test_another_family_has_another_task_of_the_hub(tag):
    family = BAGEL.model_copy(update={"pipeline_tag": tag, "adapter_pipeline_tag": tag})
    card = pipeline_card("ns/demo", family, WEIGHTS, True)
    validate(card, "pipeline")
    assert split(card)[0]["pipeline_tag"] == tag
    card = adapter_card("ns/demo", family, LORA, True, base_model="ns/base")
    validate(card, "adapter")
    assert split(card)[0]["pipeline_tag"] == tag


def test_a_family_with_a_task_that_the_hub_lacks_is_an_error():
    with pytest.raises(ValidationError, match="pipeline_tag"):
        ModelFamily.model_validate({**BAGEL.model_dump(), "pipeline_tag": "text-to-text"})


@pytest.mark.parametrize(("kind", "right", "wrong", "said"), WRONG, ids=lambda value: str(value)[:20])
def test_the_schema_refuses(kind, right, wrong, said):
    card = cards()[kind]
    assert right in card
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        validate(card.replace(right, wrong), kind)
    assert str(caught.value).startswith(f"README.md is not a valid card of this {kind}:")


def test_a_heading_inside_code_is_not_a_section():
    card = cards()["pipeline"].replace("## Limits", "```\n## Limits\n```")
    with pytest.raises(ValueError, match="the section '## Limits' is missing"):
        validate(card, "pipeline")
