"""Readers of file formats: each reads one file as (document name, text) pairs, and reports what is wrong with it."""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.data.files import PACKED_SUFFIXES, CorpusFile
from moe_train.data.opening import HEAD_BYTES, encoding_of, open_data_file, packing_of

MOST_LINE_BYTES = 2**30  # a longer line is no row of text but another format, and would fill the memory
PARQUET_BATCH_ROWS = 256  # rows decoded at a time; bounds memory where documents are long

Reader = Callable[[CorpusFile, str], Iterator[tuple[str, str]]]


def read_python(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    """Read a Python source file as one document. A file that is not UTF-8 gives none.

    CPython's tests contain a few files that are not UTF-8 on purpose.

    Args:
        file: File to read.
        column: Has no effect for this format.

    Yields:
        Name and text of the file.

    Raises:
        UsageError: If the file cannot be read.
    """
    try:
        yield file.name, file.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
    except OSError as error:
        raise UsageError(f"{file.path}: cannot be read: {error.strerror}") from error


def read_text(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    """Read a text file as one document.

    Args:
        file: File to read.
        column: Has no effect for this format.

    Yields:
        Name and text of the file, without its byte order mark.

    Raises:
        UsageError: If the file cannot be read, or is not UTF-8 (UTF-16 and UTF-32 are recognised).
    """
    with open_data_file(file.path) as stream:
        text = _whole_text(stream, str(file.path))
    yield file.name, text


def read_jsonl(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    """Read a file of JSON lines as one document per line; blank lines are skipped.

    A file named .json (also packed, as .json.gz) may hold one JSON value instead: an object, or a list of objects.

    Args:
        file: File to read.
        column: Key of the text in the object of each line.

    Yields:
        Name ("file:row", rows counted from 0 without blank lines) and text of each document.

    Raises:
        UsageError: If the file cannot be read, or if a line is not text, is not a JSON object, has no such key, or its
            value is not a string.
    """
    for row, (where, record) in enumerate(_json_records(file)):
        yield f"{file.name}:{row}", _column_text(record, column, where)


def _json_records(file: CorpusFile) -> Iterator[tuple[str, object]]:
    """Parse the rows of a JSON file, each with its place for messages."""
    with open_data_file(file.path) as stream:
        if _may_be_one_value(file.name) and not _begins_with_object(stream):
            value = _parsed(_whole_text(stream, str(file.path)), str(file.path))
            rows = value if isinstance(value, list) else [value]
            yield from ((f"{file.path}: row {row}", record) for row, record in enumerate(rows))
            return
        for number, line in _lines(stream, file.path):
            where = f"{file.path}:{number}"
            if line.strip() not in ("", "\ufeff"):
                yield where, _parsed(line.removeprefix("\ufeff").rstrip("\r\n"), where)


def _may_be_one_value(name: str) -> bool:
    suffixes = [suffix for suffix in PurePath(name.lower()).suffixes if suffix not in PACKED_SUFFIXES]
    return suffixes[-1:] == [".json"]


def _begins_with_object(stream: io.BufferedReader) -> bool:
    """Tell whether the first line that is not blank is a complete object, so that the file is one of JSON lines.

    What the stream's buffer does not hold is not looked at: a longer first line is taken for one of several if it does
    not begin like an indented value or a list.
    """
    head = stream.peek(HEAD_BYTES)
    encoding, mark_bytes = encoding_of(head[:HEAD_BYTES])
    text = head[mark_bytes:].decode(encoding, "ignore").lstrip()
    if not text:
        return True  # no rows
    line, end, _ = text.partition("\n")
    if not end:
        return text.startswith("{") and len(head) >= HEAD_BYTES
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(stream: io.BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """Decode the lines of a file, numbered from 1, with their line ends."""
    encoding, mark_bytes = encoding_of(stream.peek(HEAD_BYTES)[:HEAD_BYTES])
    if encoding == "utf-8":
        offset = 0
        for number in itertools.count(1):
            line = stream.readline(MOST_LINE_BYTES)
            if not line:
                return
            if len(line) == MOST_LINE_BYTES:
                raise UsageError(f"{path}:{number}: a line of {MOST_LINE_BYTES / 2**30:g} GiB or more: not JSON lines")
            yield number, _decode(line, "utf-8", f"{path}:{number}", offset)
            offset += len(line)
    stream.read(mark_bytes)
    number = 0
    decoded = io.TextIOWrapper(stream, encoding, newline="\n")
    try:
        for number, text in enumerate(decoded, 1):
            yield number, text
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}:{number + 1}: not {encoding.upper()} in this line or soon after it: {error.reason}"
            f"{_about_guess(encoding, mark_bytes)}"
        ) from error
    finally:
        decoded.detach()


def read_parquet(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    """Read one column of a Parquet file as one document per row, streamed by record batches.

    Args:
        file: File to read.
        column: Column that holds the text.

    Yields:
        Name ("file:row", rows counted from 0) and text of each document.

    Raises:
        UsageError: If the file is not a Parquet file, has no such column, or the column holds a value that is not a
            string.
    """
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file.path) as reader:
            check_column(column, reader.schema_arrow.names, str(file.path))
            for batch in reader.iter_batches(PARQUET_BATCH_ROWS, columns=[column]):
                # "a.b" also selects the field b of a column a: the column of this name is the one that is meant.
                for value in batch.column(batch.schema.get_field_index(column)).to_pylist():
                    yield f"{file.name}:{row}", checked_text(value, f"{file.path}: row {row}: column {column!r}")
                    row += 1
    except UnicodeDecodeError as error:
        raise UsageError(f"{file.path}: column {column!r}: not UTF-8 in the {row}th or a later row") from error
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        packing = _packing(file.path)
        if packing is not None:
            raise UsageError(
                f"{file.path}: is packed by {packing}: unpack it (Parquet packs its columns itself)"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{file.path}: cannot be read as Parquet in row {row} or later: {reason}") from error


def ambiguous_columns(files: Sequence[CorpusFile], column: str) -> list[str]:
    """Say which column is read where a name with dots also names a field inside another column.

    Args:
        files: Parquet files; one that cannot be read is passed over here, and reported when it is read.
        column: Column that holds the text.

    Returns:
        A line per choice; most often none.
    """
    import pyarrow
    from pyarrow import parquet

    notes: dict[str, None] = {}
    for file in files if "." in column else ():
        try:
            schema = parquet.read_schema(file.path)
            outer, names = _outer_column(schema, column), schema.names
        except (OSError, ValueError, pyarrow.ArrowException):
            continue
        if outer is not None and column in names:
            field = column.removeprefix(f"{outer}.")
            notes[
                f"text_column ({column!r}): the column of this name is read, not the field {field!r} of {outer!r}"
            ] = None
    return list(notes)


def _outer_column(schema: Any, column: str) -> str | None:
    """Name the column that holds a field of this dotted path; None if there is none."""
    for split in (i for i, letter in enumerate(column) if letter == "."):
        outer, path = column[:split], column[split + 1 :]
        if outer in schema.names and _has_field(schema.field(outer).type, path):
            return outer
    return None


def _has_field(kind: Any, path: str) -> bool:
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return False
    for field in (kind.field(i) for i in range(kind.num_fields)):
        rest = path.removeprefix(f"{field.name}.")
        if path == field.name or (rest != path and _has_field(field.type, rest)):
            return True
    return False


READERS: dict[str, Reader] = {
    "python_stdlib": read_python,
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}


def check_column(column: str, columns: list[str], where: str) -> None:
    """Check that a data set has the text column.

    Args:
        column: Name of the text column.
        columns: Columns of the data set.
        where: Name of the data set, for messages.

    Raises:
        UsageError: If the column is not among them.
    """
    if column not in columns:
        raise UsageError(f"{where}: no column {column!r} (text_column); the columns are {', '.join(sorted(columns))}")


def checked_text(value: object, where: str) -> str:
    """Return a value if it is text that UTF-8 can represent.

    Args:
        value: Value of the text column.
        where: Place of the value, for messages.

    Raises:
        UsageError: If the value is not a string, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise UsageError(f"{where} is {'null' if value is None else type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"{where} holds half of a surrogate pair at character {error.start}") from error
    return value


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise UsageError(f"{where}: JSON that cannot be read: {error}") from error


def _column_text(record: object, column: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UsageError(f"{where}: a JSON {type(record).__name__}, not an object with a {column!r} key (text_column)")
    check_column(column, list(record), where)
    return checked_text(record[column], f"{where}: column {column!r}")


def _packing(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return packing_of(file.read(HEAD_BYTES))
    except OSError:
        return None


def _whole_text(stream: io.BufferedReader, where: str) -> str:
    data = stream.read()
    encoding, mark_bytes = encoding_of(data[:HEAD_BYTES])
    return _decode(data[mark_bytes:], encoding, where, mark_bytes, _about_guess(encoding, mark_bytes))


def _decode(data: bytes, encoding: str, where: str, offset: int = 0, remark: str = "") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not {encoding.upper()} at byte {offset + error.start}: {error.reason}{remark}"
        ) from error


def _about_guess(encoding: str, mark_bytes: int) -> str:
    """Say that an encoding is a guess, where no mark told it.

    A text of UTF-16 that is cut short is UTF-8 as well, with a zero between all letters. So it is not read as such.
    """
    if mark_bytes or encoding == "utf-8":
        return ""
    return (
        "; the file has no byte order mark, and the encoding is a guess: every second byte at its start is zero. Save "
        "it as UTF-8, or take the zeros out"
    )
