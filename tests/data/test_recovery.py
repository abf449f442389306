"""What decoding gives back: counted exactly for random corpora, tokenizers and mixtures; never a figure beside gzip."""

import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moe_train.data import prepare_data
from moe_train.data.build import tokenize_corpus
from moe_train.data.cache import StreamSize, TokenCache
from moe_train.data.recovery import (
    WINDOW_BYTES,
    Unrecovered,
    common_prefix,
    longest_common_subsequence,
    lost_bytes,
    unrecovered,
)
from moe_train.data.sequences import join_held_out
from moe_train.data.tokenizers import ByteTokenizer, load_tokenizer_file
from tests.data.conftest import make_documents
from tests.data.test_build import corpus_of
from tests.data.tokenizer_kinds import KINDS, MARK, words

GIVES_ALL_BACK = {"bpe, added", "bpe, special", "bpe, vocabulary", "bpe, whole words first", "bpe, merges"}
GIVES_ALL_BACK |= {"bpe, unknown is the mark", "bpe, blank first"}


def slow_lost_bytes(text, recovered):
    """The bytes of a text less those of the longest common subsequence, by the table that textbooks have."""
    left, right = text.encode(), recovered.encode()
    row = [0] * (len(right) + 1)
    for a in left:
        before = row
        row = [0]
        for place, b in enumerate(right):
            row.append(before[place] + 1 if a == b else max(before[place + 1], row[place]))
    return len(left) - row[-1]


@settings(max_examples=200, deadline=None)
@given(text=st.text("abé \n", max_size=40), recovered=st.text("abé \n", max_size=40))
def test_lost_bytes_are_those_outside_the_longest_common_subsequence(text, recovered):
    assert lost_bytes(text, recovered) == slow_lost_bytes(text, recovered)
    assert lost_bytes(text, text) == 0 and lost_bytes(text, "") == len(text.encode())


@given(left=st.binary(max_size=30), right=st.binary(max_size=30))
def test_common_prefix(left, right):
    assert common_prefix(left, right) == next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    assert longest_common_subsequence(left, left + right) == len(left)


def test_a_long_text_is_measured_by_a_window_of_what_differs():
    same = "common text " * 1000
    assert lost_bytes(same + "ÄB" + same, same + "äb" + same) == 2  # one byte of Ä, and B
    text = "Aa" * (5 * WINDOW_BYTES)
    assert lost_bytes("x" + text, "y" + text.lower().replace("a", "a")) == pytest.approx(len(text) / 2, rel=0.01)
    assert lost_bytes(text, "") == len(text)


def test_a_blank_before_a_piece_is_no_loss_and_everything_else_is():
    assert unrecovered(["text", "\nmore"], [" text", "\nmore"]) == Unrecovered(0, 0)
    assert not unrecovered([], [])
    assert unrecovered(["Text", "b"], ["text", " b"]) == Unrecovered(1, 1)
    assert unrecovered(["a.b"], ["a . b"]) == Unrecovered(1, 0)  # nothing is missing, yet the text is another
    assert unrecovered([" x"], ["x"]) == Unrecovered(1, 1)
    assert Unrecovered(1, 2) + Unrecovered(3, 4) == Unrecovered(4, 6)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (Unrecovered(15, 917), "another text for 15 of 15 documents, and 91.7% of the bytes are lost"),
        (Unrecovered(1, 0), "for 1 of 15 documents, and 0.0% of the bytes"),
        (Unrecovered(1, 1), "less than 0.1% of the bytes"),
    ],
)
def test_what_is_lost_is_said(lost, words):
    assert words in lost.describe(15, 1000 if lost.num_bytes != 1 else 10**6)


PARTS = [
    "a page ",
    "about",
    " ",
    "  ",
    "\n",
    "closes",
    "The Tag",
    MARK,
    "<eos>",
    "END",
    "[UNK]",
    "<unk>",
    "é",
    "e\u0301",
]
DOCUMENTS = st.lists(st.sampled_from([*PARTS, "ß日", "\u2581", "?", "\0"]), max_size=8).map("".join)
CORPORA = st.lists(st.lists(DOCUMENTS, min_size=1, max_size=6), min_size=1, max_size=3)


def texts_of(stream, tokenizer, raw):
    """Each document's text as the library decodes it, without the tokens that stand for unknown parts."""
    marks = np.flatnonzero(stream == tokenizer.end_of_document)
    unknown = None if raw is None else tokenizer.unknown
    for start, end in itertools.pairwise(marks):
        ids = [int(i) for i in stream[start + 1 : end] if i != unknown]
        yield tokenizer.decode(ids) if raw is None else raw.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    found = {"bytes": (None, ByteTokenizer())}
    for name, make in KINDS.items():
        make().save(str(folder / "t.json"))
        found[name] = (Tokenizer.from_file(str(folder / "t.json")), load_tokenizer_file(folder / "t.json", MARK))
    return found


