"""Token sequences for training and evaluation, cut from token streams. Legend: B sequences, S tokens of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.data.cache import TokenCache
from moe_train.data.order import locate_samples

IGNORED_TARGET = -100  # what torch's cross entropy ignores


@dataclass(frozen=True)
class TrainEntry:
    """One source of training sequences.

    Attributes:
        tokens: The token stream, one-dimensional.
        weight: Share of the training sequences drawn from it, relative to the other entries.
    """

    tokens: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class TrainingSequences:
    """The training sequences of all entries, by global sample index.

    Sequence k of an entry is tokens [k*S, k*S + S + 1): input and target overlap in all but one token, and consecutive
    sequences in one, so that every token but the stream's first is a target once an epoch.

    Attributes:
        entries: The sources; each holds at least one sequence.
        sequence_length: S, in tokens.
        seed: Of the order.
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
        """Sequences of each entry."""
        return tuple(max(0, (len(entry.tokens) - 1) // self.sequence_length) for entry in self.entries)

    @property
    def num_sequences(self) -> int:
        """Sequences of all entries together: samples of one epoch where there is one entry."""
        return sum(self.entry_sequences)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """The sequences of some global samples.

        Args:
            indices: int64 [B], global sample indices from 0 without end: after an epoch the next begins.

        Returns:
            int64 [B, S + 1]: inputs are [:, :-1], targets [:, 1:]. Row i depends on indices[i] alone.
        """
        length = self.sequence_length
        weights = [entry.weight for entry in self.entries]
        found = locate_samples(indices, weights, self.entry_sequences, self.seed)
        tokens_BS = np.empty((len(found.entry), length + 1), dtype=np.int64)
        for row, (entry, sequence) in enumerate(zip(found.entry.tolist(), found.sequence.tolist(), strict=True)):
            start = sequence * length
            tokens_BS[row] = self.entries[entry].tokens[start : start + length + 1]
        return tokens_BS


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of all entries, one after the other.

    Attributes:
        tokens: The token stream, one-dimensional: a mark, then each document with a mark behind it.
        sequence_length: S, in tokens.
        end_of_document: The mark; it also fills inputs behind the end.
        num_documents: Documents.
        num_bytes: Bytes of the documents as UTF-8, without marks.
        reference_bits_per_byte: What general compressors reach on the text ("gzip -9", "xz -9"); over several entries,
            each compressed on its own.
    """

    tokens: np.ndarray
    sequence_length: int
    end_of_document: int
    num_documents: int
    num_bytes: int
    reference_bits_per_byte: dict[str, float]

    @property
    def num_tokens(self) -> int:
        """Predicted tokens: all but the first mark."""
        return len(self.tokens) - 1

    @property
    def num_sequences(self) -> int:
        """Sequences of S tokens, the padded last one included."""
        return -(-self.num_tokens // self.sequence_length)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some sequences, in the order of the text.

        Args:
            indices: int64 [B], sequence numbers from 0; one that is not below `num_sequences` gives a row of padding,
                so that every rank can be given the same number of rows.

        Returns:
            Inputs and targets, both int64 [B, S]; targets behind the end are -100, every other token is one once.
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
    """Token streams as one; a single one stays on the disk, none is an empty stream."""
    if len(streams) < 2:
        return streams[0] if streams else np.empty(0, np.int64)
    # The mark that ends one stream begins the next: it is not predicted twice.
    return np.concatenate([streams[0], *(stream[1:] for stream in streams[1:])])


def join_held_out(caches: Sequence[TokenCache], sequence_length: int, end_of_document: int) -> HeldOut | None:
    """The held-out texts of several caches as one.

    Args:
        caches: One an entry.
        sequence_length: S, in tokens.
        end_of_document: The mark.

    Returns:
        The held-out text; None if there is none.
    """
    parts = [cache for cache in caches if cache.held_out.documents]
    if not parts:
        return None
    num_bytes = sum(part.held_out.num_bytes for part in parts)
    weighted: dict[str, float] = {}
    for part in parts:
        for name, bits_per_byte in part.reference_bits_per_byte.items():
            weighted[name] = weighted.get(name, 0.0) + bits_per_byte * part.held_out.num_bytes / num_bytes
    return HeldOut(
        tokens=join_streams([part.held_out_tokens for part in parts]),
        sequence_length=sequence_length,
        end_of_document=end_of_document,
        num_documents=sum(part.held_out.documents for part in parts),
        num_bytes=num_bytes,
        reference_bits_per_byte=weighted,
    )


def document_ids(tokens_BS: np.ndarray, end_of_document: int) -> np.ndarray:
    """Which document of its row each token belongs to.

    Args:
        tokens_BS: Token ids, [..., S].
        end_of_document: The mark; it belongs to the document that follows it.

    Returns:
        int64, the same shape: the number of marks up to and including each token.
    """
    return np.cumsum(np.asarray(tokens_BS) == end_of_document, axis=-1, dtype=np.int64)
