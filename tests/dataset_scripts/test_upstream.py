"""The reader: every quirk of the published layout, hostile archives, and an account of every row."""

import gzip
import hashlib
import json
import tarfile
import zlib
from collections import Counter

import pytest

from echo4o.dataset_scripts.findings import ReadingReport, RejectionReason, Remark
from echo4o.dataset_scripts.schema import RowMap, SchemaError
from echo4o.dataset_scripts.source import PublishedSource
from echo4o.dataset_scripts.upstream import ReadOptions, RowShares, read_events, read_upstream
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream, sample
from tests.dataset_scripts.layout import (
    FOLLOWING,
    REFERENCE,
    SURREAL,
    member,
    picture,
    reference_row,
    row,
    small_release,
    write_rows,
    write_tar,
)


def read(root, configuration="all", **options):
    """Rows by their instruction, and all findings. Given = accepted + rejected, each row once."""
    rows, findings, numbers = [], [], []
    for event in read_events(PublishedSource(root), configuration, ReadOptions(**options)):
        if event.number is not None:
            numbers.append(event.number)
        rows += [event.row] if event.row else []
        findings += [event.finding] if event.finding else []
    assert len(set(numbers)) == len(numbers)
    for part in {p for p, _ in numbers}:
        assert sorted(n for p, n in numbers if p == part) == list(range(sum(p == part for p, _ in numbers)))
    return rows, findings


def reasons(findings) -> Counter:
    return Counter(f.reason for f in findings)


def one_part(root, rows, members, folder=SURREAL, archive="0-1.tar.gz"):
    text = rows if isinstance(rows, str | bytes) else "".join(json.dumps(r) + "\n" for r in rows)
    write_tar(root / folder / "images" / archive, members)
    (root / folder / "conflict.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def test_shapes_4o_is_read_completely(tmp_path):
    numbers = {"surreal_fantasy": 12, "multi_reference": 7, "instruction_following": 23}
    render_upstream(tmp_path, numbers, rows_per_archive=10)
    report = ReadingReport()
    rows = list(read_upstream(tmp_path, report=report))
    assert str(report) == "42 rows given, 42 accepted, 0 rejected"
    assert Counter(row["task"] for row in rows) == {"text_to_image": 35, "multi_reference": 7}
    expected = [sample("instruction_following", index).prompt.text for index in range(23)]
    assert [row["instruction"] for row in rows[-23:]] == expected
    assert list(read_upstream(tmp_path)) == rows


def test_a_row_in_our_features(tmp_path):
    data = picture(0)
    one_part(tmp_path, [row(0, note="kept", type=3)], [("images/00000.jpg", data)])
    (only,), findings = read(tmp_path)
    assert not findings
    metadata = json.loads(only.pop("metadata"))
    digest = hashlib.sha256(b"row 0 of Surrel-Fantasy-Image\0" + hashlib.sha256(data).digest()).hexdigest()
    assert only == {
        "id": digest[:32],
        "instruction": "row 0 of Surrel-Fantasy-Image",
        "task": "text_to_image",
        "category": "3",
        "reference_images": [],
        "image": {"bytes": data, "path": "00000.jpg"},
        "source": SURREAL,
    }
    assert metadata == {
        "file": f"{SURREAL}/conflict.jsonl",
        "line": 1,
        "image": {
            "archive": f"{SURREAL}/images/0-1.tar.gz",
            "member": "images/00000.jpg",
            "format": "JPEG",
            "width": 24,
            "height": 24,
            "bytes": len(data),
        },
        "reference_images": [],
        "row": {"task_type": "t2i", "note": "kept"},
    }


@pytest.mark.parametrize("name", ["00000.jpg", "images/00000.jpg", "./00000.jpg", "a/b/00000.png", "00000.WEBP"])
@pytest.mark.parametrize("mode", ["w:gz", "w", "w:xz", "w:bz2"])
def test_members_are_joined_by_their_name(tmp_path, name, mode):
    archive = one_part(tmp_path, [row(0)], []) / SURREAL / "images" / "0-1.tar.gz"
    write_tar(archive, [(name, picture(0))], mode)  # the compression is told by the bytes, not by the name
    rows, findings = read(tmp_path)
    assert [r["image"]["bytes"] for r in rows] == [picture(0)] and not findings


def test_archives_come_in_the_order_of_their_numbers(tmp_path):
    one_part(tmp_path, [row(10), row(5), row(0)], [("00000.jpg", picture(0))], archive="0-5.tar.gz")
    for first in (10, 5):
        images = tmp_path / SURREAL / "images"
        write_tar(images / f"{first}-{first + 10}.tar.gz", [(f"{first:05d}.jpg", picture(first))])
    assert [r["image"]["path"] for r in read(tmp_path)[0]] == ["00000.jpg", "00005.jpg", "00010.jpg"]


@pytest.mark.parametrize("size", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps([row(0), row(1)], indent=1),
        json.dumps([row(0), row(1)]),
        "\ufeff" + json.dumps(row(0)) + json.dumps(row(1)),
        json.dumps(row(0)) + "\n\n \n" + json.dumps(row(1)),
        json.dumps(row(0)) + ",\r\n" + json.dumps(row(1)) + "\r\n",
        json.dumps(row(0), indent=2) + "\n" + json.dumps(row(1), indent=2),
    ],
    ids=["pretty array", "array", "joined", "empty lines", "commas", "pretty objects"],
)
def test_ways_of_writing_rows(tmp_path, text, size, monkeypatch):
    monkeypatch.setattr("echo4o.dataset_scripts.json_rows.CHUNK_BYTES", size)
    one_part(tmp_path, text, [(f"0000{n}.jpg", picture(n)) for n in range(2)])
    rows, findings = read(tmp_path)
    assert [r["image"]["path"] for r in rows] == ["00000.jpg", "00001.jpg"] and not findings


