"""Documents of Hugging Face data sets, from the hub, its local cache, or a folder on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.data import SourceConfig
from moe_train.config.errors import UsageError
from moe_train.data.corpus import DigestFiles, Document, HeldOutSplit
from moe_train.data.digests import digest_of
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
    """

    column: str
    rows: Any
    held_out_rows: Any
    split: HeldOutSplit
    description: str

    @property
    def size_bytes(self) -> int:
        """Size of the Arrow table in memory, in bytes."""
        return self.rows.data.nbytes + (0 if self.held_out_rows is None else self.held_out_rows.data.nbytes)

    def fingerprint(self, digest_files: DigestFiles) -> str:
        """Compute a digest of the fingerprints that `datasets` gives, the column and the split."""
        held_out: object = [self.split.fraction, self.split.max_bytes]
        if self.held_out_rows is not None:
            held_out = self.held_out_rows._fingerprint
        return digest_of(["huggingface", self.rows._fingerprint, self.column, held_out])

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


def open_hub_corpus(source: SourceConfig, split: HeldOutSplit, field: str) -> HubCorpus:
    """Load a data set by hub name, from a folder of data files, or from a folder written by `save_to_disk`.

    Args:
        source: Settings of the source; its name is a hub name or a local folder.
        split: Rule that holds documents out where no held-out split is named.
        field: Name of the source in the configuration, for messages.

    Returns:
        A corpus whose rows are memory-mapped.

    Raises:
        UsageError: If the data set, its subset, a split or the column does not exist.
    """
    rows = _load(source, source.split, f"{field}.split", field)
    held_out = None
    if source.validation_split is not None:
        held_out = _load(source, source.validation_split, f"{field}.validation_split", field)
    description = f"{field}.name ({source.name}, split {source.split!r})"
    for part in (rows, held_out):
        if part is not None:
            check_column(source.text_column, part.column_names, description)
    rows = _only_column(rows, source.text_column)
    held_out = None if held_out is None else _only_column(held_out, source.text_column)
    return HubCorpus(source.text_column, rows, held_out, split, description)


def _only_column(rows: Any, column: str) -> Any:
    """Select one column of a data set, with a fingerprint made from the data set's own."""
    selected = rows.with_format(None).select_columns([column])
    selected._fingerprint = digest_of([rows._fingerprint, column])  # select_columns documents no stable one
    return selected


def _load(source: SourceConfig, split: str, split_field: str, field: str) -> Any:
    import datasets

    folder = Path(str(source.name))
    is_dataset, is_splits = ((folder / name).is_file() for name in (SAVED_DATASET_FILE, SAVED_SPLITS_FILE))
    if (is_dataset or is_splits) and source.subset is not None:
        raise UsageError(f"{field}.subset ({source.subset!r}) has no effect: {folder} holds one saved data set")
    try:
        if is_dataset or is_splits:
            saved = datasets.load_from_disk(str(folder))
        else:
            name = str(folder) if folder.is_dir() else source.name
            return datasets.load_dataset(name, source.subset, split=split)
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
