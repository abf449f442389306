"""Index of a corpus: a hash of each document's text and whether it is held out, found in one pass without a tokenizer.

It says which documents of other sources have the text of a held-out one, and what changed between two runs.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from moe_train.data.corpus import Corpus, Document, HeldOutSplit
from moe_train.data.folders import write_json

INDEX_VERSION = 2
META_FILE, HASHES_FILE, HELD_OUT_FILE = "meta.json", "hashes.npy", "held_out.npy"
NO_TEXT = 0  # hash of a document without text, which says nothing about held-out text
SKETCH_HASHES = 1024  # hashes in a sketch: it is exact up to so many texts; counts of more have an error of about 3%


@dataclass(frozen=True)
class InnerCut:
    """Cut inside a document, whose end is held out because no whole document can be.

    Attributes:
        document: Number of the document in the corpus, from 0.
        characters: Characters before the cut.
        whole_hash: `text_hash` of the whole document; a copy of it has the held-out end too.
    """

    document: int
    characters: int
    whole_hash: int

    def documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Cut the document in two. All others are trained on."""
        for number, document in enumerate(documents):
            if number != self.document:
                yield Document(document.name, document.text, False)
                continue
            yield Document(document.name, document.text[: self.characters], False)
            yield Document(f"{document.name} (end)", document.text[self.characters :], True)


@dataclass(frozen=True)
class DocumentIndex:
    """Index of the documents of a corpus, in its order; a document that is cut counts as two.

    Attributes:
        hashes: uint64 [documents], `text_hash` of each text.
        is_held_out: bool [documents].
        digest: Digest of all texts, their order and what is held out.
        sketch: Smallest distinct hashes, in order.
        cut: Cut inside a document; None where whole documents are held out, or nothing.
    """

    hashes: np.ndarray
    is_held_out: np.ndarray
    digest: str
    sketch: tuple[int, ...]
    cut: InnerCut | None

    @property
    def held_out_hashes(self) -> np.ndarray:
        """Sorted distinct hashes of held-out documents, and of one whose end is held out."""
        whole = [] if self.cut is None else [self.cut.whole_hash]
        held_out = np.unique(np.append(self.hashes[self.is_held_out], np.array(whole, dtype=np.uint64)))
        return held_out[held_out != NO_TEXT]


def text_hash(text: str) -> int:
    """Hash a text, but for white space around it and the kind of its line ends; a text of white space has NO_TEXT.

    So a document in a text file is the same as in a row, where the last line end is often missing.
    """
    core = text.strip()
    if not core:
        return NO_TEXT
    if "\r" in core:
        core = core.replace("\r\n", "\n")
    return xxhash.xxh3_64_intdigest(core.encode("utf-8")) or 1


def write_index(corpus: Corpus, folder: Path) -> None:
    """Read all documents of a corpus, and write their index into a folder.

    Args:
        corpus: Corpus to read.
        folder: Existing folder for the files.

    Raises:
        UsageError: If a document cannot be read.
    """
    hashes, is_held_out, digest = array("Q"), bytearray(), xxhash.xxh3_128()
    num_bytes, longest, longest_number = 0, "", -1
    for number, document in enumerate(corpus.documents()):
        text = document.text.encode("utf-8")
        hashes.append(text_hash(document.text))
        is_held_out.append(document.held_out)
        digest.update(b"%d:%d:" % (document.held_out, len(text)))
        digest.update(text)
        num_bytes += len(text)
        if len(document.text) > len(longest):
            longest, longest_number = document.text, number
    cut = None
    if corpus.rule is not None and not _has_both_sides(hashes, is_held_out):
        cut = _cut_inside(longest, longest_number, num_bytes, corpus.rule)
    if cut is not None:
        is_held_out = bytearray(len(hashes) + 1)
        is_held_out[cut.document + 1] = True
        parts = (longest[: cut.characters], longest[cut.characters :])
        hashes[cut.document : cut.document + 1] = array("Q", [text_hash(part) for part in parts])
        digest.update(b"cut at %d" % cut.characters)
    hashes_N = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)
    np.save(folder / HASHES_FILE, hashes_N)
    np.save(folder / HELD_OUT_FILE, np.frombuffer(bytes(is_held_out), dtype=np.bool_))
    meta = {
        "version": INDEX_VERSION,
        "digest": digest.hexdigest(),
        "sketch": np.unique(hashes_N)[:SKETCH_HASHES].tolist(),
        "cut": None if cut is None else asdict(cut),
    }
    write_json(folder / META_FILE, meta)


def open_index(folder: Path) -> DocumentIndex | None:
    """Open the index in a folder; None if there is none, or it is damaged or of another version."""
    try:
        meta = json.loads((folder / META_FILE).read_bytes())
        if meta["version"] != INDEX_VERSION:
            return None
        hashes = np.load(folder / HASHES_FILE, mmap_mode="r" if meta["sketch"] else None)
        is_held_out = np.load(folder / HELD_OUT_FILE)
        cut = None if meta["cut"] is None else InnerCut(**meta["cut"])
        sketch, digest = tuple(map(int, meta["sketch"])), str(meta["digest"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    if len(hashes) != len(is_held_out):
        return None
    return DocumentIndex(hashes, is_held_out, digest, sketch, cut)


def _has_both_sides(hashes: Sequence[int], is_held_out: Sequence[int]) -> bool:
    """Tell whether there is text that is held out, and other text to train on."""
    held_out = {text for text, side in zip(hashes, is_held_out, strict=True) if side and text != NO_TEXT}
    to_train = (text for text, side in zip(hashes, is_held_out, strict=True) if not side and text != NO_TEXT)
    return bool(held_out) and any(text not in held_out for text in to_train)


def _cut_inside(text: str, number: int, num_bytes: int, rule: HeldOutSplit) -> InnerCut | None:
    """Cut the longest document so that its end is about the share of the corpus that is to be held out.

    Args:
        text: Text of the longest document.
        number: Its number in the corpus.
        num_bytes: Bytes of all documents.
        rule: Rule that gives the share and the bound.

    Returns:
        The cut, behind a line end where there is one near; None if a side would be without text.
    """
    data = text.encode("utf-8")
    size = min(int(rule.fraction * num_bytes), rule.max_bytes, len(data) // 2)
    start = len(data) - size
    line_end = data.find(b"\n", start, start + size // 2)
    if line_end >= 0:
        start = line_end + 1
    while start < len(data) and data[start] & 0xC0 == 0x80:  # inside a character
        start += 1
    characters = len(data[:start].decode("utf-8"))
    has_text = text[:characters].strip() and text[characters:].strip()
    return InnerCut(number, characters, text_hash(text)) if has_text else None
