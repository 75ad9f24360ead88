"""Row groups: rows by number, few groups in memory, read ahead, read again after failures; orders of shares."""

import datasets
import pytest

from echo4o.dataset_scripts import row_groups
from echo4o.dataset_scripts.row_groups import GroupOrder, RowGroups, StreamedRows


@pytest.fixture
def files(tmp_path):
    """Two Parquet files with 10 + 7 rows in groups of at most 3."""
    for number, count in enumerate((10, 7)):
        rows = datasets.Dataset.from_list([{"id": f"{number}-{i}", "value": i} for i in range(count)])
        rows.to_parquet(tmp_path / f"{number}.parquet", batch_size=3)
    return [str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")]


IDS = [f"0-{i}" for i in range(10)] + [f"1-{i}" for i in range(7)]


def test_rows_by_number(files):
    groups = RowGroups.of_parquet(files)
    assert groups.counts == [3, 3, 3, 1, 3, 3, 1] and len(groups) == 17 and groups.column_names == ["id", "value"]
    assert [row["id"] for row in groups.select(range(17))] == IDS == [row["id"] for row in groups.stored()]
    assert groups[12] == {"id": "1-2", "value": 2} and groups.select_columns("id")[12] == {"id": "1-2"}
    assert RowGroups.of_parquet(files, ["value"])[12] == {"value": 2}


def test_rows_of_a_loaded_dataset(monkeypatch):
    monkeypatch.setattr(row_groups, "_ROWS_PER_BLOCK", 4)
    dataset = datasets.Dataset.from_list([{"id": name} for name in IDS]).select(range(16, -1, -1))
    groups = RowGroups.of_dataset(dataset)
    assert groups.counts == [4, 4, 4, 4, 1] and [row["id"] for row in groups.select(range(17))] == IDS[::-1]


@pytest.mark.parametrize("split_rows", [False, True])
@pytest.mark.parametrize("shares", [1, 2, 3, 9])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_read_every_row_once_in_every_epoch(files, shares, split_rows, shuffle):
    counts = RowGroups.of_parquet(files).counts
    orders = [
        GroupOrder(counts, (i, shares), seed=3, shuffle=shuffle, window=2, split_rows=split_rows)
        for i in range(shares)
    ]
    for epoch in (0, 1):
        seen = [[order.row(epoch, position) for position in range(len(order))] for order in orders]
        assert sorted(row for rows in seen for row in rows) == list(range(17))
        assert shares > 1 or (seen[0] != list(range(17))) == shuffle
    assert all(map(len, orders)) == (shares < 9 or split_rows)


def test_each_group_is_read_once_an_epoch_and_two_windows_are_held(files):
    groups, read = RowGroups.of_parquet(files), []
    original, groups._read = groups._read, lambda group, names: read.append(group) or original(group, names)
    groups.held = 0
    rows = StreamedRows(groups, GroupOrder(groups.counts, window=2, seed=1))
    for epoch in range(3):
        numbers = [
            rows.number(epoch, position) for position in range(len(rows)) if groups[rows.number(epoch, position)]
        ]
        assert sorted(numbers) == list(range(17))
        assert len(groups._tables) <= 4
    assert len(read) <= 3 * 7 + 2 and set(read) == set(range(7))


def test_a_failed_read_is_tried_again(files, monkeypatch):
    groups, failures = RowGroups.of_parquet(files), iter([ConnectionError("reset"), TimeoutError("late")])
    original = row_groups.open_file

    def open_file(file):
        if error := next(failures, None):
            raise error
        return original(file)

    monkeypatch.setattr(row_groups, "open_file", open_file)
    monkeypatch.setattr(row_groups.time, "sleep", lambda seconds: None)
    assert groups[0]["id"] == "0-0"


def test_a_read_that_keeps_failing_is_an_error_and_not_remembered(files, monkeypatch):
    groups, broken = RowGroups.of_parquet(files), True
    original = row_groups.open_file

    def open_file(file):
        if broken:
            raise ConnectionError("down")
        return original(file)

    monkeypatch.setattr(row_groups, "open_file", open_file)
    monkeypatch.setattr(row_groups.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="0.parquet cannot be read: down"):
        groups[0]
    broken = False
    assert groups[0]["id"] == "0-0"


def test_an_epoch_has_the_same_number_of_rows_for_a_share():
    counts = [5, 1, 7, 2]
    for shares in (3, 6):
        for share in range(shares):
            order = GroupOrder(counts, (share, shares), seed=0, window=1, split_rows=True)
            assert {order._windows(epoch)[1][-1] for epoch in range(20)} == {len(order)}
