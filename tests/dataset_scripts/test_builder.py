"""``Echo4oImage`` on Shapes-4o: every configuration, Parquet, Arrow and streaming."""

import datasets
import pytest
from PIL import Image

from echo4o.dataset_scripts.builder import Echo4oImage
from echo4o.dataset_scripts.features import features
from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream, sample
from tests.dataset_scripts.layout import picture, write_rows, write_tar

ROWS = {"surreal_fantasy": 11, "multi_reference": 9, "instruction_following": 28}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    render_upstream(folder, ROWS, rows_per_archive=8)
    return folder


def builder(name, release, tmp_path):
    return Echo4oImage(config_name=name, data_dir=str(release), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", [*ROWS, "all"])
def test_round_trip_through_parquet(name, release, tmp_path):
    builder(name, release, tmp_path).download_and_prepare(str(tmp_path / "out"), file_format="parquet")
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path))
    assert loaded.features == features()
    parts = list(ROWS) if name == "all" else [name]
    expected = [sample(part, index) for part in parts for index in range(ROWS[part])]
    assert loaded["instruction"] == [row.prompt.text for row in expected]
    for row, of in list(zip(loaded, expected))[::5]:
        assert isinstance(row["image"], Image.Image) and check(of.prompt.groups, detect(row["image"]))[0]
        assert [len(detect(picture)) for picture in row["reference_images"]] == [1] * len(of.references)


def test_arrow_and_streaming_give_the_same_rows(release, tmp_path):
    of = builder("multi_reference", release, tmp_path)
    of.download_and_prepare()
    whole = of.as_dataset(split="train").cast_column("image", datasets.Image(decode=False))
    streamed = of.as_streaming_dataset(split="train")
    assert [row["id"] for row in streamed] == whole["id"] and len(set(whole["id"])) == ROWS["multi_reference"]
    assert whole[0]["image"]["bytes"].startswith(b"\x89PNG")


def test_processes_do_not_change_the_rows(release, tmp_path):
    for number in (1, 2):
        builder("all", release, tmp_path).download_and_prepare(
            str(tmp_path / str(number)), file_format="parquet", num_proc=number
        )
    one, two = (
        datasets.load_dataset("parquet", data_dir=str(tmp_path / name), split="train", cache_dir=str(tmp_path))
        for name in "12"
    )
    assert sorted(one["id"]) == sorted(two["id"]) and len(set(one["id"])) == sum(ROWS.values())


def test_a_changed_folder_is_not_read_from_the_cache(tmp_path):
    ids = []
    for seed in (0, 1):
        render_upstream(tmp_path / "release", {"surreal_fantasy": 3}, seed=seed)
        of = builder("surreal_fantasy", tmp_path / "release", tmp_path)
        of.download_and_prepare()
        ids.append(of.as_dataset(split="train")["id"])
    assert ids[0] != ids[1]


def test_rejected_rows_are_warned_about(tmp_path, caplog, monkeypatch):
    render_upstream(tmp_path / "release", {"surreal_fantasy": 3})
    with (tmp_path / "release" / "Surrel-Fantasy-Image" / "conflict.jsonl").open("a") as file:
        file.write('{"instruction": "lost", "output_image": "/x/99999.jpg"}\nnot json\n')
    monkeypatch.setattr(datasets.utils.logging.get_logger("datasets"), "propagate", True)
    of = builder("surreal_fantasy", tmp_path / "release", tmp_path)
    rows = list(of.as_streaming_dataset(split="train"))
    assert len(rows) == 3
    assert "5 rows given, 3 accepted, 2 rejected (1 missing image, 1 unreadable row)" in caplog.text


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="needs data_dir"):
        Echo4oImage(config_name="all", cache_dir=str(tmp_path)).download_and_prepare()
    with pytest.raises(ValueError, match="poems"):
        Echo4oImage(config_name="poems", data_dir=str(tmp_path), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="holds nothing for the configuration multi_reference"):
        builder("multi_reference", tmp_path, tmp_path).as_streaming_dataset(split="train")


def test_options_of_the_reader(tmp_path):
    source = tmp_path / "source"
    write_tar(source / "Multi-Reference" / "0.tar", [("a.png", picture(1)), ("c.png", picture(2)[:-30])], "w")
    rows = [{"prompt": "i", "inputs": ["a.png"], "result": name} for name in ("a.png", "c.png")]
    write_rows(source / "Multi-Reference" / "rows.jsonl", rows)
    pairs = ["image=result", "reference_images=inputs", "instruction=prompt"]
    options = {"data_dir": str(source), "cache_dir": str(tmp_path / "cache"), "map": pairs}
    read = list(Echo4oImage(config_name="multi_reference", **options).as_streaming_dataset(split="train"))
    assert [row["instruction"] for row in read] == ["i"]
    strict = Echo4oImage(config_name="multi_reference", max_rejected=0, **options)
    with pytest.raises(ValueError, match="more than max_rejected=0 rows are rejected; the last: truncated"):
        list(strict.as_streaming_dataset(split="train"))
    with pytest.raises(ValueError, match="which is not a known shape"):
        unmapped = Echo4oImage(config_name="all", data_dir=str(source), cache_dir=str(tmp_path / "cache"))
        list(unmapped.as_streaming_dataset(split="train"))
