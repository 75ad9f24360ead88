"""Rows that cannot train are named before the first step, and before gigabytes are loaded where that is possible."""

import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from echo4o.training import train
from echo4o.training.backbones.bagel import BagelRecipe
from echo4o.training.columns import MappedRows, RowMapping, image_counts
from echo4o.training.precompute import precompute
from echo4o.training.recipe import ColumnNames, DataSource, RecipeError
from echo4o.training.row_checks import check_features, check_rows, check_stored
from echo4o.training.train import Trainer

from .conftest import make_backbone


def recipe(tmp_path) -> BagelRecipe:
    values = {"model": "unused", "output_dir": str(tmp_path / "run"), "data": {"path": "unused"}}
    return BagelRecipe.model_validate(values | {"steps": 1, "batch_size": 1, "device": "cpu"})


def changed(rows, **values):
    """The rows, with other values in the row number 5."""
    return rows.map(
        lambda row, number: row | values if number == 5 else row, with_indices=True, features=rows.features
    )


@pytest.mark.parametrize("text", ["", " \n", None])
def test_empty_instructions(rows, tiny_pipeline, text):
    with pytest.raises(RecipeError, match=f"^Row {rows[5]['id']} has no instruction"):
        check_rows([rows, changed(rows, instruction=text)], 4)
    if text is not None:
        with pytest.raises(ValueError, match="its instruction is empty"):
            make_backbone(tiny_pipeline).prepare([rows[0] | {"instruction": text}])


def test_many_empty_instructions_are_counted(rows):
    empty = rows.map(lambda row: row | {"instruction": ""}, features=rows.features)
    with pytest.raises(RecipeError, match="and 5 more have no instruction"):
        check_rows([empty], 4)


def test_more_references_than_the_model_takes(rows, tiny_pipeline):
    image = rows[0]["image"]
    many = changed(rows, reference_images=[image] * 5)
    with pytest.raises(RecipeError, match=f"^Row {rows[5]['id']} has more references than the model takes: 4"):
        check_rows([many], 4)
    check_rows([many], 5)
    check_rows([many], None)
    with pytest.raises(ValueError, match="it has 5 references; the model takes 4"):
        make_backbone(tiny_pipeline).prepare([many[5]])


def test_mapped_columns_are_checked_without_reading_images(rows):
    """By a column of ids, or by number; references in two columns count together."""
    image, nothing = rows[0]["image"], [None] * 3
    values = {"caption": ["a", " ", "c"], "source": [image, None, image], "more": [[image] * 2, [image], []]}
    other = Dataset.from_dict(values | {"photo": nothing, "key": ["x", "y", "z"]}, other_features())
    columns = {"instruction": "caption", "image": "photo", "reference_images": ["source", "more"]}
    for id, named in (({"id": "key"}, ("y", "x")), ({}, ("number 1", "number 0"))):
        data = DataSource(path="owner/name", columns=ColumnNames(**columns, **id))
        mapped = MappedRows(other, RowMapping(data, other.column_names))
        with pytest.raises(RecipeError, match=f"^Row {named[0]} has no instruction"):
            check_rows([mapped], 4)
        with pytest.raises(RecipeError, match=f"^Row {named[0]} has no instruction"):
            check_rows([mapped.select([2, 0]).select([0]), mapped.select([2, 1]).select([1])], 4)
        with pytest.raises(RecipeError, match=f"^Row {named[1]} has more references than the model takes: 2"):
            check_rows([mapped.select([0, 2])], 2)
        check_rows([mapped.select([0, 2])], 3)
        check_rows([mapped.select([2])], 1)
        numbered = other.remove_columns("caption").add_column("caption", [1, 2, 3])
        check_rows([MappedRows(numbered, RowMapping(data, numbered.column_names))], 3)


def test_references_in_fields_and_in_one_column_twice_are_counted():
    image = {"bytes": b"x", "path": None}
    kind = Features({"image": Image(decode=False)})
    other = Dataset.from_dict(
        {"caption": ["a"], "photo": [None], "more": [{"image": image}], "source": [image]},
        Features({"caption": Value("string"), "photo": Image(), "more": kind, "source": Image(decode=False)}),
    )
    for names, count in ((["more.image", "source"], 2), (["source", "source"], 2), (["more.none"], 0)):
        columns = ColumnNames(instruction="caption", image="photo", reference_images=names)
        mapped = MappedRows(other, RowMapping(DataSource(path="owner/name", columns=columns), other.column_names))
        check_rows([mapped], count)
        if count:
            with pytest.raises(RecipeError, match=f"more references than the model takes: {count - 1}"):
                check_rows([mapped], count - 1)


def other_features() -> Features:
    return Features(
        {
            "caption": Value("string"),
            "source": Image(),
            "more": List(Image()),
            "photo": Image(),
            "key": Value("string"),
        }
    )


