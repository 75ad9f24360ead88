"""`echo4o push`: pickles, secrets, links and folders that do not load are not uploaded."""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from echo4o.hub import safety, secrets
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from tests.push_fixtures import FAKE, REPO, send

pytest_plugins = ["tests.push_fixtures"]


def refused(folder, api, hub, match: str, **options) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        send(folder, api, **options)
    assert not hub.repos and not [r for r in hub.requests if r[0] not in ("GET", "HEAD")], "something was sent"
    return str(caught.value)


@pytest.mark.parametrize("how", ["suffix", "protocol 0", "protocol 2", "protocol 5", "torch.save"])
def test_pickles_are_refused_by_name_and_by_content(how, folder, hub, api):
    file = folder / "transformer" / ("old.bin" if how == "suffix" else "notes.txt")
    if how == "torch.save":
        torch.save({"w": torch.zeros(2)}, file)
    elif how == "suffix":
        file.write_bytes(b"anything")
    else:
        large = b"x" * 2_000_000 if how != "protocol 0" else b""
        file.write_bytes(pickle.dumps([Path("x"), large], protocol=int(how[-1])))
    refused(folder, api, hub, rf"pickles can run code.*transformer/{file.name}")


def test_a_broken_archive_is_refused_by_name(folder, api, hub):
    (folder / "notes.txt").write_bytes(b"PK\x03\x04 and no more")
    refused(folder, api, hub, "notes.txt starts like a zip archive")


def test_text_that_ends_with_a_dot_is_not_a_pickle(tmp_path):
    for number, text in enumerate(["It is a text.", "(a) and (b).", "I1\n.", "", ".", "c\nd."]):
        (tmp_path / f"{number}.txt").write_text(text)
    safety.require_safe(safety.list_files(tmp_path))


