"""Numbers of a row that JSON does not have are null in the columns and files that a build writes."""

import json

import pyarrow.parquet as pq

from echo4o.dataset_scripts.build import build
from tests.dataset_scripts.layout import SURREAL, picture, write_tar


def parse(text: str):
    def fail(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=fail)


def test_metadata_and_rejected_rows_are_strict_json(tmp_path):
    source = tmp_path / "source"
    write_tar(source / SURREAL / "0.tar", [("0.png", picture(0))], "w")
    numbers = '"score":NaN,"more":{"a":[Infinity,-Infinity,1e999,1.5]}'
    (source / SURREAL / "rows.jsonl").write_text(
        f'{{"instruction":"a","output_image":"0.png","type":"x",{numbers}}}\n'
        f'{{"instruction":"b","output_image":"no.png","type":"x",{numbers}}}\n'
    )
    build(str(source), tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("*.parquet")
    metadata = parse(pq.read_table(file).to_pylist()[0]["metadata"])
    expected = {"score": None, "more": {"a": [None, None, None, 1.5]}}
    assert metadata["row"] == expected
    rejected = parse((tmp_path / "out" / "rejected.jsonl").read_text("utf-8"))
    assert {key: rejected["row"][key] for key in expected} == expected
