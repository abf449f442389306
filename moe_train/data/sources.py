"""Sources of documents: each opens as a corpus, which gives its documents in a fixed order and knows its contents."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moe_train.config import DataConfig, SourceConfig, UsageError
from moe_train.data.digests import digest_of
from moe_train.data.files import SUFFIXES, CorpusFile, check_files, find_files, stdlib_files
from moe_train.data.readers import READERS

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


@dataclass(frozen=True)
class FileCorpus:
    """The documents of local files: all training files, then all files named as held out.

    Attributes:
        source: Kind of the files, a key of READERS.
        column: Column or key of the text, where the kind has one.
        files: Files to train on (with a split: and to hold documents out of).
        held_out_files: Files named as held out.
        split: How documents are held out where no files are named.
        description: For messages.
    """

    source: str
    column: str
    files: tuple[CorpusFile, ...]
    held_out_files: tuple[CorpusFile, ...]
    split: HeldOutSplit
    description: str

    @property
    def size_bytes(self) -> int:
        """Size of the files in bytes."""
        return sum(file.path.stat().st_size for file in (*self.files, *self.held_out_files) if file.path.exists())

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """Digest of names, contents, reader and split; independent of where the files lie and how old they are."""
        digests = iter(digest_files((*self.files, *self.held_out_files)))
        named = [[[file.name, next(digests)] for file in files] for files in (self.files, self.held_out_files)]
        split = None if self.held_out_files else [self.split.fraction, self.split.max_bytes]
        return digest_of([self.source, self.column if self.source in ("jsonl", "parquet") else "", named, split])

    def documents(self) -> Iterator[Document]:
        """The documents, file by file."""
        if not self.held_out_files:
            yield from self.split.documents(self._read(self.files))
            return
        for files, held_out in ((self.files, False), (self.held_out_files, True)):
            for name, text in self._read(files):
                yield Document(name, text, held_out)

    def _read(self, files: tuple[CorpusFile, ...]) -> Iterator[tuple[str, str]]:
        read = READERS[self.source]
        for file in files:
            yield from read(file, self.column)


def open_corpus(source: SourceConfig, config: DataConfig, field: str) -> Corpus:
    """Find a source's files, or load its data set.

    Args:
        source: The source.
        config: The data settings it belongs to, for the split.
        field: Name of the source in the configuration ("data" or "data.mixture[0]"), for messages.

    Returns:
        A corpus whose documents have not been read yet (a hub data set has been loaded).

    Raises:
        UsageError: If a path, a pattern or a data set does not exist, or nothing is left to train on.
    """
    split = HeldOutSplit(config.validation_fraction, config.validation_max_bytes)
    if source.source == "huggingface":
        from moe_train.data.hub import open_hub_corpus

        return open_hub_corpus(source, split, field)
    if source.source == "python_stdlib":
        return FileCorpus(source.source, "", stdlib_files(), (), split, f"{field}.source (python_stdlib)")
    suffixes = SUFFIXES[source.source]
    files = find_files(source.paths, suffixes, f"{field}.paths")
    held_out = find_files(source.validation_paths, suffixes, f"{field}.validation_paths")
    # A folder may well contain the files that are named as held out: they are not trained on.
    kept_away = {file.path.resolve() for file in held_out}
    training = tuple(file for file in files if file.path.resolve() not in kept_away)
    if not training:
        raise UsageError(
            f"{field}.paths ({', '.join(source.paths)}): every file is held out by {field}.validation_paths "
            f"({', '.join(source.validation_paths)}); nothing is left to train on"
        )
    description = f"{field}.paths ({', '.join(source.paths)})"
    return FileCorpus(source.source, source.text_column, training, held_out, split, description)


def check_source(source: SourceConfig, field: str) -> None:
    """Check that what a source names is there, without reading it or importing anything heavy.

    Args:
        source: The source.
        field: Its name in the configuration.

    Raises:
        UsageError: If a path does not exist, a pattern has no match, or the training split is held out as well.
    """
    if source.source in SUFFIXES:
        check_files(source.paths, SUFFIXES[source.source], f"{field}.paths")
        check_files(source.validation_paths, SUFFIXES[source.source], f"{field}.validation_paths")
    if source.source == "huggingface" and source.name is not None:
        local = source.name.startswith(("/", "./", "../", "~"))
        if local and not Path(source.name).expanduser().is_dir():
            raise UsageError(f"{field}.name ({source.name!r}): no such folder")
        if source.validation_split == source.split:
            raise UsageError(
                f"{field}.validation_split ({source.validation_split!r}) is {field}.split ({source.split!r}): "
                "held-out text would be trained on"
            )
