"""Every pipeline class behind the same engine: its own options, its own controls, batches equal to single images."""

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")

from PIL import Image

from echo4o.modeling.pipelines import PIPELINES, class_named
from echo4o.serving.served_model import ServedModel
from tests.modeling.blip3o.conftest import CHECKPOINT as BLIP3O
from tests.modeling.conftest import GOLDEN
from tests.modeling.omnigen2_models import CHECKPOINT as OMNIGEN2

CHECKPOINTS = {"Echo4oPipeline": GOLDEN / "checkpoint", "OmniGen2Pipeline": OMNIGEN2, "Blip3oPipeline": BLIP3O}


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def model(request):
    cls = class_named(request.param)
    return ServedModel(cls.from_original(CHECKPOINTS[request.param]))


def test_options_are_those_of_the_pipeline(model):
    name = type(model.pipe).__name__
    assert "num_inference_steps" in model.image_options and "latents" not in model.image_options
    assert ("think" in model.image_options) == (name == "Echo4oPipeline")
    assert model.can_chat and model.takes_references == (name != "Blip3oPipeline")
    with pytest.raises(ValueError, match="colour: this model does not take this field; it takes "):
        model.read_options({"colour": 1})
    if not model.takes_references:
        with pytest.raises(ValueError, match="no reference images"):
            model.image_tasks([Image.new("RGB", (64, 64)), "a dot"])


@pytest.mark.long
def test_a_batch_equals_its_images_alone(model):
    options = model.read_options({"steps": 2})
    prompts = [["a red dot"], ["two blue dots"]]
    if model.takes_references:
        prompts.append([Image.new("RGB", (64, 64), "orange"), "like this"])
    size = {} if type(model.pipe).__name__ == "Echo4oPipeline" else {"height": 64, "width": 64}
    tasks = [model.image_tasks(items, seed=seed, options=options, **size)[0] for seed, items in enumerate(prompts)]
    events = []
    tasks[0].previews, tasks[0].on_event = 8, events.append
    together = model.generate(tasks)
    assert [each.step for each in events] and events[-1].total >= 2
    for task, generated in zip(tasks, together, strict=True):
        (alone,) = model.generate([task])
        assert alone.settings == generated.settings and alone.settings["num_inference_steps"] == 2
        difference = np.abs(np.asarray(alone.image, dtype=int) - np.asarray(generated.image, dtype=int))
        assert difference.max() <= 2


def test_questions_of_a_batch_are_answered_as_alone(model):
    options = model.read_options({"max_new_tokens": 3}, chat=True)
    image = Image.new("RGB", (64, 64), "orange")
    tasks = [model.chat_task(text, images, options=options) for text, images in (("hi", []), ("what?", [image]))]
    assert model.chat(tasks) == [model.chat([task])[0] for task in tasks]


def test_the_app_has_the_controls_of_the_model(model):
    gradio = pytest.importorskip("gradio", reason="pip install 'echo4o[app]'")
    from echo4o.serving.app.controls import build_controls

    with gradio.Blocks():
        controls = build_controls(model, "generate")
    values = {component: component.value for component in controls.components.values()}
    arguments = controls.read(values)
    assert arguments["count"] == 1 and arguments["seed"] is None
    known = {"guidance_scale", "image_guidance_scale", "negative_prompt", "think"}
    assert known & set(controls.components) == known & set(model.image_options)
