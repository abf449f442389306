"""Packed files and encodings: found by the first bytes, in named files and in folders, whole or damaged."""

import bz2
import codecs
import gzip
import json
import lzma
from functools import partial

import pytest
from backports import zstd
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.data import prepare_data
from moe_train.data.opening import encoding_of, packing_of
from tests.data.test_readers import read

TEXTS = [f"document {i} Größe 日本語" for i in range(300)]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: 1}),
}
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_packed_files_in_any_encoding_are_what_they_were(write_files, suffix, encoding):
    packed = {f"a.jsonl{suffix}": PACK[suffix](LINES.encode(encoding)), "a.txt": PACK[suffix](LINES.encode(encoding))}
    folder = write_files(packed)
    assert [text for _, text in read("jsonl", folder / f"a.jsonl{suffix}")] == TEXTS
    assert read("text", folder / "a.txt") == [("a.txt", LINES)]  # the name does not say that it is packed


@pytest.mark.parametrize("suffix", PACK)
def test_files_of_several_parts_are_read_to_the_end(write_files, suffix):
    data = LINES.encode()
    parts = PACK[suffix](data[:1000]) + PACK[suffix](data[1000:])
    folder = write_files({"a.jsonl": SKIPPABLE_FRAME + parts if suffix == ".zst" else parts})
    assert [text for _, text in read("jsonl", folder / "a.jsonl")] == TEXTS


def test_zstd_with_a_long_window_is_read(write_files):
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    folder = write_files({"a.jsonl.zst": compressor.compress(LINES.encode()) + compressor.flush()})
    assert len(read("jsonl", folder / "a.jsonl.zst")) == len(TEXTS)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_file_that_is_cut_short_or_damaged_is_named(write_files, suffix, kind):
    packed = PACK[suffix](LINES.encode())
    middle = len(packed) // 2
    folder = write_files({"short": packed[:middle], "bad": packed[:middle] + bytes(8) + packed[middle + 8 :]})
    for name in ("short", "bad"):
        with pytest.raises(UsageError, match=rf"{name}(:\d+)?: "):
            read(kind, folder / name)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_no_text_behind_the_first_stream_is_lost_silently(write_files, suffix, kind):
    first, second = (PACK[suffix](part) for part in (LINES.encode()[:5000], LINES.encode()[5000:]))
    flipped = [second[:i] + bytes([second[i] ^ 1]) + second[i + 1 :] for i in range(3)]
    behind = [*flipped, b"\n", b"words", second[:3], bytes(8) + flipped[0], b"\0" * 100_000 + b"x"]
    for number, rest in enumerate(behind):
        path = write_files({f"{number}.txt": first + rest}) / f"{number}.txt"
        with pytest.raises(UsageError, match=rf"{number}\.txt: (cannot be unpacked|is damaged)"):
            read(kind, path)


def test_zeros_between_and_behind_xz_streams_are_padding(write_files):
    data = LINES.encode()
    packed = lzma.compress(data[:5000]) + bytes(200_000) + lzma.compress(data[5000:]) + bytes(8)
    assert read("text", write_files({"a.txt": packed}) / "a.txt") == [("a.txt", LINES)]


@pytest.mark.parametrize("suffix", PACK)
def test_many_short_and_empty_streams_are_read_whole(write_files, suffix):
    parts = [*(text.encode() for text in TEXTS), b"", b"", b"x" * 300_000]
    path = write_files({"a.txt": b"".join(PACK[suffix](part) for part in parts)}) / "a.txt"
    assert read("text", path) == [("a.txt", b"".join(parts).decode())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(50), "is a zip archive"),
        (b"PAR1" + bytes(50), "is a Parquet file"),
        (bytes(257) + b"ustar" + bytes(250), "is a tar archive"),
        (gzip.compress(b"x" * 257 + b"ustar" + bytes(250), mtime=0), "is a tar archive"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"\x04\x22\x4d\x18" + bytes(20), "is an lz4 file"),
    ],
)
def test_other_formats_are_called_by_their_name(write_files, content, message):
    path = write_files({"a.jsonl": content}) / "a.jsonl"
    for kind in ("jsonl", "text"):
        with pytest.raises(UsageError, match=f"a.jsonl: {message}"):
            read(kind, path)


