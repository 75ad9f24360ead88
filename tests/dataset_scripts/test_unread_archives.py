"""Archives that are not read are named and counted, and a build that accepts no row is an error."""

import json
import zipfile

import pytest

from echo4o.dataset_scripts.build import build
from echo4o.dataset_scripts.findings import Remark

from .layout import SURREAL, picture, row, write_rows, write_tar


@pytest.fixture
def release(tmp_path):
    """Two rows: the image of one is in a tar archive, that of the other in a zip archive."""
    folder = tmp_path / "release" / SURREAL
    write_rows(folder / "rows.jsonl", [row(0), row(1)])
    write_tar(folder / "images" / "0.tar.gz", [("00000.jpg", picture(0))])
    with zipfile.ZipFile(folder / "images" / "1.zip", "w") as archive:
        archive.writestr("00001.jpg", picture(1))
    (folder / "images" / "2.7z").write_bytes(b"7z")
    return tmp_path / "release"


def test_unread_archives_are_named_and_counted(release, tmp_path):
    manifest = build(str(release), tmp_path / "out")
    assert manifest["rows"] == {"given": 2, "accepted": 1, "rejected": 1}
    assert manifest["remarks"][Remark.UNREAD_ARCHIVE] == 2
    remarks = [json.loads(line) for line in (tmp_path / "out/remarks.jsonl").read_text().splitlines()]
    named = {r["archive"].rpartition("/")[2] for r in remarks if r["reason"] == Remark.UNREAD_ARCHIVE}
    assert named == {"1.zip", "2.7z"}


def test_no_accepted_row_is_an_error_each_time(release, tmp_path):
    (release / SURREAL / "images" / "0.tar.gz").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="none of 2 rows was accepted; .*rejected.jsonl says why"):
            build(str(release), tmp_path / "out")
