"""The pass over a corpus: token layout, batches, cuts of long documents, reference compressions."""

import gzip
import itertools
import lzma
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data import build
from moe_train.data.build import TOKEN_FILES, ReferenceCompression, cut, groups, tokenize_corpus
from moe_train.data.corpus import Document
from moe_train.data.tokenizers import ByteTokenizer


@dataclass(frozen=True)
class FixedCorpus:
    """A corpus of given documents."""

    found: tuple[Document, ...]
    description: str = "fixed"
    size_bytes: int = 100

    def fingerprint(self, digest_files: object) -> str:
        return "fixed"

    def documents(self) -> Iterator[Document]:
        return iter(self.found)


def corpus_of(*texts: str) -> FixedCorpus:
    """A corpus in which texts with a question mark are held out."""
    return FixedCorpus(tuple(Document(str(i), text, "?" in text) for i, text in enumerate(texts)))


def read_tokens(folder, name):
    return np.fromfile(folder / TOKEN_FILES[name], dtype=np.uint16).tolist()


def test_a_mark_begins_the_stream_and_follows_every_document(tmp_path):
    streams, reference = tokenize_corpus(corpus_of("ab", "c?", "", "ß"), ByteTokenizer(), tmp_path, False)
    assert read_tokens(tmp_path, "train") == [256, 97, 98, 256, 256, 0xC3, 0x9F, 256]
    assert read_tokens(tmp_path, "held_out") == [256, 99, 63, 256]
    train, held_out = streams["train"], streams["held_out"]
    assert (train.tokens, train.documents, train.num_bytes, train.dtype) == (8, 3, 4, "uint16")
    assert (held_out.tokens, held_out.documents, held_out.num_bytes) == (4, 1, 2)
    assert set(reference) == {"gzip -9", "xz -9"}


def test_nothing_held_out_is_an_empty_stream_without_references(tmp_path):
    streams, reference = tokenize_corpus(corpus_of("ab"), ByteTokenizer(), tmp_path, False)
    assert (read_tokens(tmp_path, "held_out"), streams["held_out"].tokens, reference) == ([], 0, {})


def test_small_batches_and_cut_documents_give_the_same_stream(tmp_path, monkeypatch):
    texts = [f"line {i}\n" * (i % 7) + ("?" if i % 5 == 0 else "") for i in range(60)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    tokenize_corpus(corpus_of(*texts), ByteTokenizer(), tmp_path / "whole", False)
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 30)
    monkeypatch.setattr(build, "PIECE_CHARACTERS", 8)
    tokenize_corpus(corpus_of(*texts), ByteTokenizer(), tmp_path / "parts", False)
    for name in TOKEN_FILES:
        assert read_tokens(tmp_path / "whole", name) == read_tokens(tmp_path / "parts", name)


def test_groups_are_bounded_and_keep_every_document(monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 10)
    documents = list(corpus_of("a" * 4, "b" * 6, "c", "d" * 25, "e" * 9, "").found)
    found = list(groups(documents, lambda document: len(document.text)))
    assert [[len(d.text) for d in group] for group in found] == [[4, 6], [1], [25], [9, 0]]
    assert [d for group in found for d in group] == documents


@given(text=st.text(alphabet="ab\n", max_size=200))
def test_cuts_lose_nothing_and_prefer_line_ends(text):
    pieces = cut(text, 16)
    assert "".join(pieces) == text
    assert all(len(piece) <= 16 for piece in pieces)
    for piece, following in itertools.pairwise(pieces):
        assert following.startswith("\n") or "\n" not in (piece + following[:1])[8:16]


def test_a_long_document_is_encoded_in_groups_of_pieces(tmp_path, monkeypatch):
    sizes: list[int] = []
    encode = ByteTokenizer.encode_batch
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 30)
    monkeypatch.setattr(build, "PIECE_CHARACTERS", 8)
    monkeypatch.setattr(
        ByteTokenizer, "encode_batch", lambda self, texts: (sizes.append(sum(map(len, texts))), encode(self, texts))[1]
    )
    tokenize_corpus(corpus_of("a" * 1000), ByteTokenizer(), tmp_path, False)
    assert sum(sizes) == 1000
    assert max(sizes) <= 30


def test_the_reference_of_xz_remembers_more_than_its_default_does():
    """Preset 9 finds a repetition 9 MB back, preset 6 forgets after 8."""
    noise = np.random.default_rng(0).bytes(2**16)
    reference = ReferenceCompression()
    for text in (noise, bytes(9 * 2**20), noise):
        reference.feed(text)
    compressed_bytes = reference.bits_per_byte()["xz -9"] * reference.num_bytes / 8
    assert len(noise) < compressed_bytes < 1.5 * len(noise)


def test_references_are_what_the_compressors_reach_on_all_documents_together():
    texts = [f"document {i} of the held-out text, ".encode() * 5 for i in range(50)]
    reference = ReferenceCompression()
    for text in texts:
        reference.feed(text)
    whole = b"".join(texts)
    assert reference.bits_per_byte() == {
        "gzip -9": 8 * len(gzip.compress(whole, 9)) / len(whole),
        "xz -9": 8 * len(lzma.compress(whole, preset=9)) / len(whole),
    }
