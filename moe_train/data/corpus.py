"""A corpus: the documents of one source in a fixed order, and which of them are held out from training."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_train.data.files import CorpusFile

HASH_BYTES = 8

DigestFiles = Callable[[Sequence[CorpusFile]], list[str]]


@dataclass(frozen=True)
class Document:
    """One document: its name within the corpus, its text, and whether it is kept from training."""

    name: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class HeldOutSplit:
    """The fixed split of documents by a hash of their name, where no held-out files or split are named.

    Attributes:
        fraction: Share of the documents to hold out.
        max_bytes: Bound of the held-out text, in bytes of UTF-8.
    """

    fraction: float
    max_bytes: int

    def documents(self, named_texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
        """The documents, marked. Those that would exceed the bound are trained on.

        Args:
            named_texts: Name and text of each document, in the corpus's order.

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
    """The documents of one source."""

    @property
    def description(self) -> str:
        """What a person would call it, for messages."""

    @property
    def size_bytes(self) -> int:
        """An upper bound of the text's size in bytes, known without reading it."""

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """A digest of the documents, their order and the split.

        Args:
            digest_files: Gives the digests of files' contents.
        """

    def documents(self) -> Iterator[Document]:
        """The documents in their fixed order.

        Raises:
            UsageError: If something is not readable as what it was said to be; names the file and the place.
        """
