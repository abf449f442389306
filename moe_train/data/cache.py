"""Tokenized corpora on disk: one folder for each corpus, tokenizer and split, read through memory maps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.data.build import TOKEN_FILES, tokenize_corpus
from moe_train.data.corpus import Corpus
from moe_train.data.digests import digest_of, file_digests
from moe_train.data.files import CorpusFile
from moe_train.data.folders import build_once, replaced_folder, write_json
from moe_train.data.tokenizers import Tokenizer

FORMAT_VERSION = 1  # of the files below; part of every key, so that other versions are built anew
META_FILE = "meta.json"


@dataclass(frozen=True)
class StreamSize:
    """Size of a token stream: tokens (marks included), documents, and bytes of their text as UTF-8."""

    tokens: int
    documents: int
    num_bytes: int


@dataclass(frozen=True)
class TokenCache:
    """One tokenized corpus.

    Attributes:
        folder: Where it lies.
        train_tokens: Memory map, uint16 or uint32; a mark, then each document with a mark behind it.
        held_out_tokens: The same of the held-out documents; empty where there are none.
        train: Size of the training text.
        held_out: Size of the held-out text.
        reference_bits_per_byte: What general compressors reach on the held-out text; empty where there is none.
    """

    folder: Path
    train_tokens: np.ndarray
    held_out_tokens: np.ndarray
    train: StreamSize
    held_out: StreamSize
    reference_bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class CacheFolder:
    """Where prepared data is kept, and how this process takes part in preparing it.

    Attributes:
        root: The folder.
        wait_seconds: How long to let another process begin to build first.
        show_bar: Show a progress bar where standard error is a terminal.
    """

    root: Path
    wait_seconds: float
    show_bar: bool

    def digest_files(self, files: Sequence[CorpusFile]) -> list[str]:
        """The digests of files' contents; see `file_digests`."""
        return file_digests(files, self.root / "digests", self.wait_seconds)

    def tokens(self, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer) -> TokenCache:
        """The tokens of a corpus, tokenized by one process where they are not there yet.

        Args:
            corpus: The documents.
            fingerprint: Of the corpus.
            tokenizer: The tokenizer.

        Returns:
            The cache, open.

        Raises:
            UsageError: If a document cannot be read, or a file changed meanwhile.
        """
        key = digest_of([FORMAT_VERSION, fingerprint, tokenizer.fingerprint])
        folder = self.root / "tokens" / key

        def build() -> TokenCache:
            with replaced_folder(folder) as temporary:
                sizes, reference = tokenize_corpus(corpus, tokenizer, temporary, self.show_bar)
                meta = {
                    "format_version": FORMAT_VERSION,
                    "source": corpus.description,
                    "tokenizer_fingerprint": tokenizer.fingerprint,
                    "dtype": sizes["train"].dtype,
                    **{name: asdict(StreamSize(s.tokens, s.documents, s.num_bytes)) for name, s in sizes.items()},
                    "reference_bits_per_byte": reference,
                }
                write_json(temporary / META_FILE, meta)
                self.check_unchanged(corpus, fingerprint)
            return _opened(folder)

        return build_once(folder, lambda: open_token_cache(folder), build, self.wait_seconds)

    def check_unchanged(self, corpus: Corpus, fingerprint: str) -> None:
        """Raise UsageError if the corpus is not what it was when its fingerprint was taken."""
        if corpus.fingerprint(self.digest_files) != fingerprint:
            raise UsageError(f"{corpus.description}: changed while it was read; start again when it is complete")


def open_token_cache(folder: Path) -> TokenCache | None:
    """Open a tokenized corpus.

    Args:
        folder: Its folder.

    Returns:
        The cache; None if it is not there, of another version, or damaged (a file's size is not what was written).
    """
    try:
        meta = json.loads((folder / META_FILE).read_bytes())
        if meta["format_version"] != FORMAT_VERSION:
            return None
        dtype = np.dtype(meta["dtype"])
        sizes = {name: StreamSize(**meta[name]) for name in TOKEN_FILES}
        maps = {name: _map_tokens(folder / file, dtype, sizes[name].tokens) for name, file in TOKEN_FILES.items()}
        reference = {str(name): float(bits) for name, bits in meta["reference_bits_per_byte"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return TokenCache(folder, maps["train"], maps["held_out"], sizes["train"], sizes["held_out"], reference)


def _map_tokens(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    size = path.stat().st_size
    if size != tokens * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, not {tokens} tokens of {dtype.itemsize}")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if tokens else np.empty(0, dtype)


def _opened(folder: Path) -> TokenCache:
    cache = open_token_cache(folder)
    assert cache is not None, f"{folder} was just written and cannot be opened"
    return cache
