"""Tokenizers: bytes, a file of the `tokenizers` library, or a byte-level BPE trained on the data."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.data.digests import digest_of
from moe_train.data.tokenizer_file import (
    check_ids,
    hide_token,
    library_errors,
    open_library_tokenizer,
    parse_tokenizer_file,
    unknown_token,
)

BPE_END_OF_DOCUMENT = "<|endoftext|>"
USUAL_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)
# It matches words with the punctuation mark or blank before them, numbers of up to three digits, punctuation with the
# line end and indentation after it, and line ends with indentation. Measured on the Python standard library with 4096
# entries: 3.72 bytes per token. GPT-2's pattern gives 3.36, and a pattern without indentation after line ends 3.47.
BPE_PATTERN = (
    r"\s*[\r\n]+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|[^\S\r\n]+"
)


class Tokenizer(Protocol):
    """Encoder of text to token ids, and decoder. It is frozen, so that all callers can share one object."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_document(self) -> int:
        """Id of the end-of-document token, which no text encodes to."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the encoding of text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to token ids without end-of-document tokens, in `token_dtype(vocab_size)`.

        Raises:
            ValueError: If a text cannot be encoded, or only to the end-of-document token. It may be any of the texts.
        """

    def encode_known(self, text: str) -> list[int]:
        """Encode a text to token ids without end-of-document tokens, and refuse unknown parts.

        Raises:
            ValueError: If the vocabulary has no token for a part of the text.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode token ids to text.

        End-of-document tokens and ids without text are left out. Invalid UTF-8 becomes U+FFFD.
        """

    def recover_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """Decode the token ids of whole texts, without the tokens that stand for unknown parts.

        Raises:
            ValueError: If a text cannot be decoded.
        """


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose uint16 if it holds every token id, else uint32: uint16 needs half the disk for most vocabularies."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class ByteTokenizer:
    """Tokenizer of the 256 byte values of UTF-8, with an end-of-document token.

    Attributes:
        vocab_size: Number of ids, the end-of-document token included.
        end_of_document: Id of the end-of-document token.
        fingerprint: Digest of the encoding; a constant, because the encoding has no settings.
    """

    vocab_size: int = 257
    end_of_document: int = 256
    fingerprint: str = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to their bytes, uint16."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]

    def encode_known(self, text: str) -> list[int]:
        """Encode a text to its bytes.

        Raises:
            ValueError: If the text holds half of a surrogate pair, which has no bytes.
        """
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode the ids below 256 to text."""
        values = np.asarray(ids, dtype=np.int64)
        return values[values < self.end_of_document].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def recover_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """Decode the ids of whole texts."""
        return [self.decode(ids) for ids in batch]


@dataclass(frozen=True)
class SubwordTokenizer:
    """Tokenizer of the `tokenizers` library.

    Attributes:
        inner: The `tokenizers.Tokenizer`, in which the end-of-document token has a name that no text holds.
        vocab_size: One more than the largest id, added tokens included.
        end_of_document: Id of the end-of-document token.
        mark: Name of the end-of-document token in the file.
        unknown: Id of the token that stands for unknown parts of a text; None if there is none.
        fingerprint: Digest of the file and the end-of-document token.
        text: Contents of the file.
    """

    inner: Any
    vocab_size: int
    end_of_document: int
    mark: str
    unknown: int | None
    fingerprint: str
    text: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to token ids in parallel.

        Raises:
            ValueError: If a text cannot be encoded, or only to the end-of-document token.
        """
        dtype = token_dtype(self.vocab_size)
        with library_errors("cannot be encoded"), self._mark_for_the_unknown():
            encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
        if any((ids == self.end_of_document).any() for ids in batch):
            raise ValueError(self._meets_mark)
        return batch

    def encode_known(self, text: str) -> list[int]:
        """Encode a text to token ids, and refuse a text that needs the unknown token.

        Raises:
            ValueError: If the vocabulary has no token for a part of the text.
        """
        text.encode("utf-8")  # raises for half a surrogate pair, which makes the library panic
        with library_errors("cannot be encoded"), self._mark_for_the_unknown():  # for example a word without a token
            encoding = self.inner.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self.unknown:
                raise ValueError(f"the vocabulary has no token for {text[start:end]!r} (character {start})")
        if text and not encoding.ids:
            raise ValueError(f"the vocabulary has no token for {text!r}")
        if self.end_of_document in encoding.ids:
            raise ValueError(self._meets_mark)
        return list(encoding.ids)

    @contextmanager
    def _mark_for_the_unknown(self) -> Iterator[None]:
        """Say why the library misses its unknown token, where that is the end mark, which has another name here."""
        try:
            yield
        except Exception as error:
            if getattr(self.inner.model, "unk_token", None) != self.mark:
                raise
            raise ValueError(
                f"a part of it has no token, and the unknown token {self.mark!r} is also the end mark: name another "
                "data.end_of_document"
            ) from error

    @property
    def _meets_mark(self) -> str:
        return (
            f"a part of it is encoded to {self.mark!r} (id {self.end_of_document}), which marks the end of a document, "
            "and the vocabulary has no other token for that part"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode ids to text, without end-of-document tokens."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.end_of_document]
        return self.inner.decode(kept, skip_special_tokens=False)

    def recover_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """Decode the ids of whole texts in parallel, without the unknown token.

        Raises:
            ValueError: If the library fails.
        """
        known = [(ids if self.unknown is None else ids[ids != self.unknown]).tolist() for ids in batch]
        with library_errors("its tokens cannot be decoded"):
            return list(self.inner.decode_batch(known, skip_special_tokens=False))


def load_tokenizer_file(path: Path, end_of_document: str | None, field: str = "data.tokenizer") -> SubwordTokenizer:
    """Load a tokenizer from a JSON file of the `tokenizers` library.

    Args:
        path: File to load.
        end_of_document: Name of the end-of-document token; None searches for the usual names.
        field: Name of the setting that names the file, for messages.

    Returns:
        The tokenizer, without truncation or padding. Names of special tokens inside a text are encoded as text.

    Raises:
        UsageError: If the file does not exist, is not a tokenizer, or has no such token.
    """
    where = f"{field} ({str(path)!r})"
    try:
        text = path.read_text(encoding="utf-8")
        contents = parse_tokenizer_file(text)
        inner = open_library_tokenizer(text)
        wanted = USUAL_END_OF_DOCUMENT if end_of_document is None else (end_of_document,)
        mark = next((name for name in wanted if inner.token_to_id(name) is not None), None)
        if mark is not None:
            vocab_size, token = check_ids(inner, mark), inner.token_to_id(mark)
            hide_token(inner, contents, mark)
            inner = open_library_tokenizer(json.dumps(contents, ensure_ascii=False))
            unknown = unknown_token(inner, contents)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not a file of the tokenizers library: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if mark is None:
        reason = f"has none of {', '.join(wanted)}" if end_of_document is None else "is not in its vocabulary"
        raise UsageError(
            f"data.end_of_document ({end_of_document!r}): {where} {reason}; "
            "name the token that marks the end of a document"
        )
    return SubwordTokenizer(inner, vocab_size, token, mark, unknown, digest_of([text, token]), text)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE and save it as a file of the `tokenizers` library.

    Args:
        texts: Texts to train on.
        vocab_size: Number of entries, the 256 bytes and the end-of-document token included. The result has fewer where
            the texts do not have enough different pairs to merge.
        path: File to write.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BPE_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BPE_END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.save(str(path))