@pytest.mark.parametrize(
    "given",
    [
        {"input_images": ["/x/a.png", "/x/b.png"], "output_image": "/x/c.png", "instruction": "i"},
        {"reference_images": ["a.jpg", "b.jpg"], "output_image": "c.jpg", "instruction": "i"},
        {"image_list": ["a.jpg", "b.jpg"], "output_image": "c.jpg", "instruction": "i"},
        {"image_list": ["a.png", "b.png", "c.png"], "instruction_list": ["i"]},
        {"image_list": ["a.png", "b.png", "c.png"], "instruction": "i"},
    ],
    ids=["input_images", "reference_images", "image_list and output", "image_list", "image_list, one instruction"],
)
def test_multi_reference_shapes(tmp_path, given):
    # The target comes first and one reference lies in another archive.
    pictures = {name: picture(ord(name)) for name in "abc"}
    one_part(tmp_path, [given], [("c.png", pictures["c"]), ("b.png", pictures["b"])], REFERENCE)
    write_tar(tmp_path / REFERENCE / "images" / "1-2.tar.gz", [("a.png", pictures["a"])])
    (only,), findings = read(tmp_path, "multi_reference")
    assert [p["bytes"] for p in only["reference_images"]] == [pictures["a"], pictures["b"]]
    assert (only["image"]["bytes"], only["task"], findings) == (pictures["c"], "multi_reference", [])


def test_one_reference_as_a_string_and_shared(tmp_path):
    given = [{"input_image": "a.png", "output_image": f"{name}.png", "instruction": name} for name in "bc"]
    one_part(tmp_path, given, [(f"{name}.png", picture(ord(name))) for name in "acb"], REFERENCE)
    rows, _ = read(tmp_path)
    assert [(r["instruction"], r["reference_images"][0]["bytes"]) for r in rows] == [
        ("c", picture(ord("a"))),
        ("b", picture(ord("a"))),
    ]


def test_folders_distinguish_images_of_one_name(tmp_path):
    given = {"input_images": ["/x/refs/0.png"], "output_image": "/x/out/0.png", "instruction": "i"}
    one_part(tmp_path, [given], [("refs/0.png", picture(1)), ("out/0.png", picture(2))], REFERENCE)
    (only,), findings = read(tmp_path)
    assert (only["reference_images"][0]["bytes"], only["image"]["bytes"]) == (picture(1), picture(2)) and not findings
    one_part(tmp_path, [given], [("0.png", picture(1))], REFERENCE)
    assert reasons(read(tmp_path)[1]) == {Remark.AMBIGUOUS_MEMBER: 1, RejectionReason.MISSING_IMAGE: 1}


