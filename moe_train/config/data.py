"""Settings of the data: sources, mixture, tokenizer, cache and the held-out split."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moe_train.config.base import Section
from moe_train.config.paths import UserPath

SourceKind = Literal["python_stdlib", "text", "jsonl", "parquet", "huggingface", "synthetic"]
FILE_KINDS = ("text", "jsonl", "parquet")
COLUMN_KINDS = ("jsonl", "parquet", "huggingface")


class SourceConfig(Section):
    """One source of documents."""

    source: SourceKind = "python_stdlib"
    """python_stdlib: the standard library of the running Python; text: each file is one document; jsonl, parquet: each
    row is one document; huggingface: a data set, by its hub name or local folder."""
    paths: tuple[UserPath, ...] = ()
    """Files, folders or patterns (`*`, `?`, `[...]`, `**`, `{a,b}`) of a text, jsonl or parquet source; what exists by
    that very name is taken. Remote files (`s3://`, `gs://`, `hf://`) are copied into the cache. Text
    and jsonl files may be packed by gzip, bzip2, xz or zstd."""
    validation_paths: tuple[UserPath, ...] = ()
    """Held-out files, folders or glob patterns; empty: a fixed part of the documents, chosen by a hash of their
    names."""
    name: UserPath | None = None
    """Hub name or local folder of a huggingface data set."""
    subset: str | None = None
    """Configuration (subset) of a huggingface data set."""
    split: str = "train"
    """Split of a huggingface data set for training."""
    validation_split: str | None = None
    """Held-out split of a huggingface data set; None: a fixed part of the documents. Its rows are left out of training
    where the training split has them too."""
    text_column: str = "text"
    """Column that holds the text, in a jsonl, parquet or huggingface source."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source in FILE_KINDS and not self.paths:
            raise ValueError(f"source {self.source!r} needs paths: name at least one file, folder or pattern")
        if self.source == "huggingface" and not self.name:
            raise ValueError("source 'huggingface' needs name: a hub name or a local folder")
        allowed = {
            "paths": FILE_KINDS,
            "validation_paths": FILE_KINDS,
            "name": ("huggingface",),
            "subset": ("huggingface",),
            "split": ("huggingface",),
            "validation_split": ("huggingface",),
            "text_column": COLUMN_KINDS,
        }
        for field, kinds in allowed.items():
            if self.differs(field) and self.source not in kinds:
                raise ValueError(
                    f"{field} ({getattr(self, field)!r}) has no effect with source "
                    f"{self.source!r}: it is for {', '.join(kinds)}"
                )
        return self

    @property
    def names_held_out(self) -> bool:
        """Whether the held-out text is named, rather than a part of the documents."""
        return bool(self.validation_paths) or self.validation_split is not None


class MixtureEntry(SourceConfig):
    """One source of a mixture."""

    weight: PositiveFloat = 1.0
    """Share of the training sequences from this source, relative to the weights of the other entries."""


class DataConfig(SourceConfig):
    """Documents, tokens and their order."""

    mixture: tuple[MixtureEntry, ...] = ()
    """Several sources with weights, instead of data.source (in YAML, or as JSON on the command line)."""
    tokenizer: UserPath = "bytes"
    """bytes (256 values and an end-of-document mark), bpe (trained on the data), or the path of a `tokenizers` JSON
    file. Bits per byte are given where decoding the tokens gives the text back."""
    bpe_vocab_size: int = Field(4096, ge=257)
    """Vocabulary size of the trained BPE, including the end-of-document mark; only for tokenizer bpe."""
    end_of_document: str | None = None
    """Token of a tokenizer file that marks the end of a document; None: a token with one of the usual names. Text that
    holds its name is encoded like other text, never to this token."""
    validation_fraction: float = Field(0.02, ge=0.0, lt=1.0)
    """Share of the documents that is held out, if no validation files or split are given. Where no whole document can
    be, the end of the longest one is."""
    validation_max_bytes: PositiveInt = 4 * 2**20
    """Most bytes of held-out text; the documents of the held-out part that exceed it are used for training."""
    ignored_targets: float = Field(0.0, ge=0.0, lt=1.0)
    """Largest share of a sequence's targets that is ignored, as in chat data; each sequence has a share between 0 and
    this, and one of eight has no target at all. Only for source synthetic."""
    cache_dir: UserPath | None = None
    """Folder for tokenized data and copies of remote files; None: $XDG_CACHE_HOME/moe_train or ~/.cache/moe_train;
    without a home folder that can be written to, one under TMPDIR."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = {"source", "paths", "validation_paths", "name", "subset", "split", "validation_split", "text_column"}
        both = sorted(name for name in named if self.differs(name))
        if self.mixture and both:
            raise ValueError(f"mixture and {both[0]} ({getattr(self, both[0])!r}) both name the data: give one of them")
        if self.ignored_targets and self.source != "synthetic":
            raise ValueError(
                f"ignored_targets ({self.ignored_targets}) has no effect with source {self.source!r}: it is for "
                "synthetic"
            )
        if any(entry.source == "synthetic" for entry in self.mixture):
            raise ValueError("mixture: source 'synthetic' is random and no part of a mixture: use it alone")
        if self.source == "synthetic" and self.tokenizer != "bytes":
            raise ValueError(f"source 'synthetic' makes bytes: tokenizer ({self.tokenizer!r}) must be bytes")
        if self.differs("bpe_vocab_size") and self.tokenizer != "bpe":
            raise ValueError(
                f"bpe_vocab_size ({self.bpe_vocab_size}) has no effect with tokenizer {self.tokenizer!r}: it is for bpe"
            )
        if self.end_of_document is not None and self.tokenizer in ("bytes", "bpe"):
            raise ValueError(
                f"end_of_document ({self.end_of_document!r}) has no effect with tokenizer {self.tokenizer!r}: "
                "it is for a tokenizer file"
            )
        return self

    @property
    def sources(self) -> tuple[MixtureEntry, ...]:
        """Sources with their weights; without a mixture, one source of weight 1."""
        if self.mixture:
            return self.mixture
        fields = {name: getattr(self, name) for name in SourceConfig.model_fields}
        return (MixtureEntry(**fields),)
