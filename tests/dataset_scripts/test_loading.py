"""Rows for training: every row once, whatever the number of processes, and resuming loses and repeats none."""

import datasets
import pytest
from PIL import Image

from echo4o.dataset_scripts.build import BuildOptions, build
from echo4o.dataset_scripts.loading import training_rows
from tests.dataset_scripts.layout import small_release

ROWS = 30


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    small_release(root / "Echo-4o-Image", rows=ROWS)
    build(root / "Echo-4o-Image", root / "echo-4o-image", BuildOptions(shard_bytes=12_000, row_group_bytes=4000))
    return root / "echo-4o-image"


@pytest.fixture(scope="module")
def every_id(built):
    return sorted(datasets.load_dataset(str(built), split="train")["id"])


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_all_rows_without_overlap(built, every_id, streaming, processes):
    shares = [
        training_rows(built, streaming=streaming, process_index=i, num_processes=processes, decode=False, seed=3)
        for i in range(processes)
    ]
    seen = [ids(share) for share in shares]
    assert sorted(x for share in seen for x in share) == every_id
    assert [len(share) for share in shares] == [len(x) for x in seen]
    # The next epoch has the same rows of all processes together, in another order.
    again = [ids(share) for share in shares]
    assert sorted(x for share in again for x in share) == every_id and again != seen


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("position", [0, 1, 13, 44, 45])
def test_resuming_in_an_epoch_is_exact(built, streaming, position):
    options = {"streaming": streaming, "process_index": 1, "num_processes": 2, "seed": 5, "window": 3}
    whole = training_rows(built, **options, decode=False)
    expected = ids(whole) + ids(whole)
    first = training_rows(built, **options, workers=3)
    iterator = iter(first)
    taken = [next(iterator)["id"] for _ in range(position)]
    state = first.state_dict()
    iterator.close()
    second = training_rows(built, **options, workers=1)
    second.load_state_dict(state)
    assert taken + ids(second) + ids(second) == expected
    assert second.state_dict()["epoch"] == 2 and second.state_dict()["position"] == 0


def test_an_interrupted_run_continues_in_one_process(built, every_id):
    rows = training_rows(built, streaming=True)
    seen = []
    for row in rows:
        seen.append(row["id"])
        if len(seen) == 20:
            break
    assert sorted(seen + ids(rows)) == every_id


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_decoded_in_workers(built, streaming):
    rows = training_rows(
        built, "multi_reference", streaming=streaming, workers=2, columns=["image", "reference_images"]
    )
    for row in rows:
        assert list(row) == ["image", "reference_images"] and len(row["reference_images"]) == 2
        assert all(isinstance(p, Image.Image) and p.im is not None for p in (row["image"], *row["reference_images"]))


def test_streaming_without_shuffling_keeps_the_order(built):
    expected = datasets.load_dataset(str(built), split="train")["id"]
    assert ids(training_rows(built, streaming=True, shuffle=False, decode=False)) == list(expected)
    assert ids(training_rows(built, shuffle=False, decode=False)) == list(expected)


def test_the_shuffle_mixes_shards(built):
    parts = [row["source"] for row in training_rows(built, streaming=True, decode=False, seed=1)]
    assert max(len(run) for run in "".join(p[0] for p in parts).replace("SM", "S M").split()) < 60
    assert len(set(parts[: ROWS // 2])) > 1


def test_a_state_of_other_rows_is_refused(built):
    state = training_rows(built, seed=1).state_dict()
    for other in ({"seed": 2}, {"num_processes": 2}, {"configuration": "multi_reference"}, {"streaming": True}):
        with pytest.raises(ValueError, match="the state belongs to other rows"):
            training_rows(built, **{"seed": 1} | other).load_state_dict(state)
    with pytest.raises(ValueError, match="process_index is 2"):
        training_rows(built, process_index=2, num_processes=2)
    with pytest.raises(ValueError, match="has no configuration 'poems'; it has"):
        training_rows(built, "poems")


def test_a_broken_image_is_an_error_not_a_hole(built, monkeypatch):
    rows = training_rows(built, streaming=True)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OSError, match="broken"):
        next(iter(rows))


def test_a_moment_without_network_is_waited_out(built, every_id, monkeypatch):
    from echo4o.dataset_scripts import row_groups

    failures = iter([ConnectionError("reset"), TimeoutError("late")])
    original = row_groups.open_file

    def open_file(file):
        if error := next(failures, None):
            raise error
        return original(file)

    monkeypatch.setattr(row_groups, "open_file", open_file)
    monkeypatch.setattr(row_groups.time, "sleep", lambda seconds: None)
    assert sorted(ids(training_rows(built, streaming=True, decode=False))) == every_id
