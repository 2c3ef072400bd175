"""The rows of a file: JSON lines, a JSON array, either of them gzipped, or parquet.

Which of these a file is, its first bytes say, not its name. What a row means is not known here.

However long a file is, a few rows of it are held at a time. `read_rows` decodes them one by one.
`read_chunks` gives them some hundreds at a time and not decoded, for other processes to do that
with `decoded`.
"""

import codecs
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from support.fields import check_characters

# what files of these kinds begin with
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
# editors on Windows put it before the text
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# What half of a character may be written with: an escape, or bytes that JSON's decoder lets pass.
HALF = re.compile(rb"\\u[dD]|\xed")

# Rows of a parquet file that become Python's objects at once.
ROWS_AT_ONCE = 1024
# Bytes of one of its columns that are read at once; without it a whole group of rows is.
COLUMN_BYTES_AT_ONCE = 2**20

# A chunk ends at this many rows or bytes, whichever comes first: enough that sending it to another
# process costs little beside what is done with it there.
ROWS_OF_A_CHUNK = 256
BYTES_OF_A_CHUNK = 2**20

# A row above this is no conversation, but a file that has lost its newlines or a quote. Without a
# limit all of it would be read before that is said.
MOST_BYTES = 2**26


# ---- all kinds of files


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, one after the other.

    rows: (where, raw) of each, as `decoded` takes it
    done: how many bytes of the file have been read, up to here
    """

    rows: list[tuple[str, Any]]
    done: int


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a file; a row is the JSON value that it holds.

    `where` is for error messages: the file and the line, or the file and the number in its array.
    ValueError: no such file, not JSON, a damaged file, or parquet without pyarrow installed.
    """
    for where, raw, _ in raw_rows(path):
        yield where, decoded(where, raw)


def read_chunks(path: str | Path) -> Iterator[Chunk]:
    """The same rows, not decoded. A file's error stands in the place of the row that has it, so
    that rows before it, which may be wrong too, come first.
    """
    rows = []
    size = 0
    done = 0
    try:
        for where, raw, done in raw_rows(path):
            rows.append((where, raw))
            # a row of parquet is no text, and counts as none
            size += len(raw) if isinstance(raw, (str, bytes)) else 0
            if len(rows) == ROWS_OF_A_CHUNK or size >= BYTES_OF_A_CHUNK:
                yield Chunk(rows, done)
                rows = []
                size = 0
    except ValueError as error:
        rows.append(("", error))
    if rows:
        yield Chunk(rows, done)


def decoded(where: str, raw: Any) -> Any:
    """The row: of its JSON, or what parquet holds. ValueError: it is not JSON, or an error."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, (str, bytes)):
        return raw
    try:
        row = json.loads(raw)
        if HALF.search(raw if isinstance(raw, bytes) else raw.encode()):
            check_characters(row)
        return row
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}); fix or remove the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); fix or remove the line") from None


def first_bytes(path: str | Path) -> bytes:
    """The bytes that tell the kind of a file. ValueError: it cannot be read, whatever is in it."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == PARQUET:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{path}: a parquet file, which is read with pyarrow: pip install pyarrow"
            ) from None
    return start


def raw_rows(path: str | Path) -> Iterator[tuple[str, Any, int]]:
    """(where, raw, bytes of the file read so far) of each row."""
    start = first_bytes(path)
    if start == PARQUET:
        yield from read_parquet(path)
        return
    with open(path, "rb") as file:
        if not start.startswith(GZIP):
            for where, raw in read_json(file, path):
                yield where, raw, file.tell()
            return
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                for where, raw in read_json(unpacked, path):
                    yield where, raw, file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}); fetch it again") from None


def read_parquet(path: str | Path) -> Iterator[tuple[str, dict, int]]:
    """The rows of a parquet file; a field that a row does not have is None there."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    size = os.path.getsize(path)
    numbers = itertools.count()
    try:
        with ParquetFile(path, buffer_size=COLUMN_BYTES_AT_ONCE) as file:
            groups = file.num_row_groups
            for group in range(groups):
                # where in the file a row stands is not known, but how many groups come before
                done = size * (group + 1) // groups
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield f"{path}: row {next(numbers)}", row, done
    except (ArrowException, OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path}: a damaged parquet file ({why}); fetch it again") from None


# ---- JSON


def read_json(file: IO[bytes], path: str | Path) -> Iterator[tuple[str, str | bytes]]:
    """(where, JSON) of the rows of JSON lines; or of an array, if the first line that is not empty
    begins one. Empty lines are passed over.
    """
    is_first = True
    # lines of bytes: str.splitlines also cuts at characters that JSON allows inside a text
    for number in itertools.count(1):
        line = file.readline(MOST_BYTES + 1)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            file.seek(0)
            yield from read_array(file, path)
            return
        is_first = False
        if len(line) > MOST_BYTES:
            raise ValueError(
                f"{path}:{number}: a line of more than {MOST_BYTES:,} bytes; fix or remove it"
            )
        yield f"{path}:{number}", line


def read_array(file: IO[bytes], path: str | Path) -> Iterator[tuple[str, str]]:
    """(where, JSON) of each element of an array."""
    window = Window(file, path)
    window.peek()
    # behind the [
    window.at += 1
    for i in itertools.count():
        if i == 0 and window.peek() == "]":
            break
        yield f"{path}: conversation {i}", window.value()
        mark = window.peek()
        if mark == "]":
            break
        if mark != ",":
            window.fail("Expecting ',' or ']'", window.at)
        window.at += 1
    # behind the ]
    window.at += 1
    if window.peek():
        window.fail("Extra data", window.at)


SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
DIGITS = frozenset("0123456789")
# what may stand behind a number
AFTER = frozenset(" \t\n\r,]")


class Window:
    """A part of a text that is read piece by piece; what lies before `at` is done with."""

    def __init__(self, file: IO[bytes], path: str | Path):
        self.file = file
        self.path = path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0
        # lines before the window
        self.lines = 0
        self.is_last = False

    def read_on(self) -> None:
        """Move the window on. It becomes twice as long each time until something is done with, so
        that a long value is not looked at very often."""
        self.lines += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :]
        self.at = 0
        piece = self.file.read(max(BYTES_OF_A_CHUNK, len(self.text)))
        self.is_last = not piece
        try:
            self.text += self.decoder.decode(piece, final=self.is_last)
        except UnicodeDecodeError as error:
            before = self.text + error.object[: error.start].decode()
            line = self.lines + before.count("\n") + 1
            raise ValueError(
                f"{self.path}:{line}: not UTF-8 ({error.reason}); fix the file"
            ) from None

    def peek(self) -> str:
        """The next character that is no space, at `at`; "" at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.is_last:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def value(self) -> str:
        """The JSON of the value that comes next. It is decoded here only to see where it ends."""
        self.peek()
        while True:
            # What is wrong at the end of the window may be right in a longer one.
            can_grow = not self.is_last and len(self.text) - self.at <= MOST_BYTES
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not can_grow:
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                self.fail(str(error), self.at)
            else:
                # a number, though whole so far, may go on there
                is_whole = self.text[end - 1] not in DIGITS or self.text[end : end + 1] in AFTER
                if is_whole or not can_grow:
                    found = self.text[self.at : end]
                    self.at = end
                    return found
            self.read_on()

    def fail(self, why: str, position: int) -> None:
        """ValueError with the line of this position in the window."""
        line = self.lines + self.text.count("\n", 0, position) + 1
        raise ValueError(f"{self.path}:{line}: not JSON ({why}); fix the file")