@settings(max_examples=25, deadline=None)  # each opens compressors of hundreds of MB
@given(kind=st.sampled_from(["bytes", *KINDS]), mixture=CORPORA)
@example(kind="words", mixture=[["the tag </s>?", "the"], ["unknown?"]])
@example(kind="bpe, composed characters", mixture=[["e\u0301?", "é?"]])
def test_decoded_tokens_and_what_is_counted_as_lost_are_the_input(tokenizers, kind, mixture):
    """In a mixture's training text and its held-out text, document by document."""
    raw, tokenizer = tokenizers[kind]
    caches = []
    for texts in mixture:
        texts = [text + ("?" if number == 0 else "") for number, text in enumerate(texts)]  # one is held out
        with TemporaryDirectory() as folder:
            streams, reference = tokenize_corpus(corpus_of(*texts), tokenizer, Path(folder), False)
            maps = {n: np.fromfile(f"{folder}/{n}.tokens.bin", streams[n].dtype) for n in ("train", "held_out")}
        sizes = {n: StreamSize(s.tokens, s.documents, s.num_bytes, s.unrecovered) for n, s in streams.items()}
        for name, stream in streams.items():
            given_texts = [text for text in texts if ("?" in text) == (name == "held_out")]
            found = list(texts_of(maps[name], tokenizer, raw))
            assert len(found) == len(given_texts) == stream.documents
            # A blank that the encoder puts before a text is not in the text.
            pairs = [(t, f.removeprefix(" ") if f == f" {t}" else f) for t, f in zip(given_texts, found, strict=True)]
            lost = sum(slow_lost_bytes(text, recovered) for text, recovered in pairs)
            assert stream.unrecovered == Unrecovered(sum(text != f for text, f in pairs), lost)
            assert stream.num_bytes - lost <= sum(len(f.encode()) for _, f in pairs)
            assert not (kind in GIVES_ALL_BACK | {"bytes"} and stream.unrecovered)
        caches.append(TokenCache(Path(), maps["train"], maps["held_out"], sizes["train"], sizes["held_out"], reference))
    held_out = join_held_out(caches, 4, tokenizer.end_of_document)
    lost_documents = sum(cache.held_out.unrecovered.documents for cache in caches)
    assert held_out.unrecovered.documents == lost_documents
    if lost_documents:
        assert held_out.bits_per_byte(1.0) is None and not held_out.reference_bits_per_byte
        assert f"{lost_documents} of {held_out.num_documents} documents" in held_out.describe_loss()
    else:
        assert held_out.bits_per_byte(1.0) == pytest.approx(held_out.num_tokens / held_out.num_bytes / np.log(2))
        assert set(held_out.reference_bits_per_byte) == {"gzip -9", "xz -9"}


# What loses text, and what does not although it looks like it: kind, documents, whether some is lost.
LOSSES = {
    "lower case": ("bpe, lower case", "The Tag", True),
    "no capitals": ("bpe, lower case", "the tag", False),
    "decomposed characters": ("bpe, composed characters", "e\u0301 is two", True),
    "composed characters": ("bpe, composed characters", "é is one", False),
    "unknown letters": ("unigram", "the ß", True),
    "bytes for unknown letters": ("unigram, bytes", "the ß", False),
    "the sign for a blank": ("unigram", "a\u2581page", True),
    "unknown words": ("words", "the cedar", True),
    "line ends between words": ("pieces of words", "the\ntag", True),
    "known pieces": ("pieces of words", "the tag", False),
    "a blank before the text": ("bpe, blank first", "the tag", False),
    "a normalizer": ("bpe, of a normalizer", "the END", True),
}


@pytest.mark.parametrize("case", LOSSES)
def test_prepared_data_says_what_is_lost_each_time(tmp_path, write_files, make_config, capsys, case):
    kind, text, is_lost = LOSSES[case]
    KINDS[kind]().save(str(tmp_path / "t.json"))
    files = {f"{number}.txt": " ".join([text] * (number + 1)) for number in range(20)}  # different texts
    config = make_config(
        source="text",
        paths=[str(write_files(files))],
        validation_fraction=0.4,
        tokenizer=str(tmp_path / "t.json"),
        end_of_document=MARK,
    )
    for _ in range(2):  # tokenized, and from the cache
        data = prepare_data(config, sequence_length=2, seed=0, min_sequences=1, show_progress=True)
        assert bool(data.held_out.unrecovered) == is_lost
        assert (data.held_out.bits_per_byte(2.0) is None) == is_lost
        assert bool(data.held_out.reference_bits_per_byte) != is_lost
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
        assert len(warnings) == int(is_lost)
        assert not is_lost or ("20 of 20 documents" in warnings[0] and "no bits per byte" in warnings[0])
    (meta,) = (tmp_path / "cache" / "tokens").glob("*/meta.json")
    held_out = json.loads(meta.read_text())["held_out"]
    assert held_out["unrecovered"]["documents"] == (held_out["documents"] if is_lost else 0)


def test_a_long_document_is_compared_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_train.data.build.PIECE_CHARACTERS", 40)
    monkeypatch.setattr("moe_train.data.build.BATCH_CHARACTERS", 100)
    KINDS["unigram"]().save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer_file(tmp_path / "t.json", MARK)
    line = "a page about markup"
    streams, _ = tokenize_corpus(corpus_of(" ".join([line] * 20)), tokenizer, tmp_path, False)
    assert not streams["train"].unrecovered
    streams, _ = tokenize_corpus(corpus_of(" ".join([line] * 20) + "ßß"), tokenizer, tmp_path, False)
    assert streams["train"].unrecovered == Unrecovered(1, 4)


def test_a_trained_bpe_gives_any_text_back(tmp_path, write_files, make_config):
    files = {**make_documents(20), "odd.txt": f"\0 {MARK} <|endoftext|> e\u0301\r\n\u2028"}
    config = make_config(source="text", paths=[str(write_files(files))], tokenizer="bpe", bpe_vocab_size=300)
    data = prepare_data(config, sequence_length=8, seed=0, min_sequences=1)
    (meta,) = data.cache_dirs
    assert json.loads((meta / "meta.json").read_text())["train"]["unrecovered"] == {"documents": 0, "num_bytes": 0}


def test_words_lose_the_blanks_of_a_text(tmp_path):
    words().save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer_file(tmp_path / "t.json", MARK)
    texts = ["the tag", "the  tag\n"]
    recovered = tokenizer.recover_batch(tokenizer.encode_batch(texts))
    assert recovered == ["the tag", "the tag"]
