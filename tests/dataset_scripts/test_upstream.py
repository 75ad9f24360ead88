"""The upstream reader: every quirk of the layout, and an account of every row."""

import gzip
import io
import json
import tarfile
from collections import Counter

import pytest

from echo4o.dataset_scripts.report import Reason, Report
from echo4o.dataset_scripts.upstream import MAX_MEMBER_BYTES, content_id, find_parts, read_upstream
from echo4o.quickstart.shapes import render_upstream, sample

SURREAL = "Surrel-Fantasy-Image"
ROWS = {"surreal_fantasy": 12, "multi_reference": 7, "instruction_following": 23}


def info(name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, data


def folder_of(root, rows, members, name=SURREAL, rows_name="conflict.jsonl"):
    """A part: ``rows`` is a list of rows or the file's text, ``members`` are names or (TarInfo, bytes) by archive."""
    images = root / name / "images"
    images.mkdir(parents=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (root / name / rows_name).write_text(text, encoding="utf-8")
    for archive, inside in members.items():
        with tarfile.open(images / archive, "w:gz") as file:
            for member, data in (info(m, m.encode()) if isinstance(m, str) else m for m in inside):
                file.addfile(member, io.BytesIO(data) if data else None)
    return root


def row(number, extension="jpg", **more):
    path = f"/Echo-4o-Image/{SURREAL}/images/{number:05d}.{extension}"
    return {"task_type": "t2i", "instruction": f"row {number}", "output_image": path, "type": "T1", **more}


def read(root, parts=("surreal_fantasy",)):
    report = Report()
    rows = list(read_upstream(root, parts, report))
    assert report.given == report.accepted + report.rejected and report.accepted == len(rows)
    return rows, report


def test_shapes_4o_is_read_whole(tmp_path):
    render_upstream(tmp_path, ROWS, rows_per_archive=10)
    rows, report = read(tmp_path, tuple(ROWS))
    assert not report.findings and report.given == sum(ROWS.values())
    assert Counter(row["task"] for row in rows) == {"text_to_image": 35, "multi_reference": 7}
    assert len({row["id"] for row in rows}) == len(rows)
    assert [row["instruction"] for row in rows[-23:]] == [
        sample("instruction_following", index).prompt.text for index in range(23)
    ]
    assert read(tmp_path, tuple(ROWS))[0] == rows


def test_a_row_in_our_features(tmp_path):
    root = folder_of(tmp_path, [row(0, note="kept")], {"0-1.tar.gz": ["images/00000.jpg"]})
    assert read(root)[0] == [
        {
            "id": content_id("row 0", [], b"images/00000.jpg"),
            "instruction": "row 0",
            "task": "text_to_image",
            "category": "T1",
            "reference_images": [],
            "image": {"bytes": b"images/00000.jpg", "path": "00000.jpg"},
            "source": f"{SURREAL}/conflict.jsonl:1",
            "metadata": json.dumps(
                {
                    "archive": f"{SURREAL}/images/0-1.tar.gz",
                    "member": "images/00000.jpg",
                    "note": "kept",
                    "task_type": "t2i",
                }
            ),
        }
    ]


@pytest.mark.parametrize("member", ["00000.jpg", "images/00000.jpg", "./00000.jpg", "a/b/00000.png", "00000.webp"])
def test_members_are_joined_by_their_name(tmp_path, member):
    rows, report = read(folder_of(tmp_path, [row(0)], {"a.tar.gz": [member]}))
    assert [r["image"]["bytes"] for r in rows] == [member.encode()] and not report.findings


def test_archives_come_in_the_order_of_their_numbers(tmp_path):
    archives = {"10-20.tar.gz": ["00010.jpg"], "0-5.tar.gz": ["00000.jpg"], "5-10.tar.gz": ["00005.jpg"]}
    rows, _ = read(folder_of(tmp_path, [row(10), row(5), row(0)], archives))
    assert [r["instruction"] for r in rows] == ["row 0", "row 5", "row 10"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([row(0), row(1)], indent=1),
        "\ufeff" + json.dumps(row(0)) + json.dumps(row(1)),
        json.dumps(row(0)) + "\n\n" + json.dumps(row(1)),
        json.dumps(row(0)) + ",\r\n" + json.dumps(row(1)) + "\r\n",
    ],
    ids=["array", "joined", "empty line", "commas"],
)
def test_ways_of_writing_rows(tmp_path, text):
    rows, report = read(folder_of(tmp_path, text, {"a.tar.gz": ["00000.jpg", "00001.jpg"]}))
    assert [r["instruction"] for r in rows] == ["row 0", "row 1"] and not report.findings


@pytest.mark.parametrize(
    "given",
    [
        {"input_images": ["/x/a.png", "/x/b.png"], "output_image": "/x/c.png", "instruction": "i"},
        {"reference_images": ["a.jpg", "b.jpg"], "output_image": "c.jpg", "instruction": "i"},
        {"image_list": ["a.png", "b.png", "c.png"], "instruction_list": ["i"]},
    ],
    ids=["input_images", "reference_images", "image_list"],
)
def test_multi_reference_rows(tmp_path, given):
    # The answer comes first and one reference lies in another archive.
    root = folder_of(tmp_path, [given], {"0-1.tar.gz": ["c.png", "b.png"], "1-2.tar.gz": ["a.png"]}, "Multi-Reference")
    (only,), report = read(root, ("multi_reference",))
    assert [picture["bytes"] for picture in only["reference_images"]] == [b"a.png", b"b.png"]
    assert (only["image"]["bytes"], only["task"], report.findings) == (b"c.png", "multi_reference", [])


def test_one_reference_as_a_string_and_shared(tmp_path):
    rows = [{"input_image": "a.png", "output_image": f"{name}.png", "instruction": name} for name in "bc"]
    read_rows, _ = read(
        folder_of(tmp_path, rows, {"0.tar": ["a.png", "c.png", "b.png"]}, "multi-ref"), ("multi_reference",)
    )
    assert [(r["instruction"], r["reference_images"][0]["bytes"]) for r in read_rows] == [
        ("c", b"a.png"),
        ("b", b"a.png"),
    ]


def test_folders_tell_pictures_of_one_name_apart(tmp_path):
    given = {"input_images": ["/x/refs/0.png"], "output_image": "/x/out/0.png", "instruction": "i"}
    root = folder_of(tmp_path, [given], {"0.tar.gz": ["refs/0.png", "out/0.png"]}, "multi-ref")
    (only,), report = read(root, ("multi_reference",))
    assert (only["reference_images"][0]["bytes"], only["image"]["bytes"]) == (b"refs/0.png", b"out/0.png")
    assert not report.findings


def test_every_bad_row_is_accounted_for(tmp_path):
    lines = [
        json.dumps(row(0)),
        '{"instruction": "cut',
        "[1, 2]",
        '"text"',
        json.dumps(row(2) | {"instruction": " "}),
        json.dumps(row(3) | {"instruction": 7}),
        json.dumps({"instruction": "no picture named"}),
        json.dumps(row(4) | {"output_image": 4}),
        json.dumps(row(5)),
        json.dumps(row(6, input_images=["00007.jpg", "00000.jpg"])),
        json.dumps(row(8, input_images=["a"], reference_images=["b"])),
        json.dumps(row(9, input_images=7)),
        '{"instruction": "\\ud800", "output_image": "00000.jpg"}',
        json.dumps({"instruction_list": {"a": 1}, "image_list": ["00000.jpg"]}),
        json.dumps(row(0)) + "} rest",
    ]
    rows, report = read(folder_of(tmp_path, "\n".join(lines), {"a.tar.gz": ["00000.jpg", "00006.jpg"]}))
    assert len(rows) == 2 and report.given == 16
    assert report.reasons == {
        Reason.UNREADABLE_ROW: 11,
        Reason.EMPTY_INSTRUCTION: 1,
        Reason.MISSING_IMAGE: 1,
        Reason.MISSING_REFERENCE: 1,
    }
    lost = next(f for f in report.findings if f.reason is Reason.MISSING_REFERENCE)
    assert (lost.file, lost.line, lost.detail) == (f"{SURREAL}/conflict.jsonl", 10, "no archive has 00007.jpg")
    assert str(report).startswith("16 rows given, 2 accepted, 14 rejected (1 x empty_instruction")


def test_hostile_members_are_refused(tmp_path):
    hostile = [
        info("/etc/00000.jpg", b"x"),
        info("../../00001.jpg", b"x"),
        info("..\\00002.jpg", b"x"),
        info("00003.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        info("00004.jpg", type=tarfile.LNKTYPE, linkname="00009.jpg"),
        info("00005.jpg", type=tarfile.CHRTYPE),
        info("00006.jpg", type=tarfile.FIFOTYPE),
        info("images", type=tarfile.DIRTYPE),
        info("00009.jpg", b"fine"),
    ]
    root = folder_of(tmp_path / "release", [row(n) for n in range(10)], {"a.tar.gz": hostile})
    rows, report = read(root)
    assert [r["instruction"] for r in rows] == ["row 9"]
    assert report.reasons == {Reason.UNSAFE_MEMBER: 7, Reason.MISSING_IMAGE: 9}
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def test_giant_members_are_not_read(tmp_path, monkeypatch):
    assert MAX_MEMBER_BYTES > 100e6
    monkeypatch.setattr("echo4o.dataset_scripts.upstream.MAX_MEMBER_BYTES", 10)
    root = folder_of(tmp_path, [row(0), row(1)], {"a.tar.gz": [info("00000.jpg", b"x" * 11), info("00001.jpg", b"x")]})
    rows, report = read(root)
    assert [r["instruction"] for r in rows] == ["row 1"]
    assert "11 bytes; at most 10" in str(report.findings[0])


def test_members_without_rows_and_duplicates_are_reported(tmp_path):
    members = [info("00000.jpg", b"first"), info("x/00000.png", b"second"), "other.jpg", "._00000.jpg"]
    (only,), report = read(folder_of(tmp_path, [row(0)], {"a.tar.gz": members}))
    assert only["image"]["bytes"] == b"first"
    assert report.reasons == {Reason.DUPLICATE_MEMBER: 1, Reason.MEMBER_WITHOUT_ROW: 2}


@pytest.mark.parametrize("harm", ["cut", "no gzip", "empty"])
def test_a_broken_archive_costs_only_its_rows(tmp_path, harm):
    root = folder_of(
        tmp_path,
        [row(0), row(1)],
        {"0-1.tar.gz": [info("00000.jpg", bytes(range(256)) * 99)], "1-2.tar.gz": ["00001.jpg"]},
    )
    archive = root / SURREAL / "images" / "0-1.tar.gz"
    data = gzip.compress(gzip.decompress(archive.read_bytes())[:9000]) if harm == "cut" else b"text" * 300
    archive.write_bytes(b"" if harm == "empty" else data)
    rows, report = read(root)
    assert [r["instruction"] for r in rows] == ["row 1"]
    assert report.reasons == {Reason.UNREADABLE_ARCHIVE: 1, Reason.MISSING_IMAGE: 1}


def test_ids_depend_on_the_content_alone(tmp_path):
    one, _ = read(folder_of(tmp_path / "a", [row(0)], {"a.tar.gz": [info("00000.jpg", b"x")]}))
    two, _ = read(folder_of(tmp_path / "b", [row(1), row(0)], {"b.tar.gz": [info("./00000.png", b"x"), "00001.jpg"]}))
    assert one[0]["id"] == two[0]["id"] != two[1]["id"]
    assert content_id("ab", [b"c"], b"d") != content_id("a", [b"bc"], b"d")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_parts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="part is 'poems'; allowed are surreal_fantasy"):
        find_parts(tmp_path, ["poems"])
    (tmp_path / "Pictures").mkdir()
    with pytest.raises(FileNotFoundError, match="0 folders for surreal_fantasy .* There is: Pictures"):
        find_parts(tmp_path, ["surreal_fantasy"])
    (tmp_path / SURREAL).mkdir()
    with pytest.raises(FileNotFoundError, match="has no rows"):
        find_parts(tmp_path, ["surreal_fantasy"])
    (tmp_path / SURREAL / "a.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="has no archives"):
        find_parts(tmp_path, ["surreal_fantasy"])
