"""Results in the Hub's form for leaderboards, beside `model-index` in the card."""

import json

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from echo4o.hub.facts import eval_result_files
from echo4o.model_cards.cards import pipeline_card
from echo4o.model_cards.eval_results import eval_results_yaml
from echo4o.model_cards.facts import Result
from echo4o.model_cards.merge import split
from echo4o.model_cards.schema import validate
from tests.model_cards.test_cards import BAGEL, VALUES, WEIGHTS

GENEVAL = VALUES | {"benchmark": "geneval", "measure": {"name": "GenEval", "published": None, "why_not": None}}


def write(folder, values):
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def test_a_result_as_an_entry():
    text = eval_results_yaml(Result("GenEval", GENEVAL), "owner/geneval", "original")
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/geneval", "original", 0.5)
    assert entry.notes == "GenEval, judge openai:some-judge, 95% interval 0.4 to 0.6, coverage 95.0%, official prompts"


def test_files_are_written_for_known_and_for_named_datasets(tmp_path):
    places = (write(tmp_path / "a", VALUES | {"benchmark": "omnicontext"}), write(tmp_path / "b", GENEVAL))
    assert set(eval_result_files(places, ())) == {".eval_results/omnicontext.yaml"}
    files = eval_result_files(places, ("geneval=owner/geneval#rewritten",))
    assert set(files) == {".eval_results/omnicontext.yaml", ".eval_results/geneval.yaml"}
    dataset = yaml.safe_load(files[".eval_results/geneval.yaml"])[0]["dataset"]
    assert dataset == {"id": "owner/geneval", "task_id": "rewritten"}


def test_a_withheld_score_and_bad_names_are_not_published(tmp_path):
    withheld = write(tmp_path / "a", GENEVAL | {"score": None, "withheld": "coverage is 0.5"})
    assert eval_result_files((withheld,), ()) == {}
    with pytest.raises(ValueError, match="geneval=owner/geneval: needed is BENCHMARK=DATASET"):
        eval_result_files((withheld,), ("geneval=owner/geneval",))
    place = write(tmp_path / "b", GENEVAL)
    for bad in ("geneval=not a name", "geneval=", "owner/geneval"):
        with pytest.raises(ValueError):
            eval_result_files((place,), (bad,))
    with pytest.raises(ValueError, match="there is no overall score to publish"):
        eval_results_yaml(Result("GenEval", GENEVAL | {"score": None}), "owner/geneval")


def test_the_card_names_the_measure():
    card = pipeline_card("ns/x", BAGEL, WEIGHTS, True, results=(Result("GenEval", GENEVAL),))
    validate(card, "pipeline")
    data, _ = split(card)
    assert data["model-index"][0]["results"][0]["metrics"][0]["args"]["measure"] == "GenEval"
