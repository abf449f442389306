"""Token sequences for training and evaluation, cut from token streams. Legend: B sequences, S tokens per sequence."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train.data.cache import TokenCache
from moe_train.data.order import locate_samples
from moe_train.data.recovery import ALL_RECOVERED, Unrecovered

IGNORED_TARGET = -100  # the target that torch's cross entropy ignores


@dataclass(frozen=True)
class TrainEntry:
    """One source of training sequences, with its weight in the mixture.

    Attributes:
        tokens: Token stream, one-dimensional.
        weight: Share of the training sequences that come from this entry, relative to the other entries.
        is_target: bool, the tokens that are to be predicted; None: all.
    """

    tokens: np.ndarray
    weight: float = 1.0
    is_target: np.ndarray | None = None


@dataclass(frozen=True)
class TrainingSequences:
    """Training sequences of all entries, by global sample index.

    Sequence k of an entry is tokens [k*S, k*S + S + 1). Input and target overlap in all tokens but one, and consecutive
    sequences share one token. So every token except the first of the stream is a target once per epoch.

    Attributes:
        entries: Sources of the sequences; each holds at least one sequence.
        sequence_length: Sequence length S, in tokens.
        seed: Seed of the order.
    """

    entries: tuple[TrainEntry, ...]
    sequence_length: int
    seed: int

    def __post_init__(self) -> None:
        if not self.entries or min(self.entry_sequences) < 1:
            raise ValueError(
                f"every entry must hold at least one sequence of {self.sequence_length} tokens; they hold "
                f"{list(self.entry_sequences)}"
            )

    @property
    def entry_sequences(self) -> tuple[int, ...]:
        """Number of sequences of each entry."""
        return tuple(max(0, (len(entry.tokens) - 1) // self.sequence_length) for entry in self.entries)

    @property
    def num_sequences(self) -> int:
        """Number of sequences of all entries: the samples per epoch where there is one entry."""
        return sum(self.entry_sequences)

    @property
    def ignores_targets(self) -> bool:
        """Whether some tokens are not to be predicted."""
        return any(entry.is_target is not None for entry in self.entries)

    def inputs_and_targets(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sequences of given global samples as a model takes them.

        Args:
            indices: Global sample indices, as for `batch`.

        Returns:
            Inputs and targets, both int64 [B, S]; a target that is not to be predicted is IGNORED_TARGET.
        """
        tokens_BS, targets_BS = self.batch(indices), None
        if self.ignores_targets:
            is_target_BS = self._cut(indices, lambda entry: entry.is_target, dtype=np.bool_, missing=True)
            targets_BS = np.where(is_target_BS[:, 1:], tokens_BS[:, 1:], IGNORED_TARGET)
        return tokens_BS[:, :-1], tokens_BS[:, 1:] if targets_BS is None else targets_BS

    def num_targets(self, indices: np.ndarray) -> int:
        """Count the targets of given global samples that are to be predicted."""
        if not self.ignores_targets:
            return len(indices) * self.sequence_length
        return int(self._cut(indices, lambda entry: entry.is_target, dtype=np.bool_, missing=True)[:, 1:].sum())

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Return the sequences of given global samples.

        Args:
            indices: int64 [B], global sample indices from 0 without an upper bound: the next epoch follows each epoch.

        Returns:
            int64 [B, S + 1]: inputs are [:, :-1], targets are [:, 1:]. Row i depends on indices[i] alone.
        """
        return self._cut(indices, lambda entry: entry.tokens, dtype=np.int64)

    def _cut(
        self, indices: np.ndarray, stream_of: Callable[[TrainEntry], np.ndarray | None], dtype: Any, missing: Any = 0
    ) -> np.ndarray:
        """Cut the sequences of given global samples out of one stream per entry. [B, S + 1]."""
        length = self.sequence_length
        weights = [entry.weight for entry in self.entries]
        found = locate_samples(indices, weights, self.entry_sequences, self.seed)
        cut_BS = np.full((len(found.entry), length + 1), missing, dtype=dtype)
        for row, (entry, sequence) in enumerate(zip(found.entry.tolist(), found.sequence.tolist(), strict=True)):
            stream = stream_of(self.entries[entry])
            if stream is not None:
                cut_BS[row] = stream[sequence * length : (sequence + 1) * length + 1]
        return cut_BS


@dataclass(frozen=True)
class HeldOut:
    """Held-out text of all entries, one after the other, cut into sequences.

    Attributes:
        tokens: Token stream, one-dimensional: an end-of-document token, then each document followed by another.
        sequence_length: Sequence length S, in tokens.
        end_of_document: Id of the end-of-document token; it also fills the inputs after the end of the text.
        num_documents: Number of documents.
        num_bytes: Bytes of the documents as UTF-8, without end-of-document tokens.
        reference_bits_per_byte: Bits per byte of general compressors on the text ("gzip -9", "xz -9"). Several entries
            are compressed separately. Empty where decoding does not give the text back: there is nothing to compare.
        unrecovered: What decoding the tokens does not give back. If there is any, bits per byte mean nothing.
    """

    tokens: np.ndarray
    sequence_length: int
    end_of_document: int
    num_documents: int
    num_bytes: int
    reference_bits_per_byte: dict[str, float]
    unrecovered: Unrecovered = ALL_RECOVERED

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens: all tokens except the first."""
        return len(self.tokens) - 1

    @property
    def num_sequences(self) -> int:
        """Number of sequences of S tokens, the padded last one included."""
        return -(-self.num_tokens // self.sequence_length)

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """Convert a mean cross-entropy to bits per byte of text; None where decoding does not give the text back."""
        return None if self.unrecovered else nats_per_token / math.log(2) * self.num_tokens / self.num_bytes

    def describe_loss(self) -> str:
        """Say what of the text decoding does not give back."""
        return self.unrecovered.describe(self.num_documents, self.num_bytes)

    def count_inputs(self, indices: np.ndarray, vocab_size: int) -> np.ndarray:
        """Count how often every token id is an input of given sequences, padding left out.

        Args:
            indices: int64 sequence numbers from 0.
            vocab_size: Number of token ids.

        Returns:
            int64 [vocab_size].
        """
        counts, length = np.zeros(vocab_size, dtype=np.int64), self.sequence_length
        for sequence in np.asarray(indices).tolist():
            tokens = self.tokens[sequence * length : sequence * length + length + 1]
            counts += np.bincount(tokens[:-1], minlength=vocab_size)
        return counts

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return given sequences, which are numbered in the order of the text.

        Args:
            indices: int64 [B], sequence numbers from 0. A number of `num_sequences` or more gives a row of padding, so
                that every rank can have the same number of rows.

        Returns:
            Inputs and targets, both int64 [B, S]. Every predicted token is a target once; the targets after the end of
            the text are -100.
        """
        length = self.sequence_length
        inputs_BS = np.full((len(indices), length), self.end_of_document, dtype=np.int64)
        targets_BS = np.full((len(indices), length), IGNORED_TARGET, dtype=np.int64)
        for row, sequence in enumerate(np.asarray(indices).tolist()):
            tokens = self.tokens[sequence * length : sequence * length + length + 1]
            if len(tokens) > 1:
                inputs_BS[row, : len(tokens) - 1] = tokens[:-1]
                targets_BS[row, : len(tokens) - 1] = tokens[1:]
        return inputs_BS, targets_BS


def join_streams(streams: Sequence[np.ndarray]) -> np.ndarray:
    """Join token streams into one.

    Args:
        streams: Token streams, one-dimensional; each begins and ends with an end-of-document token.

    Returns:
        The joined stream, in memory. A single stream stays a memory map. Without streams it is empty.
    """
    if len(streams) < 2:
        return streams[0] if streams else np.empty(0, np.int64)
    # The end-of-document token that ends one stream also begins the next: it must not be predicted twice.
    return np.concatenate([streams[0], *(stream[1:] for stream in streams[1:])])


def join_held_out(caches: Sequence[TokenCache], sequence_length: int, end_of_document: int) -> HeldOut | None:
    """Join the held-out texts of several caches into one.

    Args:
        caches: Token caches, one per entry.
        sequence_length: Sequence length S, in tokens.
        end_of_document: Id of the end-of-document token.

    Returns:
        The held-out text; None if no document is held out.
    """
    parts = [cache for cache in caches if cache.held_out.documents]
    if not parts:
        return None
    num_bytes = sum(part.held_out.num_bytes for part in parts)
    lost = sum((part.held_out.unrecovered for part in parts), ALL_RECOVERED)
    weighted: dict[str, float] = {}
    for part in [] if lost else parts:
        for name, bits_per_byte in part.reference_bits_per_byte.items():
            weighted[name] = weighted.get(name, 0.0) + bits_per_byte * part.held_out.num_bytes / num_bytes
    return HeldOut(
        tokens=join_streams([part.held_out_tokens for part in parts]),
        sequence_length=sequence_length,
        end_of_document=end_of_document,
        num_documents=sum(part.held_out.documents for part in parts),
        num_bytes=num_bytes,
        reference_bits_per_byte=weighted,
        unrecovered=lost,
    )


def document_ids(tokens_BS: np.ndarray, end_of_document: int) -> np.ndarray:
    """Number each token by its document within the row.

    Args:
        tokens_BS: Token ids, [..., S].
        end_of_document: Id of the end-of-document token, which belongs to the document after it.

    Returns:
        int64, the same shape: the number of end-of-document tokens up to and including each token.
    """
    return np.cumsum(np.asarray(tokens_BS) == end_of_document, axis=-1, dtype=np.int64)
