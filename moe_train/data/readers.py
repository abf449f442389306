"""Readers of file formats: each reads one file as (document name, text) pairs, and reports what is wrong with it."""

import json
from collections.abc import Callable, Iterator

from moe_train.config.errors import UsageError
from moe_train.data.files import CorpusFile

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
        yield file.name, _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError:
        return


def read_text(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    """Read a text file as one document.

    Args:
        file: File to read.
        column: Has no effect for this format.

    Yields:
        Name and text of the file.

    Raises:
        UsageError: If the file cannot be read or is not UTF-8.
    """
    yield file.name, _decode(_read_bytes(file), str(file.path))


def read_jsonl(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    """Read a file of JSON lines as one document per line; blank lines are skipped.

    Args:
        file: File to read.
        column: Key of the text in the object of each line.

    Yields:
        Name ("file:row", rows counted from 0 without blank lines) and text of each document.

    Raises:
        UsageError: If the file cannot be read, or if a line is not UTF-8, is not a JSON object, has no such key, or its
            value is not a string.
    """
    row = 0
    offset = 0
    try:
        with open(file.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file.path}:{number}"
                text = _decode(line, where, offset)
                offset += len(line)
                if text.strip() in ("", "\ufeff"):
                    continue
                yield f"{file.name}:{row}", _json_text(text, column, where)
                row += 1
    except OSError as error:
        raise UsageError(f"{file.path}: cannot be read: {error.strerror}") from error


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
                for value in batch.column(0).to_pylist():
                    yield f"{file.name}:{row}", checked_text(value, f"{file.path}: row {row}: column {column!r}")
                    row += 1
    except UnicodeDecodeError as error:
        raise UsageError(f"{file.path}: column {column!r}: not UTF-8 in the {row}th or a later row") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{file.path}: cannot be read as Parquet: {error}") from error


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


def _json_text(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line.removeprefix("\ufeff").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise UsageError(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: a JSON {type(record).__name__}, not an object with a {column!r} key (text_column)")
    check_column(column, list(record), where)
    return checked_text(record[column], f"{where}: column {column!r}")


def _read_bytes(file: CorpusFile) -> bytes:
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise UsageError(f"{file.path}: cannot be read: {error.strerror}") from error


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 at byte {offset + error.start}: {error.reason}") from error