def test_utf16_without_a_mark_is_no_utf8_with_zeros(write_files):
    for encoding in ("utf-16-le", "utf-16-be"):
        path = write_files({"a.txt": "plain words\n".encode(encoding)}) / "a.txt"
        assert read("text", path) == [("a.txt", "plain words\n")]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_an_encoding_that_was_guessed_is_called_a_guess(write_files, kind):
    path = write_files({"a.txt": "a\0b\0c\0d\0 ok", "b.txt": codecs.BOM_UTF16_LE + b"a\0b"})
    with pytest.raises(UsageError, match=r"a\.txt(:1)?: not UTF-16-LE .*the encoding is a guess: .*Save it as UTF-8"):
        read(kind, path / "a.txt")
    with pytest.raises(UsageError, match=r"b\.txt(:1)?: not UTF-16-LE [^;]*$"):
        read(kind, path / "b.txt")


def test_a_text_is_not_taken_for_a_packed_file(write_files):
    text = "BZh9 is how a bzip2 file begins"
    assert read("text", write_files({"a.txt": text}) / "a.txt") == [("a.txt", text)]


@given(text=st.text(min_size=1, max_size=200), encoding=st.sampled_from(["utf-16", "utf-32", "utf-8-sig"]))
def test_a_mark_decides_the_encoding(text, encoding):
    assume(encoding != "utf-16" or text[0] != "\0")  # these are the bytes of UTF-32's mark, which is far more likely
    data = text.encode(encoding)
    found, mark_bytes = encoding_of(data)
    assert data[mark_bytes:].decode(found) == text


@given(text=st.text(alphabet=st.characters(blacklist_characters="\x00", blacklist_categories=("Cs",)), max_size=300))
def test_text_without_zeros_is_utf8(text):
    if not text.startswith("\ufeff"):
        assert encoding_of(text.encode()) == ("utf-8", 0)
    assert packing_of(text.encode()) is None


@pytest.mark.parametrize(
    "name", ["list.json", "list.json.gz", "pretty.json", "object.json", "lines.json", "lines.ndjson"]
)
def test_a_json_file_is_lines_a_list_or_an_object(write_files, name):
    rows = [{"text": f"one {i} " * 900} for i in range(3)]
    content = {
        "list": json.dumps(rows),
        "pretty": json.dumps(rows, indent=2),
        "object": json.dumps(rows[0], indent=1),
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
    }[name.split(".")[0]].encode()
    path = write_files({name: gzip.compress(content) if name.endswith(".gz") else content}) / name
    texts = [text for _, text in read("jsonl", path)]
    assert texts == [row["text"] for row in (rows[:1] if name == "object.json" else rows)]


def test_a_row_of_a_list_is_named(write_files):
    path = write_files({"a.json": json.dumps([{"text": "a"}, {"body": "b"}])}) / "a.json"
    with pytest.raises(UsageError, match=r"a\.json: row 1: no column 'text' \(text_column\); the columns are body"):
        read("jsonl", path)


def test_a_folder_of_every_form_is_read_whole(write_files, make_config, capfd):
    files: dict[str, str | bytes] = {f"{i}.jsonl{suffix}": b"" for i, suffix in enumerate(("", *PACK))}
    for i, name in enumerate(list(files)):
        lines = "".join(json.dumps({"text": f"file {i} row {row} with words"}) + "\n" for row in range(20)).encode()
        suffix = name.partition(".jsonl")[2]
        files[name] = PACK[suffix](lines) if suffix else lines
    files |= {"X.JSONL": '{"text": "a row in capitals"}', "y.ndjson": '{"text": "a row"}', "z.csv": "1,2"}
    config = make_config(source="jsonl", paths=[str(write_files(files))], validation_fraction=0.1)
    data = prepare_data(config, sequence_length=16, seed=0, min_sequences=4)
    said = capfd.readouterr().err
    assert "7 files taken, 1 left out: 1 without an ending of this source" in said
    assert sum(source.documents for source in data.sources) == 102
