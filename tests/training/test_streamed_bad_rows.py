"""Rows of a stream are checked when they are read: the error names the row, and what was trained is saved."""

import json

import pytest
from datasets import Dataset, Features, Image, List, Value

from echo4o.training.train import main

from .conftest import picture, row

BAD = {
    "instruction": ({"instruction": " \n"}, "Row row-6: its instruction is empty"),
    "references": ({"reference_images": [picture("red")] * 5}, "Row row-6: it has 5 references; the model takes 4"),
    "image": ({"image": {"bytes": b"GIF89a", "path": None}}, "Row row-6: an image of row-6 is refused"),
}


def stream(folder, change: dict, kind: str):
    """Eight rows of which the seventh cannot train, as the `data` of a recipe that streams them in their order."""
    names = ("id", "instruction", "task", "category", "source", "metadata")
    features = Features({n: Value("string") for n in names} | {"reference_images": List(Image()), "image": Image()})
    rows = Dataset.from_list([row(i) | (change if i == 6 else {}) for i in range(8)], features=features)
    folder.mkdir()
    if kind == "row groups":
        rows.to_parquet(folder / "train.parquet", batch_size=2)
        return {"path": str(folder), "streaming": True, "shuffle_buffer": 0}
    rows.save_to_disk(folder / "saved")
    return {"path": str(folder / "saved"), "streaming": True, "shuffle_buffer": 0}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["row groups", "saved"])
@pytest.mark.parametrize("bad", BAD)
def test_the_error_names_the_row_and_a_checkpoint_is_saved(recipe_file, tmp_path, capsys, bad, kind):
    change, words = BAD[bad]
    data = stream(tmp_path / "data", change, kind)
    file = recipe_file(data=data, steps=8, batch_size=1, checkpoints={"every": 100})
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "train_log.jsonl").read_text().split("\n") if line
    ]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert steps and saved.name == f"step-{steps[-1] + 1:08d}"
    assert main([str(file), "--resume", "--set", "on_bad_row=skip"]) == 0
    assert "row-6" in (tmp_path / "run" / "bad_rows_0.jsonl").read_text()
