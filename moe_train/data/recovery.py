"""Text that comes back from its tokens: how much of a document decoding gives back, and how to say what it does not.

A tokenizer that lowers letters, normalizes characters or has no token for a word encodes less than the text. Its bits
per byte would be those of a shorter text, so they are not given, and must not stand beside those of gzip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_BYTES = 1024  # of the part that differs: compared exactly; the rest is taken to lose the same share


@dataclass(frozen=True)
class Unrecovered:
    """Part of a text that decoding its tokens does not give back; false if there is none.

    Attributes:
        documents: Documents that decode to another text.
        num_bytes: Bytes of these documents as UTF-8 that are missing in what they decode to.
    """

    documents: int = 0
    num_bytes: int = 0

    def __bool__(self) -> bool:
        return self.documents > 0

    def __add__(self, other: "Unrecovered") -> "Unrecovered":
        return Unrecovered(self.documents + other.documents, self.num_bytes + other.num_bytes)

    def describe(self, documents: int, num_bytes: int) -> str:
        """Say what is lost.

        Args:
            documents: Documents of the text.
            num_bytes: Bytes of the text as UTF-8.
        """
        share = self.num_bytes / max(1, num_bytes)
        shown = f"{share:.1%}" if share >= 0.001 or not self.num_bytes else "less than 0.1%"
        return (
            f"decoding the tokens gives another text for {self.documents:,} of {documents:,} documents, and "
            f"{shown} of the bytes are lost"
        )


ALL_RECOVERED = Unrecovered()


def unrecovered(pieces: Sequence[str], recovered: Sequence[str]) -> Unrecovered:
    """Compare a document with what its tokens decode to.

    Args:
        pieces: Pieces of the document, which were encoded one by one.
        recovered: Text that each piece decodes to. A blank before it is the encoder's, and no loss.
    """
    differing = [
        (piece, found)
        for piece, found in zip(pieces, recovered, strict=True)
        if found != piece and not (found.startswith(" ") and found[1:] == piece)
    ]
    return Unrecovered(int(bool(differing)), sum(lost_bytes(piece, found) for piece, found in differing))


def lost_bytes(text: str, recovered: str) -> int:
    """Count the bytes of a text, as UTF-8, that are not in another one in the same order.

    It is exact where the part of the text that differs has up to WINDOW_BYTES bytes, and the other one twice as many.
    Beyond that, the rest is taken to lose the same share.

    Args:
        text: Text that was encoded.
        recovered: Text that it decodes to.
    """
    given, found = text.encode("utf-8"), recovered.encode("utf-8")
    start = common_prefix(given, found)
    given, found = given[start:], found[start:]
    end = common_prefix(given[::-1], found[::-1])
    given, found = given[: len(given) - end], found[: len(found) - end]
    if not given:
        return 0
    window = given[:WINDOW_BYTES]
    kept = longest_common_subsequence(window, found[: 2 * WINDOW_BYTES])
    return round(len(given) * (len(window) - kept) / len(window))


def common_prefix(left: bytes, right: bytes) -> int:
    """Count the bytes that two texts have in common at their starts."""
    length = min(len(left), len(right))
    differs = np.frombuffer(left, np.uint8, length) != np.frombuffer(right, np.uint8, length)
    return int(differs.argmax()) if differs.any() else length


def longest_common_subsequence(left: bytes, right: bytes) -> int:
    """Compute the length of the longest common subsequence, with a bit for every byte of `left`.

    Source: Hyyro, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places = dict.fromkeys(right, 0)
    for place, byte in enumerate(left):
        if byte in places:
            places[byte] |= 1 << place
    every = (1 << len(left)) - 1
    unmatched = every
    for byte in right:
        matches = unmatched & places[byte]
        unmatched = ((unmatched + matches) | (unmatched - matches)) & every
    return len(left) - unmatched.bit_count()
