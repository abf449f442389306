"""Corpus interface: the documents of one source in a fixed order, some of them held out from training."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_train.data.files import CorpusFile

HASH_BYTES = 8

DigestFiles = Callable[[Sequence[CorpusFile]], list[str]]


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        name: Name within the corpus.
        text: Text of the document.
        held_out: Whether it is held out from training.
    """

    name: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class HeldOutSplit:
    """Fixed split of documents by a hash of their names, for sources without held-out files or a held-out split.

    Attributes:
        fraction: Share of the documents to hold out.
        max_bytes: Most bytes of held-out text, as UTF-8.
    """

    fraction: float
    max_bytes: int

    def documents(self, named_texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
        """Mark each document as held out or not. A document that would exceed the bound is trained on.

        Args:
            named_texts: Name and text of each document, in the order of the corpus.

        Yields:
            The same documents in the same order.
        """
        held_out_bytes = 0
        for name, text in named_texts:
            held_out = self._picks(name)
            if held_out:
                size = len(text.encode("utf-8"))
                held_out = held_out_bytes + size <= self.max_bytes
                held_out_bytes += size if held_out else 0
            yield Document(name, text, held_out)

    def _picks(self, name: str) -> bool:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=HASH_BYTES).digest()
        return int.from_bytes(digest, "big") < self.fraction * 2 ** (8 * HASH_BYTES)


class Corpus(Protocol):
    """Documents of one source, in a fixed order."""

    @property
    def description(self) -> str:
        """Name of the corpus in messages."""

    @property
    def size_bytes(self) -> int:
        """Upper bound of the size of the text in bytes, known without reading it."""

    @property
    def rule(self) -> HeldOutSplit | None:
        """Rule that holds documents out; None where they are named, or nothing is to be held out."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about what was found and left out, for the user."""

    def files(self, digest_files: DigestFiles) -> dict[str, str]:
        """Digest of each file by its name; empty for a corpus without files."""

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """Compute a digest of the documents, their order and the split.

        Args:
            digest_files: Called with files; returns the digest of each file's contents.
        """

    def documents(self) -> Iterator[Document]:
        """Iterate over the documents in their fixed order.

        Raises:
            UsageError: If a file cannot be read in its declared format. The message names the file and the place.
        """
