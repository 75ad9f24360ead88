"""Datasets with other columns, filters, unreadable rows, mixes and sizes, by the real command line."""

import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pytest
from datasets import Dataset, Image, load_from_disk
from PIL import Image as PILImage

from echo4o.testing.hub import LoopbackHub
from echo4o.training.column_proposal import propose
from echo4o.training.columns import RowMapping, row_id
from echo4o.training.data import open_sources
from echo4o.training.held_out import held_out_rows
from echo4o.training.recipe import DataSource, RecipeError, ResolutionSettings
from echo4o.training.resolution import resize, target_size

from .conftest import make_rows, picture
from .running import assert_same, log_of, losses_of, run, train_here, weights_of

COLUMNS = {"instruction": "caption", "image": "photo", "reference_images": ["source", "more"], "id": "key"}


def png(image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def foreign(folder, rows=None):
    """The rows of the tests with other columns: bytes, structs and lists of paths; written as Parquet."""
    (folder / "files").mkdir(parents=True)
    made = []
    for row in rows or make_rows():
        first, *rest = row["reference_images"] or [None]
        for number, image in enumerate(rest):
            image.save(folder / "files" / f"{row['id']}-{number}.png")
        made.append(
            {
                "key": row["id"],
                "caption": row["instruction"],
                "photo": png(row["image"]),
                "source": first and {"bytes": png(first), "path": None},
                "more": [f"files/{row['id']}-{number}.png" for number in range(len(rest))],
                "kind": "edit" if first else "plain",
            }
        )
    Dataset.from_list(made).to_parquet(str(folder / "train-00000.parquet"))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_other_columns_trains_like_one_with_ours(recipe_file, tmp_path, streaming):
    make_rows().save_to_disk(tmp_path / "ours")
    source = foreign(tmp_path / "theirs") if not streaming else None
    if streaming:  # row groups of one dataset: as it was saved
        Dataset.from_parquet(str(foreign(tmp_path / "files") / "train-00000.parquet")).save_to_disk(
            tmp_path / "theirs"
        )
        for file in (tmp_path / "files" / "files").iterdir():
            (tmp_path / "theirs" / "files").mkdir(exist_ok=True)
            file.rename(tmp_path / "theirs" / "files" / file.name)
        source = tmp_path / "theirs"
    ours = {"path": str(tmp_path / "ours"), "streaming": streaming}
    assert train_here(recipe_file("ours", data=ours)) == 0
    theirs = {"path": str(source), "streaming": streaming, "columns": COLUMNS}
    assert train_here(recipe_file("theirs", data=theirs)) == 0
    assert losses_of(tmp_path / "ours") == losses_of(tmp_path / "theirs")
    assert_same(weights_of(tmp_path / "ours" / "pipeline"), weights_of(tmp_path / "theirs" / "pipeline"))


@pytest.mark.long
def test_a_dataset_on_the_hub_is_inspected_and_trained_on(recipe_file, tmp_path):
    rows = make_rows().select([0, 2, 4, 6]).rename_columns({"instruction": "caption", "image": "photo"})
    folder = tmp_path / "hub"
    folder.mkdir()
    rows.remove_columns(["id", "reference_images", "task", "category", "source", "metadata"]).to_parquet(
        str(folder / "train-00000.parquet")
    )
    with LoopbackHub() as hub:
        hub.add_folder("ns/photos", folder, kind="datasets")
        environment = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        told = run("dataset", "inspect", "ns/photos", **environment)
        assert "columns:" in told and "instruction: caption" in told and "image: photo" in told, told
        data = {"path": "ns/photos", "columns": {"instruction": "caption", "image": "photo"}}
        run("train", recipe_file(data=data, batch_size=1), **environment)
    assert len(losses_of(tmp_path / "run")) == 4


@pytest.mark.long
def test_a_web_dataset_trains(recipe_file, tmp_path):
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "train-0000.tar", "w") as archive:
        for index in range(4):
            for name, data in (("txt", f"a number {index}".encode()), ("png", png(picture("red")))):
                info = tarfile.TarInfo(f"{index:04d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = {"path": str(tmp_path / "web"), "columns": {"instruction": "txt", "image": "png", "id": "__key__"}}
    (source,) = open_sources([DataSource(**data)])
    assert source["id"] == [f"{index:04d}" for index in range(4)] and source[1]["instruction"] == "a number 1"
    assert train_here(recipe_file(data=data, steps=2)) == 0


class _Images(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = png(picture("red"))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_addresses_are_downloaded_only_when_allowed(recipe_file, tmp_path, capsys, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/red.png"
    Dataset.from_list([{"text": f"number {i}", "url": url} for i in range(3)]).save_to_disk(tmp_path / "urls")
    data = {"path": str(tmp_path / "urls"), "columns": {"instruction": "text", "image": "url"}}
    assert train_here(recipe_file("refused", data=data, batch_size=1, steps=2)) == 2
    assert "set data.allow_urls: true" in capsys.readouterr().err
    assert train_here(recipe_file("allowed", data=data | {"allow_urls": True}, batch_size=1, steps=2)) == 0
    server.shutdown()


@pytest.mark.long
def test_columns_are_proposed_from_names_and_rows(tmp_path):
    told = run("dataset", "inspect", foreign(tmp_path / "theirs"))
    assert "photo" in told and "instruction: caption" in told and "image: photo" in told and "id: key" in told, told
    edits = {"key": "number", "edit_prompt": "text", "source_image": "image", "mask": "image", "edited_image": "image"}
    assert propose(edits, []) == {
        "id": "key",
        "instruction": "edit_prompt",
        "reference_images": ["source_image", "mask"],
        "image": "edited_image",
    }
    web = [{"json": {"caption": "a", "width": 3}}]
    assert propose({"json": "struct", "jpg": "image", "__key__": "text"}, web)["instruction"] == "json.caption"
    assert propose({"what": "text", "seen": "image"}, []) == {"instruction": "what", "image": "seen"}


def mapping(columns=("caption", "photo"), path="owner/name", **changes):
    return RowMapping(DataSource(path=path, columns={"instruction": "caption", "image": "photo"} | changes), columns)


def test_forms_of_images_and_what_is_refused(tmp_path):
    picture("red").save(tmp_path / "red.png")
    here = mapping(path=str(tmp_path))
    for value in (png(picture("red")), {"bytes": b"x", "path": None}, "red.png", ["red.png"], picture("red")):
        row = here({"caption": "a", "photo": value})
        assert row["image"]["bytes"] is not None or row["image"]["path"] == str(tmp_path / "red.png")
    for value, told in (
        (3, "holds int, which is not an image"),
        (["red.png", "red.png"], "has 2 images; give one target image"),
        ("https://host/red.png", "set data.allow_urls: true"),
    ):
        with pytest.raises(ValueError, match=told):
            here({"caption": "a", "photo": value})
    with pytest.raises(ValueError, match="only a dataset on this machine"):
        mapping()({"caption": "a", "photo": "/etc/passwd"})


def test_ids_are_hashes_of_the_rows_where_there_is_no_column():
    rows = [mapping()({"caption": text, "photo": b"x"}) for text in ("a", "b", "a")]
    assert rows[0]["id"] == rows[2]["id"] != rows[1]["id"] and rows[0]["id"] == row_id(rows[0])


@pytest.mark.parametrize(
    "columns, told",
    [
        ({"instruction": "text", "image": "photo"}, "has no column text (data.columns); there are: key, caption"),
        ({"instruction": "caption"}, "has no column image: name one in data.columns"),
        ({"caption": "caption"}, "data.0.columns.caption"),
    ],
)
def test_mappings_that_do_not_fit(recipe_file, tmp_path, capsys, columns, told):
    data = {"path": str(foreign(tmp_path / "theirs")), "columns": columns}
    assert train_here(recipe_file(data=data)) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error, error


def test_filters_by_value_side_and_aspect(tmp_path):
    rows = make_rows()  # sizes alternate between 64 x 64 and 64 x 32
    rows.save_to_disk(tmp_path / "rows")
    theirs = {"path": str(foreign(tmp_path / "theirs")), "columns": COLUMNS}

    def ids(**changes):
        (source,) = open_sources([DataSource(**({"path": str(tmp_path / "rows")} | changes))])
        return source["id"]

    references = ["row-1", "row-3", "row-5", "row-7"]
    assert ids(where={"task": "multi_reference"}) == references == ids(where={"task": ["multi_reference", "none"]})
    assert ids(min_side=40) == ids(max_aspect=1.5) == ["row-0", "row-2", "row-4", "row-6"]
    assert ids(**theirs, where={"kind": ["edit"]}) == references and ids(**theirs, min_side=40) == ids(min_side=40)
    with pytest.raises(RecipeError, match="leave none of the 8 rows"):
        ids(where={"task": "x"})
    with pytest.raises(RecipeError, match="data.where: .* has no column kind"):
        ids(where={"kind": "x"})


# --- unreadable rows -------------------------------------------------------------------------------------------------


def spoiled(folder, numbers):
    from echo4o.training.row_images import undecoded

    rows = make_rows()
    raw = [dict(row) for row in undecoded(rows)]
    for number in numbers:
        raw[number]["image"] = {"bytes": raw[number]["image"]["bytes"][:60], "path": None}
    Dataset.from_list(raw, features=undecoded(rows).features).cast(rows.features).save_to_disk(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_rows_are_skipped_named_and_counted(recipe_file, tmp_path, capsys, streaming):
    data = {"path": spoiled(tmp_path / "bad", [2, 5]), "streaming": streaming}
    changes = {"data": data, "on_bad_row": "skip", "steps": 8, "checkpoints": {"every": 4}}
    changes["optimizer"] = {"lr": 1e-3, "schedule": "constant"}
    assert train_here(recipe_file("whole", **changes)) == 0
    problems = [
        json.loads(line)["problem"]
        for line in (tmp_path / "whole" / "bad_rows_0.jsonl").read_text().split("\n")
        if line
    ]
    assert len(problems) == 2 and "row-2" in "".join(problems) and "row-5" in "".join(problems)
    file = recipe_file("half", **changes)
    assert train_here(file, "--set", "steps=4") == 0 and train_here(file, "--resume") == 0
    assert_same(weights_of(tmp_path / "whole" / "pipeline"), weights_of(tmp_path / "half" / "pipeline"))
    assert train_here(recipe_file("few", **changes, max_bad=1)) == 2
    assert "2 rows cannot be read (max_bad: 1)" in capsys.readouterr().err


def test_a_dataset_without_a_readable_row_ends(recipe_file, tmp_path, capsys):
    data = {"path": spoiled(tmp_path / "bad", range(8))}
    assert train_here(recipe_file(data=data, on_bad_row="skip")) == 2
    assert "None of the 8 rows can be read" in capsys.readouterr().err


# --- mixes and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_mixed_sources_resume(recipe_file, tmp_path, rows_folder):
    """A streamed dataset with our columns and one in memory with others."""
    theirs = {"path": str(foreign(tmp_path / "theirs")), "columns": COLUMNS, "weight": 0.5, "where": {"kind": "plain"}}
    changes = {"data": [{"path": str(rows_folder), "streaming": True}, theirs], "mixing": "epochs", "steps": 6}
    changes |= {"checkpoints": {"every": 3}, "batch_size": 4, "optimizer": {"lr": 1e-3, "schedule": "constant"}}
    assert train_here(recipe_file("whole", **changes)) == 0
    file = recipe_file("half", **changes)
    assert train_here(file, "--set", "steps=3") == 0 and train_here(file, "--resume") == 0
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "half")
    assert log_of(tmp_path / "whole")[-1]["samples"] == 24


def test_sizes():
    def size(given, **settings):
        return target_size(given, ResolutionSettings(**settings))

    assert size((100, 50), max_side=50) == (50, 25) and size((100, 50), min_side=100) == (200, 100)
    assert size((100, 10), min_side=100, max_side=500) == (500, 50) and size((70, 50), multiple_of=16) == (64, 48)
    image = PILImage.fromarray(np.zeros((60, 100, 3), np.uint8))
    image.paste((255, 0, 0), (0, 0, 20, 60))  # the left part is cropped away
    cropped = resize(image, ResolutionSettings(bucket=[(30, 30), (10, 40)]))
    assert cropped.size == (30, 30) and np.asarray(cropped)[..., 0].mean() < 10
    assert resize(image, ResolutionSettings(max_side=200)) is image


@pytest.mark.long
def test_a_resolution_changes_what_trains(recipe_file, tmp_path, capsys):
    assert train_here(recipe_file("plain", steps=2)) == 0
    assert train_here(recipe_file("small", steps=2, resolution={"max_side": 32})) == 0
    assert train_here(recipe_file("same", steps=2, resolution={"max_side": 640})) == 0
    tokens = [log_of(tmp_path / name)[0]["tokens"] for name in ("plain", "small", "same")]
    assert tokens[1] < tokens[0] == tokens[2]
    assert train_here(recipe_file("both", resolution={"max_side": 32, "bucket": [[8, 8]]})) == 2
    assert "`bucket` names complete sizes" in capsys.readouterr().err


def test_a_share_of_mapped_rows_is_held_out(tmp_path):
    """The same rows as of ours; and by hashes where there is no column of ids."""
    make_rows().save_to_disk(tmp_path / "ours")
    theirs = {"path": str(foreign(tmp_path / "theirs")), "columns": COLUMNS}
    without = theirs | {"columns": {k: v for k, v in COLUMNS.items() if k != "id"}}
    ours, mapped, hashed = open_sources(
        [DataSource(path=str(tmp_path / "ours")), DataSource(**theirs), DataSource(**without)]
    )
    assert held_out_rows([ours], 0.65) == held_out_rows([mapped], 0.65) == [[0, 4]]
    plain = DataSource(path=theirs["path"], columns={"id": "key", "instruction": "caption", "image": "photo"})
    (without_references,) = open_sources([plain])
    assert len(without_references.select_columns(["reference_images"])) == 8
    assert without_references.select_columns(["reference_images"])[7] == {"reference_images": []}
    assert hashed["id"][0] == hashed["id"][4] != hashed["id"][1], "by content"


def test_our_own_rows_are_opened_as_before(rows_folder):
    (source,) = open_sources([DataSource(path=str(rows_folder))])
    assert isinstance(source, Dataset) and source.features["image"] == Image()
    assert source._fingerprint == load_from_disk(str(rows_folder))._fingerprint
