"""File formats, and what is said of files that are not what they should be."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from moe_train.config.errors import UsageError
from moe_train.data.files import CorpusFile
from moe_train.data.readers import READERS


def read(kind: str, path: Path, column: str = "text") -> list[tuple[str, str]]:
    return list(READERS[kind](CorpusFile(path, path.name), column))


def test_text_is_kept_byte_for_byte_but_for_its_byte_order_mark(write_files):
    text = "one\r\ntwo\x00\tGröße\u2028\ufeff\n"
    folder = write_files({"a.txt": text, "marked.txt": f"\ufeff{text}"})
    assert [read("text", folder / name)[0][1] for name in ("a.txt", "marked.txt")] == [text, text]


def test_text_that_is_not_utf8_names_file_and_byte(write_files):
    path = write_files({"a.txt": b"caf\xe9 au lait"}) / "a.txt"
    with pytest.raises(UsageError, match=f"{path}: not UTF-8 at byte 3"):
        read("text", path)
    assert read("python_stdlib", path) == []  # CPython keeps a few such files on purpose
    with pytest.raises(UsageError, match=r"missing\.txt: cannot be read: No such file"):
        read("text", path.with_name("missing.txt"))


def test_jsonl_gives_a_document_a_line(write_files):
    lines = '\ufeff{"text": "one\\n", "id": 1}\n\n{"text": "zwö", "id": 2}\r\n{"text": ""}'
    path = write_files({"a.jsonl": lines}) / "a.jsonl"
    assert read("jsonl", path) == [("a.jsonl:0", "one\n"), ("a.jsonl:1", "zwö"), ("a.jsonl:2", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r":2: not valid JSON: Expecting ',' delimiter at character 12"),
        (b'{"text": 7}', r":2: column 'text' is int, not a string"),
        (b'{"text": null}', r":2: column 'text' is null, not a string"),
        (b'{"body": "a", "id": 1}', r":2: no column 'text' \(text_column\); the columns are body, id"),
        (b'["a"]', r":2: a JSON list, not an object with a 'text' key"),
        (b'{"text": "\xff"}', r":2: not UTF-8 at byte 25"),
        (b'{"text": "\\ud800"}', r":2: column 'text' holds half of a surrogate pair at character 0"),
        (b'{"text": ' + b"9" * 5000 + b"}", r":2: JSON that cannot be read"),
        (b"[" * 200_000, r":2: JSON that cannot be read"),
    ],
)
def test_a_bad_line_is_named(write_files, line, message):
    path = write_files({"a.jsonl": b'{"text": "ok"}\n' + line + b"\n"}) / "a.jsonl"
    with pytest.raises(UsageError, match=f"a.jsonl{message}"):
        read("jsonl", path)


def test_parquet_gives_a_document_a_row(tmp_path):
    texts = [f"document {i} ß" for i in range(700)]  # several batches, several row groups
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(700), "body": texts}), path, row_group_size=300)
    assert read("parquet", path, "body") == [(f"a.parquet:{i}", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_reads_every_kind_of_string(tmp_path, kind):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).cast(kind)}), path)
    assert [text for _, text in read("parquet", path)] == ["a", "b", "a"]


def test_bad_parquet_is_named(tmp_path, write_files):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", None]}), path)
    with pytest.raises(UsageError, match=r"a.parquet: no column 'body' \(text_column\); the columns are id, text"):
        read("parquet", path, "body")
    with pytest.raises(UsageError, match=r"a.parquet: row 0: column 'id' is int, not a string"):
        read("parquet", path, "id")
    with pytest.raises(UsageError, match=r"a.parquet: row 1: column 'text' is null, not a string"):
        read("parquet", path)
    broken = write_files({"b.parquet": json.dumps({"text": "a"})}) / "b.parquet"
    with pytest.raises(UsageError, match=r"b\.parquet: cannot be read as Parquet"):
        read("parquet", broken)
