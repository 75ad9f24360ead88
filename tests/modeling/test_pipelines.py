"""Finding the class of a pipeline, and refusing options that it lacks."""

import json

import pytest

import echo4o
from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.pipelines import PIPELINES, class_named, original_class, pipeline_class, require_supported
from tests.modeling.conftest import GOLDEN

CHECKPOINT = GOLDEN / "checkpoint"


def test_every_name_is_the_class_of_its_module():
    for name in PIPELINES:
        assert class_named(name).__name__ == name


def test_the_index_names_the_class(tmp_path):
    for name in (["pipeline", "Echo4oPipeline"], "Echo4oPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert pipeline_class(tmp_path) is Echo4oPipeline
    for name in ("FluxPipeline", None, []):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match="holds a pipeline of the class .*; known classes are Echo4oPipeline"):
            pipeline_class(tmp_path)


def test_what_is_not_a_pipeline(tmp_path):
    for model, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "There is no folder"),
        ("nowhere", FileNotFoundError, "There is no folder 'nowhere'"),
        (tmp_path, FileNotFoundError, "is not a pipeline folder"),
        (CHECKPOINT, FileNotFoundError, "Echo4oPipeline.from_original"),
        ("ns/anything", FileNotFoundError, "the Hub cannot be reached"),
        (None, ValueError, "is needed, not None"),
    ):
        options = {"local_files_only": True} if model == "ns/anything" else {}
        with pytest.raises(error, match=message):
            pipeline_class(model, **options)
        with pytest.raises(error, match=message):
            echo4o.load_pipeline(model, **options)


def test_original_layouts_are_recognised(tmp_path):
    assert original_class(CHECKPOINT) is Echo4oPipeline and original_class(tmp_path) is None


def test_load_pipeline_takes_the_options_of_from_pretrained(tmp_path):
    convert_to_diffusers(CHECKPOINT, tmp_path / "pipeline")
    pipe = echo4o.load_pipeline(tmp_path / "pipeline", dtype="bfloat16", max_references=2)
    assert type(pipe) is echo4o.Echo4oPipeline
    assert str(pipe.transformer.dtype) == "torch.bfloat16" and pipe.config.max_references == 2


def test_options_that_a_pipeline_lacks_are_refused_by_name():
    class TextToImage:
        def __call__(self, prompt, guidance_scale=None): ...

    require_supported(Echo4oPipeline, {"--think": "think", "--image-guidance": "image_guidance_scale"})
    require_supported(Echo4oPipeline, {"--think": "think"}, "chat")
    with pytest.raises(ValueError, match="^--think, --image-guidance: TextToImage does not take"):
        require_supported(TextToImage, {"--think": "think", "--image-guidance": "image_guidance_scale"})
    with pytest.raises(ValueError, match="TextToImage has no chat"):
        require_supported(TextToImage, {}, "chat")
