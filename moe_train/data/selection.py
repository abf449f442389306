"""Selection of what is trained on: every document of the sources, without those whose text any source holds out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from moe_train.config.errors import UsageError
from moe_train.data.corpus import Corpus, DigestFiles, Document, HeldOutSplit
from moe_train.data.digests import digest_of
from moe_train.data.index import DocumentIndex

CHUNK_DOCUMENTS = 2**20  # documents looked up at a time; bounds memory


@dataclass(frozen=True)
class SelectedCorpus:
    """Corpus of the documents of another, without those whose text is held out elsewhere.

    Attributes:
        corpus: Corpus that is read.
        index: Its index.
        is_left_out: bool [documents of the index], those to train on whose text is held out.
    """

    corpus: Corpus
    index: DocumentIndex
    is_left_out: np.ndarray

    @property
    def description(self) -> str:
        """Name of the corpus in messages."""
        return self.corpus.description

    @property
    def size_bytes(self) -> int:
        """Upper bound of the size of the text in bytes."""
        return self.corpus.size_bytes

    @property
    def rule(self) -> HeldOutSplit | None:
        """Rule that holds documents out."""
        return self.corpus.rule

    @property
    def num_left_out(self) -> int:
        """Number of documents that are left out of training."""
        return int(self.is_left_out.sum())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know: files and documents that are left out, and a document that is cut."""
        notes = list(self.corpus.notes)
        if self.index.cut is not None:
            share = self.corpus.rule.fraction if self.corpus.rule else 0.0
            notes.append(
                f"{self.description}: no whole document can be held out: the end of its longest document is, for the "
                f"share of {share:g} (data.validation_fraction)"
            )
        if self.num_left_out:
            count = len(self.is_left_out) - int(self.index.is_held_out.sum())
            notes.append(
                f"{self.description}: {self.num_left_out:,} of {count:,} documents to train on are left out: the same "
                "text is held out"
            )
        return tuple(notes)

    def files(self, digest_files: DigestFiles) -> dict[str, str]:
        """Digest of each file by its name."""
        return self.corpus.files(digest_files)

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """Compute a digest of the documents, their order, the split and what is left out."""
        fingerprint, cut = self.corpus.fingerprint(digest_files), self.index.cut
        if cut is None and not self.num_left_out:
            return fingerprint
        return digest_of([fingerprint, None if cut is None else [cut.document, cut.characters], self.left_out_digest])

    @property
    def left_out_digest(self) -> str:
        """Digest of what is left out; empty where nothing is."""
        return xxhash.xxh3_128_hexdigest(self.is_left_out.tobytes()) if self.num_left_out else ""

    def documents(self) -> Iterator[Document]:
        """Iterate over the documents in their order, without those that are left out.

        Raises:
            UsageError: If a document cannot be read, or there are more or fewer than the index has.
        """
        documents = self.corpus.documents()
        if self.index.cut is not None:
            documents = self.index.cut.documents(documents)
        count = 0
        for count, document in enumerate(documents, 1):
            if count > len(self.is_left_out):
                break
            if not self.is_left_out[count - 1]:
                yield document
        if count != len(self.is_left_out):
            raise UsageError(f"{self.description}: changed while it was read; start again when it is complete")


def select_documents(corpora: Sequence[Corpus], indexes: Sequence[DocumentIndex]) -> tuple[SelectedCorpus, ...]:
    """Leave every document out of training whose text is held out by any of the sources.

    Args:
        corpora: All sources of a run.
        indexes: Index of each.

    Returns:
        The corpora as they are trained on and held out.
    """
    held_out = np.unique(np.concatenate([index.held_out_hashes for index in indexes]))
    first_cuts: dict[int, int] = {}
    for cut in (index.cut for index in indexes if index.cut is not None):
        first_cuts[cut.whole_hash] = min(cut.characters, first_cuts.get(cut.whole_hash, cut.characters))
    selected = []
    for corpus, index in zip(corpora, indexes, strict=True):
        is_left_out = ~index.is_held_out & _is_among(index.hashes, held_out)
        if index.cut is not None and index.cut.characters > first_cuts[index.cut.whole_hash]:
            is_left_out[index.cut.document] = True  # it goes on into the end that another source holds out
        selected.append(SelectedCorpus(corpus, index, is_left_out))
    return tuple(selected)


def _is_among(hashes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tell which hashes are among sorted values. uint64 [N], uint64 [M] -> bool [N]."""
    found = np.zeros(len(hashes), dtype=np.bool_)
    if not len(values):
        return found
    for start in range(0, len(hashes), CHUNK_DOCUMENTS):
        chunk = hashes[start : start + CHUNK_DOCUMENTS]
        places = np.minimum(np.searchsorted(values, chunk), len(values) - 1)
        found[start : start + len(chunk)] = values[places] == chunk
    return found
