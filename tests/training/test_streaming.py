"""Streamed runs: several weighted sources, shuffled, resumed where they stopped, on any number of processes."""

import json
import shutil
from collections import Counter

import pytest

from echo4o.dataset_scripts.row_groups import RowGroups
from echo4o.training.data import PreparedRows, StoredOrder, StreamedOrder, open_sources
from echo4o.training.packing import FixedBatches, PackedBatches
from echo4o.training.recipe import RecipeError
from echo4o.training.recipe_files import load_recipe

from .conftest import make_backbone, make_rows
from .running import assert_same, losses_of, run, start, train_here, weights_of
from .test_checkpoints import wait_for

PACKS = {"batch_size": None, "packing": {"tokens": 100, "packs_per_step": 2, "buffer": 4}}


@pytest.fixture
def two_sources(tmp_path):
    """The rows in two folders of Parquet files with several row groups each; ids tell the sources apart."""
    sources = []
    for name, files, rows_per_group in (("a", 3, 2), ("b", 2, 1)):
        folder = tmp_path / name
        folder.mkdir()
        rows = make_rows().map(lambda row, name=name: {"id": f"{name}-{row['id']}"})
        for number in range(files):
            rows.shard(files, number).to_parquet(folder / f"train-{number}.parquet", batch_size=rows_per_group)
        sources.append({"path": str(folder), "streaming": True, "shuffle_buffer": 4})
    return [sources[0] | {"weight": 3.0}, sources[1]]


def batches(recipe, pipeline, rank=0, processes=1, dataset=None):
    backbone = make_backbone(pipeline, text_dropout=0.1, vit_dropout=0.3, vae_dropout=0.3)
    sources = [dataset] if dataset is not None else open_sources(recipe.data, bool(recipe.packing))
    weights, buffers = [d.weight for d in recipe.data], [d.shuffle_buffer or 0 for d in recipe.data]
    rows = PreparedRows(sources, weights, backbone, 0, 10**9, buffers)
    if recipe.packing:
        return PackedBatches(rows, recipe.packing, backbone.collate, rank, processes)
    return FixedBatches(rows, recipe.batch_size, recipe.micro_batch_size, backbone.collate, rank, processes)


def ids_of(step) -> list[str]:
    return [sample for batch in step for sample in batch.ids]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["packs", "fixed batches"])
def test_killed_and_resumed_equals_uninterrupted(recipe_file, tmp_path, two_sources, kind):
    changes = PACKS if kind == "packs" else {"batch_size": 4}
    file = recipe_file("whole", steps=12, data=two_sources, checkpoints={"every": 1, "keep": 2}, **changes)
    assert train_here(file) == 0
    process = start("train", file, "--set", f"output_dir={tmp_path / 'killed'}")
    wait_for(lambda: (tmp_path / "killed" / "checkpoints" / "step-00000003").is_dir(), process)
    process.kill()
    process.communicate()
    assert train_here(file, "--resume", "--set", f"output_dir={tmp_path / 'killed'}") == 0
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert_same(weights_of(tmp_path / "killed" / "pipeline"), weights_of(tmp_path / "whole" / "pipeline"))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["packs", "fixed batches"])
def test_two_processes_train_as_one(recipe_file, tmp_path, two_sources, kind):
    changes = PACKS if kind == "packs" else {"batch_size": 4}
    file = recipe_file("one", data=two_sources, **changes)
    assert train_here(file) == 0
    run("train", file, "--set", "processes=2", "--set", f"output_dir={tmp_path / 'two'}")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["packs", "fixed batches"])
def test_steps_do_not_depend_on_processes_and_resume_anywhere(recipe_file, tiny_pipeline, two_sources, kind):
    changes = PACKS if kind == "packs" else {"batch_size": 4}
    recipe = load_recipe(recipe_file(data=two_sources, **changes))
    one, first, second = (batches(recipe, tiny_pipeline, *place) for place in ((0, 1), (0, 2), (1, 2)))
    states, steps = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(one.state())))
        steps.append(sorted(ids_of(one.next_step())))
        assert steps[-1] == sorted(ids_of(first.next_step()) + ids_of(second.next_step()))
    assert "b-" in str(steps) and len({step for step in map(tuple, steps)}) > 4
    for at in (1, 4, 8):
        again = batches(recipe, tiny_pipeline)
        again.load_state(states[at])
        assert [sorted(ids_of(again.next_step())) for _ in range(9 - at)] == steps[at:]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_row_comes_once_in_an_epoch_and_sources_by_weight(recipe_file, tiny_pipeline, two_sources, lanes):
    recipe = load_recipe(recipe_file(data=two_sources))
    rows = batches(recipe, tiny_pipeline).rows
    orders = [rows.order(lane, lanes) for lane in range(lanes)]
    taken = [[next(order) for _ in range(400)] for order in orders]
    for source, count in enumerate(map(len, rows.sources)):
        epochs = [
            [ref.row for ref in refs if ref.source == source and ref.epoch == epoch]
            for refs in taken
            for epoch in (0, 1)
        ]
        for epoch in (0, 1):
            assert sorted(row for share in epochs[epoch::2] for row in share) == list(range(count))
        assert lanes > 1 or epochs[0] != epochs[1], "another order in every epoch"
    shares = Counter(ref.source for refs in taken for ref in refs)
    assert shares[0] / shares.total() == pytest.approx(0.75, abs=0.06)