def test_images_wait_in_a_file_when_they_are_many(tmp_path, monkeypatch):
    small_release(tmp_path, rows=20)
    expected = read(tmp_path)
    monkeypatch.setattr("echo4o.dataset_scripts.upstream.HELD_BYTES", 1000)
    assert read(tmp_path) == expected and len(expected[0]) == 60


def test_workers_and_shares_change_nothing(tmp_path):
    small_release(tmp_path, rows=20)
    rows, _ = read(tmp_path)
    assert read(tmp_path, workers=5)[0] == rows
    dealt = [
        e.row
        for s in range(4)
        for e in read_events(PublishedSource(tmp_path), only=RowShares(frozenset([s]), 4))
        if e.row
    ]
    assert sorted(r["id"] for r in dealt) == sorted(r["id"] for r in rows)


def test_an_unknown_shape_is_never_guessed(tmp_path):
    given = {"prompt": "i", "src": ["a.png"], "meta": {"out": ["x.png", "c.png"]}, "kind": "k"}
    one_part(tmp_path, [given], [("a.png", picture(1)), ("c.png", picture(2))], REFERENCE)
    with pytest.raises(SchemaError, match="kind, meta, prompt, src, which is not a known shape; map them with --map"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"'meta.out\[x\]': a field is key"):
        RowMap(instruction="prompt", image="meta.out[x]")
    row_map = RowMap(instruction="prompt", image="meta.out[-1]", reference_images="src", category="kind")
    (only,), _ = read(tmp_path, row_map=row_map)
    assert (only["instruction"], only["category"]) == ("i", "k")
    assert (only["image"]["bytes"], only["reference_images"][0]["bytes"]) == (picture(2), picture(1))


def test_a_folder_that_nothing_names_asks_to_be_assigned(tmp_path):
    one_part(tmp_path, [row(0)], [("00000.jpg", picture(0))], "Later-Images")
    with pytest.raises(ValueError, match="nothing says which configuration the folder 'Later-Images' is"):
        read(tmp_path)


def test_a_folder_alone_and_images_unpacked(tmp_path):
    write_rows(tmp_path / SURREAL / "conflict.jsonl", [row(0), row(1)])
    (tmp_path / SURREAL / "images").mkdir()
    (tmp_path / SURREAL / "images" / "00000.jpg").write_bytes(picture(0))
    (tmp_path / SURREAL / "images" / "9.jpg").write_bytes(picture(9))
    rows, findings = read(tmp_path / SURREAL, "surreal_fantasy")
    assert len(rows) == 1 and reasons(findings) == {RejectionReason.MISSING_IMAGE: 1, Remark.UNUSED_MEMBER: 1}


NASTY_LINES = [
    json.dumps(row(0)),
    '{"instruction": "cut',
    "[1, 2]",
    '"text"',
    json.dumps(row(2) | {"instruction": " "}),
    json.dumps(row(3) | {"instruction": 7}),
    json.dumps({"instruction": "no picture named", "output_image": None}),
    json.dumps(row(4) | {"output_image": 4}),
    json.dumps(row(5)),  # in no archive
    json.dumps(row(6, input_images=["00007.jpg", "00000.jpg"])),  # one reference missing
    json.dumps(row(8, input_images=["a"], reference_images=["b"])),  # two keys of references: not guessed
    json.dumps(row(9, input_images=[7])),
    '{"instruction": "\\ud800", "output_image": "00000.jpg"}',
    '{"instruction": "' + "x" * 10_000_000 + '"}',
    "[" * 100_000,
    json.dumps(row(10)),  # undecodable
    json.dumps(row(11)),  # truncated
    json.dumps(row(12)),  # a bomb
    json.dumps(row(13)),  # a link
    json.dumps(row(0)),  # a duplicate
    json.dumps(row(0)) + json.dumps(row(14)) + "} rest",
    '{"instruction": "broken "quotes"", "output_image": "00000.jpg"}' + json.dumps(row(15)),
    '{"a": ' * 3000 + "1",
    json.dumps({"picture": "00000.jpg"}),
]


