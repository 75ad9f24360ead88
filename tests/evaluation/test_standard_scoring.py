"""Scoring of GenEval and DPG-Bench beyond the golden data: stored detections, sizes, and flawed question tables."""

import numpy as np
import pytest
from PIL import Image

from echo4o.evaluation.benchmarks.base import git_blob_id
from echo4o.evaluation.benchmarks.dpg.grid import cut_grid
from echo4o.evaluation.benchmarks.dpg.questions import COLUMNS, parse_question_table
from echo4o.evaluation.benchmarks.dpg.scoring import DPGQuestion, category_scores
from echo4o.evaluation.benchmarks.geneval import detector_output
from echo4o.evaluation.benchmarks.geneval.scoring import CLASSES, Detection, Thresholds, decide

HEADER = ",".join(COLUMNS)


def test_classes_are_the_benchmarks_own():
    assert len(CLASSES) == 80
    assert (CLASSES[64], CLASSES[65], CLASSES[66]) == ("computer mouse", "tv remote", "computer keyboard")


def test_other_thresholds_decide_otherwise_on_the_same_detections():
    clocks = [Detection("clock", (0, 0, 9, 9), 0.95), Detection("clock", (20, 0, 29, 9), 0.8)]
    metadata = {"tag": "counting", "include": [{"class": "clock", "count": 2}]}
    assert decide(metadata, clocks).reasons == ["expected clock>=2, found 1"]
    assert decide(metadata, clocks, Thresholds(counting_score=0.7)).correct


def test_a_colour_that_was_not_stored_is_an_error():
    metadata = {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}]}
    with pytest.raises(ValueError, match="the colour of a cow with score 0.500 is not stored"):
        decide(metadata, [Detection("cow", (0, 0, 9, 9), 0.5)])


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((768, 1024), (800, 1067), (800, 1088)),
        ((500, 2000), (333, 1333), (352, 1344)),
    ],
)
def test_sizes_of_the_detectors_input(size, resized, padded):
    assert detector_output.resized_size(*size) == resized
    assert detector_output.padded_size(*resized) == padded


def test_the_input_is_padded_with_grey_and_not_antialiased():
    stripes = np.zeros((500, 2000, 3), np.uint8)
    stripes[:, ::2] = 255
    tensor = detector_output.prepare_image(Image.fromarray(stripes))
    assert tensor.shape == (3, 352, 1344)
    std, mean = (np.array(v)[:, None, None] for v in (detector_output.STD, detector_output.MEAN))
    pixels = tensor.numpy() * std + mean
    assert np.allclose(pixels[:, 333:], 128, atol=1e-3) and np.allclose(pixels[:, :, 1333:], 128, atol=1e-3)
    # An antialiased resize of these stripes is grey all over.
    assert pixels[:, :333, :1333].min() < 10 and pixels[:, :333, :1333].max() > 245


def test_the_four_images_of_a_grid():
    grid = Image.new("RGB", (4, 4))
    colors = [(9, 0, 0), (0, 9, 0), (0, 0, 9), (9, 9, 9)]
    for color, place in zip(colors, [(0, 0), (2, 0), (0, 2), (2, 2)]):
        grid.paste(color, (*place, place[0] + 2, place[1] + 2))
    assert [image.getpixel((1, 1)) for image in cut_grid(grid, 2)] == colors
    with pytest.raises(ValueError, match="the grid has 4 x 4 pixels; 2 x 2 images with --grid 3 have 6 x 6"):
        cut_grid(grid, 3)


def test_categories_pool_all_images_with_and_without_the_rule():
    questions = [DPGQuestion(1, "entity - whole", "a?", (0,)), DPGQuestion(2, "entity - part", "b?", (1,))]
    broad, detailed = category_scores([(questions, {1: True, 2: True}), (questions, {1: False, 2: True})])
    assert (broad["entity"].score, broad["entity"].raw, broad["entity"].questions) == (0.5, 0.75, 4)
    assert (detailed["entity - part"].score, detailed["entity - part"].raw) == (0.5, 1.0)


def table(*rows: str) -> str:
    return "\n".join([HEADER, *rows])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,tuple\np,x", "the column 'proposition_id' is missing"),
        (table("p,1,0,entity - whole (a),?", "p,2,7,entity - part (b),?"), "question 2 of p depends on question 7"),
        (table("p,1,0,entity - whole (a),?", "p,1,0,entity - part (b),?"), "row 2: question 1 of p appears twice"),
        (table("p,1,,entity - whole (a),?"), "row 1: the column 'dependency' is empty"),
        (table("p,one,0,entity - whole (a),?"), "row 1: proposition_id is 'one'"),
        (table("p,1,0.5,entity - whole (a),?"), "row 1: dependency is '0.5'"),
        (table("p,1,0"), "row 1: the column 'tuple' is empty"),
        (HEADER, "does not contain a question"),
    ],
)
def test_flawed_question_tables_name_the_row(text, message):
    with pytest.raises(ValueError, match=message):
        parse_question_table(text)


def test_the_first_row_counts_and_ids_that_look_like_numbers_stay_text():
    questions = parse_question_table(table("007,1,0,entity - whole (a),?", "007,2,1,global - (x),?"))
    assert [question.id for question in questions["007"]] == [1, 2]
    assert questions["007"][1].broad_category == "global"


def test_git_blob_id():
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object`