@pytest.mark.parametrize("what", FAKE)
def test_secrets_are_named_by_place_and_never_shown(what, folder, hub, api):
    (folder / "notes.md").write_text(f"first\n\nkey: {FAKE[what]} and more\n")
    said = refused(folder, api, hub, rf"notes\.md, line 3: {what}")
    assert FAKE[what] not in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_secrets_are_found_in_every_encoding_of_text(encoding, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_CHUNK", chunk)
    monkeypatch.setattr(secrets, "_LONGEST", 400)
    text = "first\r\n" + "ä" * 40 + "\r\nHF_TOKEN=" + FAKE["a Hugging Face token"] + "\r\nlast"
    (tmp_path / "n.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="n.txt, line 3: a Hugging Face token") as caught:
        safety.require_safe(safety.list_files(tmp_path))
    assert FAKE["a Hugging Face token"] not in str(caught.value)
    assert str(caught.value).count("line 3") == 1


OLD_AZURE = [
    'AZURE_OPENAI_API_KEY = "' + "0a1b2c3d" * 4 + '"',
    "api-key: " + "0A1b2c3d" * 4,
    "AccountName=x;Account" + "Key=" + "aB3+" * 21 + "aB==",
    "secret abc8Q~" + "aB3." * 8 + "x",
]


@pytest.mark.parametrize("text", OLD_AZURE)
def test_azure_keys_of_every_kind(text, tmp_path):
    (tmp_path / "n.env.txt").write_text(text)
    with pytest.raises(ValueError, match="line 1: an Azure key"):
        safety.require_safe(safety.list_files(tmp_path))


def archives_of(name: str, data: bytes) -> dict[str, bytes]:
    """Archives that hold the file, by their names."""
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    packed = {f"a.tar.{kind.__name__}": kind.compress(tarred.getvalue()) for kind in (gzip, bz2, lzma)}
    return packed | {"a.zip": zipped.getvalue(), "a.tar": tarred.getvalue(), "a.dat": zipped.getvalue()}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_secrets_are_found_in_archives(encoding, tmp_path):
    text = ("a\n" * 9 + "key=" + FAKE["a Google API key"] + "\n").encode(encoding)
    files = archives_of("in/k.txt", text)
    files["two.zip"] = archives_of("a.tgz", archives_of("in/k.txt", text)["a.tar.gzip"])["a.zip"]
    files["k.txt.gz"] = gzip.compress(text)
    for name, data in files.items():
        assert list(secrets.find_secrets(name, data)) == [
            (f"{'' if name == 'k.txt.gz' else 'a.tgz, in/k.txt, ' if name == 'two.zip' else 'in/k.txt, '}line 10",
             "a Google API key")
        ], name  # fmt: skip
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"a.tar, in/k.txt, line 10") as caught:
        safety.require_safe(safety.list_files(tmp_path))
    assert len(str(caught.value).splitlines()) == 1 + len(files)


def test_archives_that_are_damaged_or_encrypted(tmp_path):
    gz = gzip.compress(b"harmless " * 1000)
    (tmp_path / "half.gz").write_bytes(gz[: len(gz) // 2])
    (tmp_path / "n.txt").write_bytes(b"BZh no archive, PK neither; AIza is a word, api-key: none")
    safety.require_safe(safety.list_files(tmp_path))
    data = bytearray(archives_of("k.txt", b"x")["a.zip"])
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    assert list(secrets.find_secrets("a.zip", bytes(data))) == [
        ("k.txt", "an encrypted file, which cannot be searched for secrets")
    ]


def test_secrets_are_found_in_columns_of_every_type_and_in_metadata(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = FAKE["a Hugging Face token"]
    texts = ["none", f"key {secret}"]
    columns = {
        "large": pa.array(texts, pa.large_string()),
        "bytes": pa.array([text.encode() for text in texts]),
        "dictionary": pa.array(texts).dictionary_encode(),
        "list": pa.array([[text] for text in texts]),
        "large list": pa.array([[text] for text in texts], pa.large_list(pa.string())),
        "struct": pa.array([{"a": {"b": text}} for text in texts]),
        "map": pa.array([[("a", text)] for text in texts], pa.map_(pa.string(), pa.string())),
        "images": pa.array([[{"bytes": text.encode(), "path": None}] for text in texts]),
        "null": pa.nulls(2),
        "numbers": pa.array([[1], None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = list(secrets.find_secrets("a.parquet", tmp_path / "a.parquet"))
    assert found == [(f"row 1, column {name}", "a Hugging Face token") for name in list(columns)[:8]]
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"note": secret}), tmp_path / "b.parquet")
    assert list(secrets.find_secrets("b.parquet", tmp_path / "b.parquet")) == [("line 1", "a Hugging Face token")]


@pytest.mark.parametrize("form", ["stream", "file", "lz4", "headless", "cut"])
def test_secrets_are_found_in_arrow_files(form, tmp_path):
    """Of both formats, also compressed; the bytes of a damaged file are searched."""
    import pyarrow as pa

    secret, path = FAKE["a Hugging Face token"], tmp_path / "data.arrow"
    table = pa.table({"id": ["a", "b"], "text": ["none " * 50, f"{'none ' * 50} {secret} {'none ' * 50}"]})
    table = table.replace_schema_metadata({"note": secret})
    options = pa.ipc.IpcWriteOptions(compression="lz4" if form == "lz4" else None)
    new = pa.ipc.new_stream if form in ("stream", "cut") else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    if form in ("headless", "cut"):
        path.write_bytes(path.read_bytes()[8:] if form == "headless" else path.read_bytes()[:-200])
    found = list(secrets.find_secrets("data.arrow", path))
    assert {what for _, what in found} == {"a Hugging Face token"}
    if form not in ("headless", "cut"):
        assert [place for place, _ in found] == ["line 1", "row 1, column text"]


def png_with(chunk: str, secret: str) -> bytes:
    """A PNG image whose text holds the secret compressed."""
    texts, stream = PngInfo(), io.BytesIO()
    if chunk == "zTXt":
        texts.add_text("note", f"{'none ' * 50}{secret}", zip=True)
    else:
        texts.add_itxt("note", f"{'none ' * 50}{secret}", "en", "Notiz", zip=True)
    Image.new("RGB", (4, 4), "red").save(stream, "PNG", pnginfo=texts)
    assert chunk.encode() in stream.getvalue() and secret.encode() not in stream.getvalue()
    return stream.getvalue()


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt"])
def test_secrets_are_found_in_compressed_texts_of_images(chunk, tmp_path):
    """In a file, in an archive and in a row; a truncated image raises no error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret, kind = FAKE["a Hugging Face token"], "a Hugging Face token"
    image = png_with(chunk, secret)
    assert list(secrets.find_secrets("a.png", image)) == [("a compressed text", kind)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in.png", image)
    assert list(secrets.find_secrets("a.zip", tmp_path / "a.zip")) == [("in.png, a compressed text", kind)]
    pq.write_table(pa.table({"image": [{"bytes": image}]}), tmp_path / "a.parquet")
    assert list(secrets.find_secrets("a.parquet", tmp_path / "a.parquet")) == [("row 0, column image", kind)]
    place = image.index(chunk.encode())
    assert list(secrets.find_secrets("a.png", image[: place + 6])) == []


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


def test_compressed_texts_are_searched_up_to_a_limit_which_is_named():
    """Also a colour profile, and what precedes damage."""
    secret, kind = FAKE["a Hugging Face token"].encode(), "a Hugging Face token"
    long = "a compressed text that is too long to be searched for secrets"

    def found(*chunks):
        return [what for _, what in secrets.find_secrets("a.png", png_of_chunks(*chunks))]

    text = zlib.compress(b"none " * 100 + secret + b" none" * 100)
    assert found((b"iCCP", b"name\0\0" + text)) == [kind]
    assert found((b"zTXt", b"name\0\0" + text[:-4] + bytes(4))) == [kind]  # a wrong checksum
    bomb = (b"zTXt", b"name\0\0" + zlib.compress(bytes(3 << 20)))
    assert found(*[bomb] * 200) == [long]
    assert found((b"zTXt", b"name\0\0" + zlib.compress(b" " * (3 << 20) + secret))) == [long]
    many = [(b"zTXt", b"name\0\0" + zlib.compress(bytes(1 << 19)))] * 5
    assert found(*many) == [long] and found(*many[:3]) == []


def test_secrets_are_found_in_arrow_types_of_every_kind_and_in_names(tmp_path):
    import pyarrow as pa

    secret, kind = FAKE["a Hugging Face token"], "a Hugging Face token"
    arrays = {
        "view": pa.array([f"key {secret}"], pa.string_view()),
        "bytes": pa.array([secret.encode()], pa.binary_view()),
        "fixed": pa.array([secret.encode()], pa.binary(len(secret))),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array([f'{{"a": "{secret}"}}'])),
        secret: pa.array([1]),
    }
    for number, (name, array) in enumerate(arrays.items()):
        path = tmp_path / f"{number}.arrow"
        table = pa.table({name: array})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        found = list(secrets.find_secrets(path.name, path))
        assert {what for _, what in found} == {kind}, name


def test_secrets_are_found_in_names_and_comments(tmp_path):
    secret, kind = FAKE["a Hugging Face token"], "a Hugging Face token"
    for name, data in archives_of(f"{secret}.txt", b"x").items():
        assert list(secrets.find_secrets(name, data)) == [("a member's name", kind)], name
    assert list(secrets.find_secrets(f"in/{secret}.txt", b"x")) == [("its name", kind)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.comment = secret.encode()
    assert list(secrets.find_secrets("a.zip", tmp_path / "a.zip")) == [("its comment, line 1", kind)]


@pytest.mark.parametrize("start", [b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07\x01\x00", b"\x28\xb5\x2f\xfd"])
def test_archives_that_cannot_be_searched_are_refused(start, tmp_path):
    (tmp_path / "a.dat").write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match="a.dat, the whole file: an archive of a kind that cannot be searched"):
        safety.require_safe(safety.list_files(tmp_path))


def test_secrets_are_found_across_chunks_in_headers_and_in_rows(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = FAKE["a Hugging Face token"]
    monkeypatch.setattr(secrets, "_CHUNK", 64)
    monkeypatch.setattr(secrets, "_LONGEST", 50)
    (tmp_path / "a.txt").write_text("line\n" * 20 + "." * 37 + " " + secret + "\n" + "x" * 300)
    save_file({"w": torch.zeros(1)}, tmp_path / "b.safetensors", {"note": secret})
    pq.write_table(pa.table({"id": ["a", "b"], "metadata": ["{}", f"key {secret}"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError) as caught:
        safety.require_safe(safety.list_files(tmp_path))
    said = str(caught.value).splitlines()[1:]
    places = ["a.txt, line 21", "b.safetensors, line 1", "c.parquet, row 1, column metadata"]
    assert [line.strip() for line in dict.fromkeys(said)] == [f"{place}: a Hugging Face token" for place in places]
    assert secret not in str(caught.value)


def test_a_secret_in_a_handwritten_card_of_the_repository_stays_there(folder, hub, api):
    hub.create(REPO).files["README.md"] = hub.store("README.md", f"mine {FAKE['a GitHub token']}\n".encode())
    hub.repo(REPO).commit("words")
    with pytest.raises(ValueError, match=r"README.md, line \d+: a GitHub token"):
        send(folder, api)


def test_links_that_lead_outside_and_hidden_files(folder, hub, api, tmp_path):
    (folder / ".env").write_text("PASSWORD=x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    messages = []
    assert not any(part.startswith(".") for part in send(folder, api, dry_run=True, log=messages.append).upload)
    assert "2 hidden files and caches are not uploaded" in messages
    (folder / "inside.txt").symlink_to(folder / "model_index.json")
    assert "inside.txt" in send(folder, api, dry_run=True).upload
    (tmp_path / "private.txt").write_text("mine")
    (folder / "outside.txt").symlink_to(tmp_path / "private.txt")
    refused(folder, api, hub, "outside.txt is a link to a file outside")
    (folder / "outside.txt").unlink()
    (folder / "outside").symlink_to(tmp_path)
    refused(folder, api, hub, "outside is a link to a file outside")


def test_folders_that_do_not_load(folder, hub, api):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "proj_in.bias"}, file)
    refused(folder, api, hub, "transformer: missing proj_in.bias")
    save_file(tensors, file)
    (folder / "transformer" / "transformer_bagel.py").unlink()
    refused(folder, api, hub, "lacks transformer/transformer_bagel.py, so it would not load with trust_remote")


def test_large_weights_are_compared_without_being_loaded(folder, api, monkeypatch):
    monkeypatch.setattr("echo4o.hub.kinds.pipeline.SMALL_BYTES", 10)
    monkeypatch.setattr("echo4o.hub.push.SMALL_BYTES", 10)
    monkeypatch.setattr(Echo4oPipeline, "from_pretrained", None)
    done = send(folder, api, verify=True)
    assert "too large to load here" in done.checked and done.verified.endswith("too large to download and load")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() > 1)
    save_file(tensors | {name: tensors[name].reshape(-1).clone()}, file)
    with pytest.raises(ValueError, match=f"vae: {name} has the shape"):
        send(folder, api)
    save_file({n: t for n, t in tensors.items() if n != name} | {"other": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=f"vae: missing {name}\n  vae: unexpected other"):
        send(folder, api)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "ns/..", "ns/two words", "ns/name.git", ""])
def test_bad_names(repo, folder, hub, api):
    refused(folder, api, hub, "repo", repo=repo)


def test_a_card_that_does_not_validate(folder, hub, api):
    (folder / "README.md").write_text("---\nlicence: mit\n---\n\nMy words.\n")
    refused(folder, api, hub, "README.md is not a valid card of this pipeline:\n  licence: unknown key")