def test_resuming_reads_no_row_group_from_before(recipe_file, two_sources):
    folder = two_sources[0]["path"]
    read = []

    def groups():
        (source,) = open_sources(
            load_recipe(recipe_file(data={"path": folder, "streaming": True, "shuffle_buffer": 2})).data
        )
        original, source._read = source._read, lambda group, names: read.append(group) or original(group, names)
        return source, PreparedRows([source], [1.0], None, 0, 0, [2]).order()

    source, order = groups()
    numbers = [next(order).row for _ in range(6)]
    state, rest = order.state(), [next(order).row for _ in range(2)]
    assert [source[number]["id"] for number in numbers] and read
    read.clear()
    source, order = groups()
    order.load_state(state)
    assert [next(order).row for _ in range(2)] == rest
    assert [source[number]["id"] for number in rest]
    share = order.shares[0].order
    earlier = {group for groups in share.windows(0)[: share.window_at(0, 6)[0]] for group in groups}
    needed = {*share.windows(0)[share.window_at(0, 6)[0]], *share.windows(1)[0]}  # the next epoch's are read ahead
    assert earlier - needed and not set(read) & (earlier - needed)


def test_a_state_of_another_order_is_refused(recipe_file, tiny_pipeline, two_sources):
    saved = batches(load_recipe(recipe_file(data=two_sources, **PACKS)), tiny_pipeline).state()
    changed = [two_sources[0] | {"shuffle_buffer": 5}, two_sources[1]]
    with pytest.raises(RecipeError, match="streamed other rows, or in another order"):
        batches(load_recipe(recipe_file(data=changed, **PACKS)), tiny_pipeline).load_state(saved)


def test_a_state_of_version_0_1_continues_in_its_stored_order(recipe_file, tiny_pipeline, rows, rows_folder):
    """Version 0.1 wrote [epoch, rows taken] of each lane, and streamed rows in their stored order."""
    recipe = load_recipe(recipe_file(data={"path": str(rows_folder), "streaming": True}, **PACKS))
    old = batches(recipe, tiny_pipeline, dataset=make_rows(questions=2).to_iterable_dataset())
    for _ in range(3):
        old.next_step()
    state = json.loads(json.dumps(old.state()))
    assert state["lanes"]["0"].keys() == {"place", "buffer"} and len(state["lanes"]["0"]["place"]) == 2
    new = batches(recipe, tiny_pipeline)
    assert all(isinstance(lane.order, StreamedOrder) for lane in new.lanes.values())
    new.load_state(state)
    assert all(isinstance(lane.order, StoredOrder) for lane in new.lanes.values())
    assert [ids_of(new.next_step()) for _ in range(6)] == [ids_of(old.next_step()) for _ in range(6)]
    assert new.state() == old.state(), "and is saved in the old form again"


def test_other_formats_are_streamed_in_their_stored_order(recipe_file, tmp_path, two_sources):
    (tmp_path / "lines").mkdir()
    line = {"id": "1", "instruction": "a", "reference_images": [], "image": None, "answer": "b"}
    (tmp_path / "lines" / "train.jsonl").write_text(json.dumps(line) + "\n")
    lines = {"path": str(tmp_path / "lines"), "streaming": True}
    (source,) = open_sources(load_recipe(recipe_file(data=lines, **PACKS)).data, True)
    assert isinstance(PreparedRows([source], [1.0], None, 0, 0).lane(0, 2), StoredOrder)
    for changes in ({"data": lines}, {"data": [lines, two_sources[0]]} | PACKS):
        with pytest.raises(RecipeError, match="lines: several datasets, or one without packing"):
            recipe = load_recipe(recipe_file(**changes))
            open_sources(recipe.data, bool(recipe.packing))


def test_streamed_and_loaded_datasets_mix(recipe_file, tiny_pipeline, two_sources):
    data = [two_sources[0], {"path": two_sources[1]["path"]}]
    recipe = load_recipe(recipe_file(data=data, **PACKS))
    steps = batches(recipe, tiny_pipeline)
    assert [type(source) is RowGroups for source in steps.lanes[0].rows.sources] == [True, False]
    seen = [sample for _ in range(8) for sample in ids_of(steps.next_step())]
    assert {sample[0] for sample in seen} == {"a", "b"}


def test_too_few_rows_for_the_lanes(tiny_pipeline, rows):
    groups = RowGroups.of_dataset(rows.select(range(2)))
    with pytest.raises(RecipeError, match="no rows for one of the packs"):
        PreparedRows([groups], [1.0], None, 0, 0).order(2, 3)


@pytest.mark.long
def test_the_log_of_a_killed_run_may_end_in_half_a_line(recipe_file, tmp_path):
    file = recipe_file("whole", checkpoints={"every": 2}, steps=4)
    assert train_here(file) == 0
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000002", part / "checkpoints" / "step-00000002")
    log = (tmp_path / "whole" / "train_log.jsonl").read_text()
    (part / "train_log.jsonl").write_text(log[: len(log) - 40])
    assert train_here(file, "--resume", "--set", f"output_dir={part}") == 0
    assert losses_of(part) == losses_of(tmp_path / "whole")
