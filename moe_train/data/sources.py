"""Sources of documents. Each source opens as a corpus, with a fixed order of documents and a digest of its contents."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.config.data import DataConfig, SourceConfig
from moe_train.config.errors import UsageError
from moe_train.data.corpus import Corpus, DigestFiles, Document, HeldOutSplit
from moe_train.data.digests import digest_of, read_digests
from moe_train.data.files import SUFFIXES, CorpusFile, check_files, find_files, stdlib_files
from moe_train.data.hub import open_hub_corpus
from moe_train.data.readers import READERS, ambiguous_columns


@dataclass(frozen=True)
class FileCorpus:
    """Corpus of local files: all training files, then all held-out files.

    Attributes:
        source: Kind of the files, a key of READERS.
        column: Column or key of the text, where the kind has one.
        training_files: Files to train on. With a split, some of their documents are held out.
        held_out_files: Files whose documents are held out.
        split: Rule that holds documents out where no held-out files are named.
        description: Name of the corpus in messages.
        notes: Lines about the files that were found and left out.
    """

    source: str
    column: str
    training_files: tuple[CorpusFile, ...]
    held_out_files: tuple[CorpusFile, ...]
    split: HeldOutSplit
    description: str
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> HeldOutSplit | None:
        """Rule that holds documents out; None where held-out files are named, or nothing is to be held out."""
        return self.split if self.split.fraction > 0 and not self.held_out_files else None

    @property
    def size_bytes(self) -> int:
        """Size of the files in bytes."""
        return sum(
            file.path.stat().st_size for file in (*self.training_files, *self.held_out_files) if file.path.exists()
        )

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """Compute a digest of names, contents, reader and split. It does not depend on the path or age of the files."""
        digests = iter(digest_files((*self.training_files, *self.held_out_files)))
        named = [[[file.name, next(digests)] for file in files] for files in (self.training_files, self.held_out_files)]
        split = None if self.held_out_files else [self.split.fraction, self.split.max_bytes]
        return digest_of([self.source, self.column if self.source in ("jsonl", "parquet") else "", named, split])

    def files(self, digest_files: DigestFiles) -> dict[str, str]:
        """Digest of each file by its name."""
        files = (*self.training_files, *self.held_out_files)
        return dict(zip((file.name for file in files), digest_files(files), strict=True))

    def documents(self) -> Iterator[Document]:
        """Iterate over the documents, file by file."""
        if not self.held_out_files:
            yield from self.split.documents(self._read(self.training_files))
            return
        for files, held_out in ((self.training_files, False), (self.held_out_files, True)):
            for name, text in self._read(files):
                yield Document(name, text, held_out)

    def _read(self, files: tuple[CorpusFile, ...]) -> Iterator[tuple[str, str]]:
        read = READERS[self.source]
        for file in files:
            yield from read(file, self.column)


def open_corpus(
    source: SourceConfig, config: DataConfig, field: str, digest_files: DigestFiles = read_digests
) -> Corpus:
    """Open a source as a corpus: find its files, or load its data set.

    Args:
        source: Settings of the source.
        config: Data settings that contain the source; they give the split.
        field: Name of the source in the configuration ("data" or "data.mixture[0]"), for messages.
        digest_files: Called with files; returns the digest of each file's contents. A data set of local files is
            loaded anew when they change.

    Returns:
        A corpus whose documents have not been read yet. A hub data set has been loaded.

    Raises:
        UsageError: If a path, a pattern or a data set does not exist, or nothing is left to train on.
    """
    split = HeldOutSplit(config.validation_fraction, config.validation_max_bytes)
    if source.source == "huggingface":
        return open_hub_corpus(source, split, field, digest_files)
    if source.source == "python_stdlib":
        return FileCorpus(source.source, "", stdlib_files(), (), split, f"{field}.source (python_stdlib)")
    suffixes = SUFFIXES[source.source]
    found = find_files(source.paths, suffixes, f"{field}.paths", config.cache_dir)
    held_out = find_files(source.validation_paths, suffixes, f"{field}.validation_paths", config.cache_dir)
    # A folder may contain the held-out files; these are not trained on.
    kept_away = {file.path.resolve() for file in held_out.files}
    training = tuple(file for file in found.files if file.path.resolve() not in kept_away)
    if not training:
        raise UsageError(
            f"{field}.paths ({', '.join(source.paths)}): every file is held out by {field}.validation_paths "
            f"({', '.join(source.validation_paths)}); nothing is left to train on"
        )
    description = f"{field}.paths ({', '.join(source.paths)})"
    notes = [
        files.account(f"{field}.{name} ({', '.join(getattr(source, name))})")
        for name, files in (("paths", found), ("validation_paths", held_out))
        if files.searched or files.left_out
    ]
    if kept := len(found.files) - len(training):
        notes.append(f"{description}: {kept:,} of its files are held out by {field}.validation_paths")
    if source.source == "parquet":
        notes += ambiguous_columns((*training, *held_out.files), source.text_column)
    return FileCorpus(source.source, source.text_column, training, held_out.files, split, description, tuple(notes))


def check_source(source: SourceConfig, field: str) -> None:
    """Check that the paths of a source exist, without reading files and without heavy imports.

    Args:
        source: Settings of the source.
        field: Name of the source in the configuration, for messages.

    Raises:
        UsageError: If a path does not exist, a pattern has no match, or the training split is held out as well.
    """
    if source.source in SUFFIXES:
        check_files(source.paths, SUFFIXES[source.source], f"{field}.paths")
        check_files(source.validation_paths, SUFFIXES[source.source], f"{field}.validation_paths")
    if source.source == "huggingface" and source.name is not None:
        local = source.name.startswith(("/", "./", "../"))
        if local and not os.path.isdir(source.name):
            raise UsageError(f"{field}.name ({source.name!r}): no such folder")
        if source.validation_split == source.split:
            raise UsageError(
                f"{field}.validation_split ({source.validation_split!r}) is {field}.split ({source.split!r}): "
                "held-out text would be trained on"
            )