def bomb() -> bytes:
    """A PNG that says 60,000 x 60,000."""
    data = bytearray(picture(0, "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    root = tmp_path_factory.mktemp("nasty")
    members = [(f"{n:05d}.jpg", picture(n)) for n in (0, 6, 14, 15)]
    members += [("00010.jpg", b"GIF89a no picture at all" * 30), ("00011.jpg", picture(11, size=512)[:3000])]
    members += [("00012.png", bomb()), member("00013.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")]
    members += [("unused.jpg", picture(99)), ("x/00000.png", picture(98, "PNG")), ("._00000.jpg", b"resource fork")]
    text = "\n".join(NASTY_LINES).encode() + b'\n{"instruction": "\xff\xfe", "output_image": "00000.jpg"}\n'
    return one_part(root, text, members)


def test_every_row_of_a_nasty_folder_is_accounted_for(nasty):
    rows, findings = read(nasty)
    assert [r["image"]["path"] for r in rows] == ["00000.jpg", "00014.jpg", "00015.jpg"]
    assert reasons(findings) == {
        # 2, 3 (two numbers), 4, 6, 8, 11, 12, 13, 14, the rest of 21, the quotes, the depth, the keys, the bytes
        RejectionReason.UNREADABLE_ROW: 15,
        RejectionReason.EMPTY_INSTRUCTION: 1,
        RejectionReason.MISSING_IMAGE: 2,
        RejectionReason.MISSING_REFERENCE: 1,
        RejectionReason.UNDECODABLE: 1,
        RejectionReason.TRUNCATED: 1,
        RejectionReason.DECOMPRESSION_BOMB: 1,
        RejectionReason.UNSAFE_MEMBER: 1,
        RejectionReason.DUPLICATE: 2,
        Remark.OPEN_ARRAY: 1,
        Remark.UNSAFE_MEMBER: 1,
        Remark.UNUSED_MEMBER: 2,
        Remark.SURPLUS_MEMBER: 1,
    }
    by_line = {f.line: f for f in findings if f.line}
    assert by_line[14].raw == NASTY_LINES[13] and "longer than" in by_line[14].detail
    assert by_line[16].member == "00010.jpg" and by_line[16].row == row(10)
    assert by_line[19].detail == "a link to /etc/passwd" and by_line[19].archive.endswith("0-1.tar.gz")
    assert by_line[25].raw == '{"instruction": "\udcff\udcfe", "output_image": "00000.jpg"}'
    assert all(f.row is not None or f.raw for f in findings if isinstance(f.reason, RejectionReason))


def test_a_missing_image_names_the_damaged_archive(tmp_path):
    one_part(tmp_path, [row(0), row(1)], [(f"0000{n}.jpg", picture(n, size=400)) for n in range(2)])
    archive = tmp_path / SURREAL / "images" / "0-1.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-8000])
    rows, findings = read(tmp_path)
    assert len(rows) == 1 and reasons(findings) == {Remark.DAMAGED_ARCHIVE: 1, RejectionReason.MISSING_IMAGE: 1}
    assert findings[1].detail == f"no archive holds 00001.jpg; damaged: {SURREAL}/images/0-1.tar.gz"


def test_hostile_members_are_reported_and_nothing_is_written(tmp_path):
    hostile = [
        member("/etc/00000.jpg", b"x"),
        member("../../00001.jpg", b"x"),
        member("..\\00002.jpg", b"x"),
        member("00003.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("00004.jpg", type=tarfile.LNKTYPE, linkname="00009.jpg"),
        member("00005.jpg", type=tarfile.CHRTYPE),
        member("00006.jpg", type=tarfile.FIFOTYPE),
        member("images", type=tarfile.DIRTYPE),
        member("C:\\x\\00007.jpg", b"x"),
        member("00009.jpg", picture(9)),
    ]
    one_part(tmp_path / "release", [row(n) for n in range(10)], hostile)
    rows, findings = read(tmp_path / "release")
    assert [r["image"]["path"] for r in rows] == ["00009.jpg"]
    assert reasons(findings) == {
        Remark.UNSAFE_MEMBER: 8,
        RejectionReason.UNSAFE_MEMBER: 8,
        RejectionReason.MISSING_IMAGE: 1,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def test_giant_members_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("echo4o.dataset_scripts.archives.MAX_IMAGE_BYTES", 5000)
    one_part(tmp_path, [row(0), row(1)], [("00000.jpg", b"x" * 5001), ("00001.jpg", picture(1))])
    rows, findings = read(tmp_path)
    assert len(rows) == 1
    assert reasons(findings) == {Remark.DECOMPRESSION_BOMB: 1, RejectionReason.DECOMPRESSION_BOMB: 1}


def test_a_gzip_bomb_ends_its_archive(tmp_path, monkeypatch):
    monkeypatch.setattr("echo4o.dataset_scripts.archives._FREE_INFLATION", 1 << 20)
    one_part(tmp_path, [row(0), row(1)], [("00000.jpg", picture(0)), ("big", bytes(200 << 20)), ("00001.jpg", b"")])
    rows, findings = read(tmp_path)
    assert len(rows) == 1 and reasons(findings) == {
        Remark.DECOMPRESSION_BOMB: 1,
        Remark.UNUSED_MEMBER: 1,
        RejectionReason.MISSING_IMAGE: 1,
    }


@pytest.mark.parametrize("harm", ["no archive", "empty", "damaged header", "huge header", "two archives in one"])
def test_a_damaged_archive_is_reported(tmp_path, harm):
    one_part(tmp_path, [row(0)], [("00000.jpg", picture(0))])
    archive = tmp_path / SURREAL / "images" / "0-1.tar.gz"
    good = gzip.decompress(archive.read_bytes())
    first = good[: 512 + -(-len(picture(0)) // 512) * 512]
    if harm == "huge header":
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
        data = first + info.tobuf()
    else:
        broken = first + b"\1" * 2048
        data = {"no archive": b"text" * 500, "empty": b"", "damaged header": broken}.get(harm, good + good)
    archive.write_bytes(data)
    rows, findings = read(tmp_path)
    assert reasons(findings)[Remark.DAMAGED_ARCHIVE] == 1
    assert len(rows) == (harm not in ("no archive", "empty"))


def test_sound_images_of_other_formats_are_stored_only_when_asked(tmp_path):
    one_part(tmp_path, [row(0)], [("00000.jpg", picture(0, "BMP"))])
    assert reasons(read(tmp_path)[1]) == {RejectionReason.UNDECODABLE: 1}
    (only,), _ = read(tmp_path, reencode=True)
    assert only["image"]["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_header_verification_sees_a_cut(tmp_path, kind):
    whole = picture(3, kind, 64)
    one_part(tmp_path, [row(0), row(1)], [("00000.jpg", whole), ("00001.jpg", whole[:-20])])
    rows, findings = read(tmp_path, verify="header")
    assert len(rows) == 1 and reasons(findings) == {RejectionReason.TRUNCATED: 1}


def test_damage_inside_an_image_is_seen_by_decoding(tmp_path):
    damaged = bytearray(picture(1, "PNG", 256))
    damaged[len(damaged) // 2] ^= 0xFF
    one_part(tmp_path, [row(0)], [("00000.png", bytes(damaged))])
    assert len(read(tmp_path, verify="header")[0]) == 1
    assert reasons(read(tmp_path)[1]) == {RejectionReason.UNDECODABLE: 1}


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        PublishedSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds nothing for the configuration all; it holds no folder with rows"):
        read(tmp_path)
    small_release(tmp_path)
    with pytest.raises(ValueError, match="configuration is 'poems'; allowed are surreal_fantasy"):
        read(tmp_path, "poems")
    assert [p.folder for p in PublishedSource(tmp_path).parts] == [SURREAL, REFERENCE, FOLLOWING]


def test_references_of_a_row_that_is_rejected_early_are_let_go(tmp_path):
    rows = [reference_row(0, "r0.png", "r1.png"), reference_row(1, "r0.png", "r2.png")]
    members = [("r0.png", picture(1)), ("r1.png", b"no picture"), ("r2.png", picture(2)), ("00001.jpg", picture(3))]
    one_part(tmp_path, rows, members, REFERENCE)
    accepted, findings = read(tmp_path)
    assert len(accepted) == 1 and findings[0].detail.startswith("reference 2: ")


def test_a_stream_that_ends_early_is_an_error_not_a_short_archive(tmp_path, monkeypatch):
    one_part(tmp_path, [row(0), row(1)], [(f"0000{n}.jpg", picture(n, size=400)) for n in range(2)])
    source = PublishedSource(tmp_path)
    archive = tmp_path / SURREAL / "images" / "0-1.tar.gz"
    archive.write_bytes(archive.read_bytes()[:9000])  # after it was listed
    with pytest.raises(OSError, match="0-1.tar.gz: the stream ended after 9,000 of"):
        list(read_events(source))
