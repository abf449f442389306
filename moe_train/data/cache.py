"""Cache of tokenized corpora on disk: one folder per corpus, tokenizer and split, read through memory maps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.data.build import TOKEN_FILES, Stream, tokenize_corpus
from moe_train.data.corpus import Corpus
from moe_train.data.digests import digest_of, file_digests
from moe_train.data.files import CorpusFile
from moe_train.data.folders import build_once, replaced_folder, write_json
from moe_train.data.index import INDEX_VERSION, DocumentIndex, open_index, write_index
from moe_train.data.recovery import ALL_RECOVERED, Unrecovered
from moe_train.data.report import say
from moe_train.data.tokenizers import Tokenizer

FORMAT_VERSION = 2  # version of the files below; part of every key, so that caches of other versions are built anew
META_FILE = "meta.json"
LONG_READ_BYTES = 2**28  # a longer first pass over the documents is announced: it takes more than some seconds


@dataclass(frozen=True)
class StreamSize:
    """Size of a token stream.

    Attributes:
        tokens: Number of tokens, end-of-document tokens included.
        documents: Number of documents.
        num_bytes: Bytes of the documents as UTF-8.
        unrecovered: What decoding the tokens does not give back.
    """

    tokens: int
    documents: int
    num_bytes: int
    unrecovered: Unrecovered = ALL_RECOVERED


@dataclass(frozen=True)
class TokenCache:
    """One tokenized corpus, opened from disk.

    Attributes:
        folder: Folder of the cache.
        train_tokens: Memory map of the training tokens, uint16 or uint32: an end-of-document token, then each document
            followed by another.
        held_out_tokens: Memory map of the held-out tokens, in the same form; empty where no document is held out.
        train: Size of the training text.
        held_out: Size of the held-out text.
        reference_bits_per_byte: Bits per byte of general compressors on the held-out text; empty where there is none.
    """

    folder: Path
    train_tokens: np.ndarray
    held_out_tokens: np.ndarray
    train: StreamSize
    held_out: StreamSize
    reference_bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class CacheFolder:
    """Folder of prepared data, and how this process takes part in preparing it.

    Attributes:
        root: Root folder of the cache.
        wait_seconds: Seconds to wait before building, so that another process can begin first.
        show_bar: Whether to show a progress bar where standard error is a terminal.
    """

    root: Path
    wait_seconds: float
    show_bar: bool

    def digest_files(self, files: Sequence[CorpusFile]) -> list[str]:
        """Compute the digest of each file's contents; see `file_digests`."""
        return file_digests(files, self.root / "digests", self.wait_seconds)

    def tokens(self, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer) -> TokenCache:
        """Open the tokens of a corpus; one process tokenizes it first if the cache does not have it.

        Args:
            corpus: Corpus whose documents are tokenized.
            fingerprint: Fingerprint of the corpus.
            tokenizer: Tokenizer that encodes them.

        Returns:
            The opened cache.

        Raises:
            UsageError: If a document cannot be read, or a file changed while it was read.
        """
        key = digest_of([FORMAT_VERSION, fingerprint, tokenizer.fingerprint])
        folder = self.root / "tokens" / key

        def build() -> TokenCache:
            with replaced_folder(folder) as temporary:
                streams, reference = tokenize_corpus(corpus, tokenizer, temporary, self.show_bar)
                meta = {
                    "format_version": FORMAT_VERSION,
                    "source": corpus.description,
                    "tokenizer_fingerprint": tokenizer.fingerprint,
                    "dtype": streams["train"].dtype,
                    **{name: asdict(_size_of(stream)) for name, stream in streams.items()},
                    "reference_bits_per_byte": reference,
                }
                write_json(temporary / META_FILE, meta)
                self.check_unchanged(corpus, fingerprint)
            return _opened(folder)

        return build_once(folder, lambda: open_token_cache(folder), build, self.wait_seconds)

    def index(self, corpus: Corpus, fingerprint: str) -> DocumentIndex:
        """Open the index of a corpus; one process reads the corpus first if the cache does not have it.

        Args:
            corpus: Corpus to index.
            fingerprint: Fingerprint of the corpus.

        Raises:
            UsageError: If a document cannot be read, or a file changed while it was read.
        """
        folder = self.root / "documents" / digest_of([INDEX_VERSION, fingerprint])

        def build() -> DocumentIndex:
            if corpus.size_bytes > LONG_READ_BYTES:
                say(f"reading {corpus.description}: up to {corpus.size_bytes / 1e6:,.0f} MB, for what is held out")
            with replaced_folder(folder) as temporary:
                write_index(corpus, temporary)
                self.check_unchanged(corpus, fingerprint)
            index = open_index(folder)
            assert index is not None, f"{folder} was just written and cannot be opened"
            return index

        return build_once(folder, lambda: open_index(folder), build, self.wait_seconds)

    def check_unchanged(self, corpus: Corpus, fingerprint: str) -> None:
        """Check that the corpus still has the fingerprint that was taken before.

        Raises:
            UsageError: If it has another one.
        """
        if corpus.fingerprint(self.digest_files) != fingerprint:
            raise UsageError(f"{corpus.description}: changed while it was read; start again when it is complete")


def open_token_cache(folder: Path) -> TokenCache | None:
    """Open a tokenized corpus.

    Args:
        folder: Folder of the cache.

    Returns:
        The cache; None if it does not exist, has another format version, or is damaged (the size of a file is not the
        size that was written).
    """
    try:
        meta = json.loads((folder / META_FILE).read_bytes())
        if meta["format_version"] != FORMAT_VERSION:
            return None
        dtype = np.dtype(meta["dtype"])
        sizes = {name: _read_size(meta[name]) for name in TOKEN_FILES}
        maps = {name: _map_tokens(folder / file, dtype, sizes[name].tokens) for name, file in TOKEN_FILES.items()}
        reference = {str(name): float(bits) for name, bits in meta["reference_bits_per_byte"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return TokenCache(folder, maps["train"], maps["held_out"], sizes["train"], sizes["held_out"], reference)


def _size_of(stream: Stream) -> StreamSize:
    return StreamSize(stream.tokens, stream.documents, stream.num_bytes, stream.unrecovered)


def _read_size(values: dict[str, Any]) -> StreamSize:
    return StreamSize(**{**values, "unrecovered": Unrecovered(**values["unrecovered"])})


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
