"""Documents of Hugging Face data sets, from the hub, its local cache, or a folder on disk."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.config.data import SourceConfig
from moe_train.config.errors import UsageError
from moe_train.data.corpus import DigestFiles, Document, HeldOutSplit
from moe_train.data.digests import digest_of
from moe_train.data.files import SHOWN_NAMES, CorpusFile, FoundFiles, files_below
from moe_train.data.readers import check_column, checked_text

BATCH_ROWS = 1000  # rows decoded at a time
SAVED_DATASET_FILE = "state.json"  # save_to_disk writes it into the folder of a data set
SAVED_SPLITS_FILE = "dataset_dict.json"  # save_to_disk writes it into the folder of several splits


@dataclass(frozen=True)
class HubCorpus:
    """Corpus of the rows of a data set: the training split, then the held-out split.

    Attributes:
        column: Column that holds the text.
        rows: Training split, a `datasets.Dataset` of this column alone.
        held_out_rows: Held-out split; None where documents are held out by their row number.
        split: Rule that holds documents out where no held-out split is named.
        description: Name of the corpus in messages.
        local_files: Files of a data set in a local folder; empty for one of the hub.
        notes: Lines about what the local folder has beside these files, and about linked folders.
    """

    column: str
    rows: Any
    held_out_rows: Any
    split: HeldOutSplit
    description: str
    local_files: tuple[CorpusFile, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> HeldOutSplit | None:
        """Rule that holds documents out; None where a held-out split is named, or nothing is to be held out."""
        return self.split if self.split.fraction > 0 and self.held_out_rows is None else None

    @property
    def size_bytes(self) -> int:
        """Size of the Arrow table in memory, in bytes."""
        return self.rows.data.nbytes + (0 if self.held_out_rows is None else self.held_out_rows.data.nbytes)

    def files(self, digest_files: DigestFiles) -> dict[str, str]:
        """Digest of each file of a local folder by its name."""
        return dict(zip((file.name for file in self.local_files), digest_files(self.local_files), strict=True))

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """Compute a digest of the contents, the splits and the column.

        The contents of a local folder are those of its files; of a data set of the hub, `datasets` gives a fingerprint.
        """
        rule = [self.split.fraction, self.split.max_bytes]
        held_out: object = rule if self.held_out_rows is None else self.held_out_rows._fingerprint
        contents = [self.rows._fingerprint, held_out, sorted(self.files(digest_files).items())]
        return digest_of(["huggingface", self.column, contents])

    def documents(self) -> Iterator[Document]:
        """Iterate over the documents, one per row, named by their row number."""
        if self.held_out_rows is None:
            yield from self.split.documents(self._read(self.rows))
            return
        for rows, held_out in ((self.rows, False), (self.held_out_rows, True)):
            for name, text in self._read(rows):
                yield Document(name, text, held_out)

    def _read(self, rows: Any) -> Iterator[tuple[str, str]]:
        row = 0
        for batch in rows.iter(BATCH_ROWS):
            for value in batch[self.column]:
                yield str(row), checked_text(value, f"{self.description}: row {row}: column {self.column!r}")
                row += 1


def open_hub_corpus(source: SourceConfig, split: HeldOutSplit, field: str, digest_files: DigestFiles) -> HubCorpus:
    """Load a data set by hub name, from a folder of data files, or from a folder written by `save_to_disk`.

    Args:
        source: Settings of the source; its name is a hub name or a local folder.
        split: Rule that holds documents out where no held-out split is named.
        field: Name of the source in the configuration, for messages.
        digest_files: Called with the files of a local folder; returns the digest of each file's contents.

    Returns:
        A corpus whose rows are memory-mapped.

    Raises:
        UsageError: If the data set, its subset, a split or the column does not exist.
    """
    folder = Path(str(source.name)).expanduser()
    found = files_below(folder, f"{field}.name") if os.path.isdir(folder) else None
    files = found.files if found else ()
    content = digest_of(digest_files(files)) if files else None

    def load(name: str, split_field: str) -> Any:
        rows = _load(source, name, f"{field}.{split_field}", field, content)
        check_column(source.text_column, rows.column_names, description)
        # The fingerprint of a local folder changes with the time of its files; the corpus adds their contents.
        fingerprint = rows._fingerprint if content is None else digest_of([source.subset, name])
        return _only_column(rows, source.text_column, fingerprint)

    description = f"{field}.name ({source.name}, split {source.split!r})"
    rows = load(source.split, "split")
    held_out = None if source.validation_split is None else load(source.validation_split, "validation_split")
    notes = _notes(folder, found, f"{field}.name ({source.name})") if found else ()
    return HubCorpus(source.text_column, rows, held_out, split, description, files, notes)


def _notes(folder: Path, found: FoundFiles, field: str) -> tuple[str, ...]:
    """Say what a local folder has beside the files whose changes are seen, and which of these may not be read."""
    notes = [found.account(field, "files watched for changes")] if found.left_out else []
    folders = {parent for file in found.files for parent in PurePosixPath(file.name).parents if parent.name}
    linked = sorted(str(name) for name in folders if os.path.islink(folder / name))
    if linked and not any(os.path.isfile(folder / name) for name in (SAVED_DATASET_FILE, SAVED_SPLITS_FILE)):
        notes.append(
            f"{field}: `datasets` does not search folders that are links ({', '.join(linked[:SHOWN_NAMES])}): it reads "
            "their files only where the folder's README.md names them"
        )
    return tuple(notes)


def _only_column(rows: Any, column: str, fingerprint: str) -> Any:
    """Select one column of a data set, with a fingerprint made from the data set's own."""
    selected = rows.with_format(None).select_columns([column])
    selected._fingerprint = digest_of([fingerprint, column])  # select_columns documents no stable one
    return selected


def _load(source: SourceConfig, split: str, split_field: str, field: str, content: str | None) -> Any:
    """Load a split. `content` is the digest of a local folder's contents; None for a data set of the hub."""
    import datasets

    folder = Path(str(source.name))
    is_dataset, is_splits = (os.path.isfile(folder / name) for name in (SAVED_DATASET_FILE, SAVED_SPLITS_FILE))
    if (is_dataset or is_splits) and source.subset is not None:
        raise UsageError(f"{field}.subset ({source.subset!r}) has no effect: {folder} holds one saved data set")
    try:
        if is_dataset or is_splits:
            saved = datasets.load_from_disk(str(folder))
        elif content is not None:
            # `datasets` takes its own copy for as long as the files keep their times. So each content has its own copy.
            copies = Path(datasets.config.HF_DATASETS_CACHE, "by_content", content)
            return datasets.load_dataset(str(folder), source.subset, split=split, cache_dir=str(copies))
        else:
            return datasets.load_dataset(source.name, source.subset, split=split)
    except Exception as error:  # anything that the hub, the network, the file system or a builder's script raises
        reason = " ".join(str(error).split()) or type(error).__name__
        subset = "" if source.subset is None else f", {field}.subset ({source.subset!r})"
        raise UsageError(
            f"{field}.name ({source.name!r}){subset}, {split_field} ({split!r}): cannot be loaded: {reason}"
        ) from error
    splits = saved if is_splits else {str(saved.split or "train"): saved}
    if split not in splits:
        raise UsageError(f"{split_field} ({split!r}): {folder} has no such split; it has {', '.join(splits)}")
    return splits[split]
