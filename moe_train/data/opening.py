"""Opening of data files: compressed files are unpacked, and the encoding is found, both by the file's first bytes."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from moe_train.config.errors import UsageError

HEAD_BYTES = 4096  # enough for every mark, and for a guess of an encoding without a mark
_CHUNK_BYTES = 2**16  # packed bytes read at a time
LARGEST_ZSTD_WINDOW_LOG = 31 if sys.maxsize > 2**32 else 30  # as `zstd --long=31` writes, beyond its default of 27
# The two bytes behind a skippable frame's first one, which pzstd writes before the data.
_ZSTD_SKIPPABLE = (b"\x2a\x4d\x18", range(0x50, 0x60))
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a text may begin with BZh, but not with a block behind it
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file (data.source=parquet)",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"\x04\x22\x4d\x18": "an lz4 file: unpack it, or pack it with gzip or zstd",
    b"%PDF-": "a PDF: turn it into text",
    b"ARROW1\x00": "an Arrow file: use the folder that save_to_disk wrote (data.source=huggingface)",
    b"\x80\x04\x95": "a pickle: it is not read, because it can hold code",
}
# The longer marks come first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@contextmanager
def open_data_file(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading its bytes; a file packed by gzip, bzip2, xz or zstd is unpacked while it is read.

    Args:
        path: File to open; its name says nothing about how it is packed.

    Yields:
        The unpacked bytes.

    Raises:
        UsageError: If it cannot be read, is a known format of another kind, or is damaged or cut short; also for
            errors of this kind in the block that reads it.
    """
    try:
        with open(path, "rb") as raw:
            head = raw.peek(HEAD_BYTES)[:HEAD_BYTES]
            packing = packing_of(head)
            if packing is None:
                _check_format(path, head)
                yield raw
                return
            with _unpacked(raw, packing, path) as unpacked:
                _check_format(path, unpacked.peek(HEAD_BYTES))
                yield unpacked
    except (zlib.error, lzma.LZMAError, zstd.ZstdError, EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: cannot be unpacked, it is damaged or cut short: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise UsageError(f"{path}: a document is larger than the memory: split it, or give it as rows") from error


def packing_of(head: bytes) -> str | None:
    """Name the compression of a file by its first bytes: gzip, bzip2, xz, zstd, or None."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:3] == b"BZh" and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    if head[:6] == b"\xfd7zXZ\x00":
        return "xz"
    skippable, first = _ZSTD_SKIPPABLE
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == skippable and head[0] in first):
        return "zstd"
    return None


def _unpacked(raw: BinaryIO, packing: str, path: Path) -> BufferedReader:
    source: Any
    if packing == "gzip":
        source = gzip.GzipFile(fileobj=raw)
    elif packing == "bzip2":
        source = _Streams(raw, path, "bzip2", bz2.BZ2Decompressor)
    elif packing == "xz":
        source = _Streams(raw, path, "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=b"\0")
    else:
        options = {int(zstd.DecompressionParameter.window_log_max): LARGEST_ZSTD_WINDOW_LOG}
        source = zstd.ZstdFile(raw, options=options)
    return BufferedReader(source)


class _Streams(io.RawIOBase):
    """Unpacked bytes of a file of one or more streams, each of which must begin well.

    BZ2File and LZMAFile take a stream that does not begin well, and all behind it, for the end of the file.
    """

    def __init__(
        self,
        raw: BinaryIO,
        path: Path,
        packing: str,
        begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor],
        padding: bytes = b"",
    ) -> None:
        """Begin before the first stream.

        Args:
            raw: Packed file, at its start.
            path: Path of the file, for messages.
            packing: Name of the compression, for messages.
            begin: Makes a decompressor of one stream.
            padding: Byte that may fill the space behind a stream; empty where the format has none.
        """
        self._raw, self._path, self._packing, self._begin, self._padding = raw, path, packing, begin, padding
        self._stream = begin()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next unpacked bytes, and return their number; 0 at the end of the last stream."""
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._next_stream()
                if not packed:
                    return 0
            elif self._stream.needs_input:
                packed = self._raw.read(_CHUNK_BYTES)
                if not packed:
                    raise EOFError("the last stream has no end")
            try:
                found = self._stream.decompress(packed, len(buffer))
            except (OSError, lzma.LZMAError) as error:
                raise UsageError(
                    f"{self._path}: cannot be unpacked, it is damaged before byte {self._raw.tell():,}: {error}"
                ) from error
            if found:
                buffer[: len(found)] = found
                return len(found)

    def _next_stream(self) -> bytes:
        """Begin the stream behind the one that ended, and return its first bytes; none at the end of the file."""
        packed = self._stream.unused_data.lstrip(self._padding)
        while not packed:
            chunk = self._raw.read(_CHUNK_BYTES)
            if not chunk:
                return b""
            packed = chunk.lstrip(self._padding)
        packed += self._raw.read(max(0, HEAD_BYTES - len(packed)))
        if packing_of(packed[:HEAD_BYTES]) != self._packing:
            raise UsageError(
                f"{self._path}: cannot be unpacked to its end: no {self._packing} stream begins at byte "
                f"{self._raw.tell() - len(packed):,}, behind the end of another: it is damaged, or something was "
                "written behind it"
            )
        self._stream = self._begin()
        return packed


def encoding_of(head: bytes) -> tuple[str, int]:
    """Find the encoding of a text by its first bytes.

    Without a byte order mark it is UTF-8, unless every second byte is mostly zero and the others are not: then it is
    UTF-16, which would pass as UTF-8 with a zero between all letters.

    Args:
        head: First bytes of the text.

    Returns:
        Name of the encoding, and the number of bytes of its mark.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    pairs = len(head) // 2
    zeros = [head[: 2 * pairs][parity::2].count(0) for parity in (0, 1)]
    for zero, encoding in ((0, "utf-16-be"), (1, "utf-16-le")):
        if pairs >= 2 and zeros[zero] > 0.7 * pairs and zeros[1 - zero] < 0.05 * pairs:
            return encoding, 0
    return "utf-8", 0


def _check_format(path: Path, head: bytes) -> None:
    for mark, name in _OTHER_FORMATS.items():
        if head.startswith(mark):
            raise UsageError(f"{path}: is {name}")
    if head[257:262] == b"ustar":
        raise UsageError(f"{path}: is a tar archive: unpack it")
