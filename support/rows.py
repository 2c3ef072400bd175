"""The rows of a file: JSON lines, a JSON array, either of them gzipped, or parquet.

Which of these a file is, its first bytes say, not its name. What a row means is not known here.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

# what files of these kinds begin with
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
# editors on Windows put it before the text
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Rows of a parquet file that become Python's objects at once.
ROWS_AT_ONCE = 1024


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a file; a row is the JSON value that it holds.

    `where` is for error messages: the file and the line, or the file and the number in its array.
    ValueError: no such file, not JSON, a damaged file, or parquet without pyarrow installed.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == PARQUET:
        yield from read_parquet(path)
    elif start.startswith(GZIP):
        try:
            with gzip.open(path, "rb") as file:
                yield from read_json(file, path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}); fetch it again") from None
    else:
        with open(path, "rb") as file:
            yield from read_json(file, path)


def read_json(file: IO[bytes], path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of JSON lines; or of an array, if the first line that is not empty begins one.

    Empty lines are passed over.
    """
    is_first = True
    # lines of bytes: str.splitlines also cuts at characters that JSON allows inside a text
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            # an array is read as a whole, from its start
            file.seek(0)
            yield from read_array(file.read().removeprefix(BYTE_ORDER_MARK), path)
            return
        is_first = False
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); fix or remove the line") from None
        yield where, row


def read_array(content: bytes, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON array."""
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        # only JSON's own errors know a line; bytes that are not UTF-8 are a ValueError, too
        line = getattr(error, "lineno", "?")
        raise ValueError(f"{path}:{line}: not JSON ({error}); fix the file") from None
    for i, row in enumerate(rows):
        yield f"{path}: conversation {i}", row


def read_parquet(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file; a field that a row does not have is None there."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            f"{path}: a parquet file, which is read with pyarrow: pip install pyarrow"
        ) from None
    try:
        file = ParquetFile(path)
        # no bar where the output is not a terminal
        count = file.metadata.num_rows
        bar = tqdm(None, f"read {path}", count, unit=" rows", disable=None)
        first = 0
        with file, bar:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for i, row in enumerate(batch.to_pylist(), first):
                    yield f"{path}: row {i}", row
                first += len(batch)
                bar.update(len(batch))
    except (ArrowException, OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path}: a damaged parquet file ({why}); fetch it again") from None
