"""The history of the app on the disk: it outlives the server, is bounded, and trusts no file name and no token."""

import json

import pytest
from PIL import Image

from echo4o.common.image_metadata import ImageMetadata, read_metadata
from echo4o.serving.app import history as module
from echo4o.serving.app.history import History
from echo4o.serving.tasks import GeneratedImage


def generated(seed: int) -> GeneratedImage:
    settings = {"num_inference_steps": 3, "height": 8, "width": 8}
    return GeneratedImage(Image.new("RGB", (8, 8)), seed, settings, ImageMetadata("a dot", (seed,)))


def fill(history: History, count: int, token: str | None = None) -> str:
    token = history.visitor(token)
    for seed in range(count):
        history.add(token, generated(seed), "a dot", 2)
    return token


def test_it_is_there_again_after_a_restart(tmp_path):
    first = History(tmp_path / "kept")
    token, other = fill(first, 3), fill(first, 1)
    again = History(tmp_path / "kept")
    assert again.secret == first.secret, "the browser can read its token"
    assert again.visitor(token) == token and again.entries(token) == first.entries(token)
    assert [entry.seed for entry in again.entries(token)] == [2, 1, 0] and again.entries(token)[0].references == 2
    assert read_metadata(again.entries(token)[0].file).seed == 2
    again.clear(token)
    assert again.entries(token) == [] and len(list((tmp_path / "kept").rglob("*.png"))) == 1
    assert len(History(tmp_path / "kept").entries(other)) == 1


def test_tokens_are_not_stored_and_name_no_path(tmp_path):
    history = History(tmp_path)
    token = fill(history, 1)
    assert not any(token in str(path) for path in tmp_path.rglob("*"))
    assert token not in (tmp_path / "browser-secret").read_text()
    for hostile in ("../..", "/etc", "", "x" * 100_000, "a\0b", "\ud800", None, 7, [token]):
        new = history.visitor(hostile)
        assert new != hostile and history.entries(new) == [] == history.entries(hostile)
    assert {path.parent.parent for path in tmp_path.rglob("*.png")} == {tmp_path}
    assert next(tmp_path.rglob("*.png")).parent.stat().st_mode & 0o077 == 0, "for its owner only"


def test_files_of_others_and_damaged_ones_are_left_out_and_left_alone(tmp_path):
    first = History(tmp_path)
    token = fill(first, 4)
    *_, file = [entry.file for entry in first.entries(token)]
    folder = file.parent
    torn, linked, foreign = (entry.file for entry in first.entries(token)[:3])
    torn.with_suffix(".json").write_text("{")
    linked.unlink()
    linked.symlink_to("/etc/hostname")
    foreign.with_suffix(".json").write_text(json.dumps(["a", "list"]))
    (folder / "..%2f.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ("f" * 32)).write_text("a file with the name of a visitor")
    again = History(tmp_path)
    assert [entry.file for entry in again.entries(token)] == [file]
    again.clear(token)
    assert (tmp_path / "notes.txt").is_file() and (folder / "..%2f.png").is_file() and linked.is_symlink()


def test_it_is_bounded_in_images_visitors_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_IMAGES", 3)
    monkeypatch.setattr(module, "MOST_VISITORS", 2)
    history = History(tmp_path)
    tokens = [fill(history, 5) for _ in range(3)]
    assert [len(history.entries(token)) for token in tokens] == [0, 3, 3]
    assert len(list(tmp_path.rglob("*.png"))) == len(list(tmp_path.rglob("*.json"))) == 6
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    size = history.entries(tokens[1])[0].bytes
    monkeypatch.setattr(module, "MOST_BYTES", 4 * size)
    fill(history, 1, tokens[2])
    kept = history.entries(tokens[1]) + history.entries(tokens[2])
    assert 1 <= len(kept) <= 4 and sum(path.stat().st_size for path in tmp_path.rglob("*.png")) <= 4 * size
    assert history.entries(tokens[2])[0].seed == 0, "the newest stays"
    monkeypatch.setattr(module, "MOST_BYTES", 1)
    again = History(tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 1 and len(again.entries(tokens[2])) == 1


def test_a_folder_that_cannot_be_used_is_one_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--history .*file: cannot be used"):
        History(tmp_path / "file")


def test_without_a_folder_it_goes_with_the_server():
    history = History()
    fill(history, 1)
    folder = history.folder
    del history
    assert not folder.exists()