def test_rows_that_cannot_train_are_skipped_if_the_recipe_says_so(rows, tiny_pipeline, tmp_path):
    skipping = recipe(tmp_path).model_copy(update={"on_bad_row": "skip", "steps": len(rows) - 1})
    log = Trainer(skipping, tiny_pipeline, changed(rows, instruction="")).run().log
    assert len(log) == len(rows) - 1
    bad = (tmp_path / "run" / "bad_rows_0.jsonl").read_text("utf-8")
    assert rows[5]["id"] in bad and "its instruction is empty" in bad


def test_columns_of_other_types(rows):
    single = rows.remove_columns("reference_images").add_column("reference_images", [None] * len(rows))
    lists = rows.remove_columns("image").add_column("image", [[]] * len(rows))
    cases = (
        (single.cast_column("reference_images", Image()), "reference_images holds single images"),
        (lists.cast(Features(lists.features | {"image": List(Image())})), "image holds lists"),
        (rows.remove_columns("instruction").add_column("instruction", [1] * len(rows)), "instruction holds"),
    )
    for dataset, words in cases:
        with pytest.raises(RecipeError, match=words):
            check_features([rows, dataset])
    check_features([rows, rows.to_iterable_dataset()])


def test_a_run_says_so_before_its_first_step(tmp_path, rows, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(train, "Prefetch", lambda batches: pytest.fail("a row was read"))
    for dataset, words in (
        (changed(rows, instruction=""), "has no instruction"),
        (changed(rows, reference_images=[rows[0]["image"]] * 5), "more references than the model takes"),
        (rows.remove_columns("reference_images").add_column("reference_images", [None] * 8), "single images"),
    ):
        if words == "single images":
            dataset = dataset.cast_column("reference_images", Image())
        with pytest.raises(RecipeError, match=words):
            Trainer(recipe(tmp_path), pipeline=tiny_pipeline, dataset=dataset)
    assert rows.features["instruction"] == Value("string")


def test_ids_that_a_cache_cannot_tell_apart(rows, tiny_pipeline, tmp_path):
    """Of one dataset or of two. Equal rows may share an id, and rows that are not in the cache, which are encoded."""
    precompute(rows.select(range(4)), make_backbone(tiny_pipeline), tmp_path / "cache")
    cached = recipe(tmp_path).model_copy(update={"latents": tmp_path / "cache"})
    with pytest.raises(RecipeError, match=f"^The id '{rows[0]['id']}' stands in more than one row, and .*cache finds"):
        Trainer(cached, tiny_pipeline, changed(rows, id=rows[0]["id"]))
    Trainer(cached, tiny_pipeline, concatenate_datasets([rows, rows.select([2, 6])]))

    def differs(asked):
        raise ValueError("it has another image")

    ids = [row["id"] for row in rows.select(range(4))]
    with pytest.raises(RecipeError, match="stands in more than one row, .* \\(it has another image\\)"):
        check_stored([rows, rows.select([2])], ids, differs, tmp_path, whole=False)
    check_stored([rows, rows.select([6])], ids, differs, tmp_path, whole=False)
    with pytest.raises(RecipeError, match=f"has nothing for 4 of 8 ids, for example '{rows[4]['id']}'"):
        check_stored([rows], ids, differs, tmp_path, whole=True)


def test_mapped_rows_without_an_id_are_not_compared(tmp_path):
    """A null in the id column, or no such column: the id is computed from all columns, wherever it is read."""
    other = Dataset.from_dict({"caption": ["a", "b"], "photo": [None] * 2, "key": ["x", None]})
    other = other.cast(Features({"caption": Value("string"), "photo": Image(), "key": Value("string")}))
    for id in ({"id": "key"}, {}):
        data = DataSource(path="owner/name", columns=ColumnNames(instruction="caption", image="photo", **id))
        mapped = MappedRows(other, RowMapping(data, other.column_names))
        assert mapped["id"] == [row["id"] for row in mapped] == mapped.select_columns(["id"])["id"]
        assert mapped.stored_ids() == (["x", None] if id else [None, None])
        check_stored([mapped], ["x"], lambda rows: rows, tmp_path, whole=True)


def test_images_are_counted_in_lists_of_every_kind():
    import pyarrow as pa

    image = {"bytes": b"x", "path": None}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cases = (
        (kind, [image, None], [1, 0]),
        (pa.list_(kind), [[image, None, None], [], None, [image] * 2], [1, 0, 0, 2]),
        (pa.large_list(kind), [[image], None], [1, 0]),
        (pa.list_(kind, 3), [[image] * 3, [image, None, None], None], [3, 1, 0]),
        (pa.list_(pa.list_(kind)), [[[image], [image] * 2], [], [[]]], [3, 0, 0]),
        (pa.null(), [None, None], [0, 0]),
    )
    for type, values, counts in cases:
        array = pa.array(values, type)
        assert image_counts(array).tolist() == counts, type
        assert image_counts(pa.chunked_array([array, array])).tolist() == counts * 2
        assert image_counts(array.slice(1)).tolist() == counts[1:]
    assert image_counts(pa.chunked_array([], kind)).tolist() == []
