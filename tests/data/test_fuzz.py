"""Data files of random bytes and mutated good ones: documents, or one message that names the file."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from moe_train.config.errors import UsageError
from moe_train.data import prepare_data
from moe_train.data.files import CorpusFile
from moe_train.data.readers import READERS

ROWS = [{"text": f"row {i} Größe", "meta": {"a": [i, None]}} for i in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=16)
    return file.getvalue()


GOOD = {
    "lines": LINES,
    "list": json.dumps(ROWS).encode(),
    "utf-16": LINES.decode().encode("utf-16"),
    "gzip": gzip.compress(LINES, mtime=0),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "zstd": zstd.compress(LINES),
    "parquet": parquet_bytes(),
}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file with bytes changed, cut out, put in, or its end missing."""
    data = bytearray(GOOD[draw(st.sampled_from(sorted(GOOD)))])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if change == "set" and data:
            data[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif change == "insert":
            data[place:place] = draw(st.binary(max_size=40))
        else:
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=300), mutated()), name=st.sampled_from(["a.jsonl", "a.json", "a.gz", "a"]))
def test_a_reader_gives_text_or_names_the_file(tmp_path, kind, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    try:
        documents = list(READERS[kind](CorpusFile(path, name), "text"))
    except UsageError as error:
        message = str(error)
        assert message.startswith(str(path))
        assert len(message) < 1000
    else:
        for _, text in documents:
            text.encode("utf-8")


BAD = {
    "random.jsonl": bytes(range(256)) * 4,
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep.json": b"[" * 100_000,
    "short.jsonl.gz": gzip.compress(LINES, mtime=0)[:-20],
    "short.jsonl.zst": zstd.compress(LINES)[:-20],
    "latin.jsonl": '{"text": "Größe"}'.encode("latin-1"),
    "half.jsonl": LINES.decode().encode("utf-16")[:-1],
    "short.parquet": GOOD["parquet"][:-50],
    "middle.parquet": GOOD["parquet"][:20] + b"\xff" * 80 + GOOD["parquet"][100:],
    "packed.parquet.gz": gzip.compress(GOOD["parquet"], mtime=0),
    "empty.parquet": b"",
    "latin.txt": "Größe".encode("latin-1"),
    "list.jsonl": b'["text"]',
    "number.json": b"7",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_message_before_training(write_files, make_config, name):
    folder = write_files({name: BAD[name]})
    kind = {"parquet": "parquet", "txt": "text"}.get(name.split(".")[1], "jsonl")
    config = make_config(source=kind, paths=[str(folder / name)])
    with pytest.raises(UsageError, match=rf"{folder / name}[:\s]") as caught:
        prepare_data(config, sequence_length=16, seed=0, min_sequences=1)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0), zstd.compress(b"")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_file_without_text_is_too_small(write_files, make_config, name, content):
    config = make_config(source="text" if name == "a.txt" else "jsonl", paths=[str(write_files({name: content}))])
    with pytest.raises(UsageError, match=r"data\.paths \(.*\) has 0 sequences"):
        prepare_data(config, sequence_length=16, seed=0, min_sequences=1)


def test_a_huge_line_is_read_and_one_beyond_the_bound_is_named(write_files, monkeypatch):
    path = write_files({"a.jsonl": json.dumps({"text": "x" * 5_000_000}) + "\n"}) / "a.jsonl"
    assert [len(text) for _, text in READERS["jsonl"](CorpusFile(path, "a.jsonl"), "text")] == [5_000_000]
    monkeypatch.setattr("moe_train.data.readers.MOST_LINE_BYTES", 2**20)
    with pytest.raises(UsageError, match=r"a\.jsonl:1: a line of .* GiB or more: not JSON lines"):
        list(READERS["jsonl"](CorpusFile(path, "a.jsonl"), "text"))
