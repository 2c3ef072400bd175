"""The files of an evaluation: rows in, rows out, and tables for the reader.

Most are made by other people's tools, and a wrong one costs a judge's money or a night of answers.
So each is checked before any work, and each error says where the fault stands.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from support.fields import Fields, is_whole, shown
from support.files import written_whole
from support.rows import read_rows

MEND = "mend the line"


def rows_of(path: str | Path) -> list[tuple[str, object]]:
    """[(file:line, row)] of a JSON or JSONL file; ValueError when there are none."""
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path}: empty; give the official file, or one that this program wrote")
    return rows


def require(row: object, where: str, *names: str) -> Fields:
    """The row's fields. ValueError when it is no JSON object with fields of these names."""
    for name in names:
        if not isinstance(row, dict) or name not in row:
            raise ValueError(
                f"{where}: no {name!r}; give the official file, or one that this program wrote"
            )
    return Fields(row, where, MEND)


def name_or_number(fields: Fields, name: str) -> int | str:
    """A question's id: FastChat's are numbers, a conversation's is FILE#N."""
    value = fields.content[name]
    if not isinstance(value, str) and not (is_whole(value) and abs(value) < 2**63):
        raise fields.wrong(name, "a text or a whole number")
    return value


def require_turns(turns: object, where: str) -> list[str]:
    """The same turns, known to be one or two texts; else ValueError."""
    is_pair = isinstance(turns, list) and 1 <= len(turns) <= 2
    if not is_pair or not all(isinstance(text, str) for text in turns):
        raise ValueError(f"{where}: turns are one or two texts, not {shown(turns)}; mend the line")
    return turns


def write_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, whole or not at all.

    ASCII, as FastChat writes: some readers end a line at other characters than the newline, which
    an answer may contain.
    """
    with written_whole(path) as partial, open(partial, "w", encoding="ascii") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def table_head(columns: list[str]) -> str:
    """The two lines that open a markdown table."""
    return table_row(columns) + "\n" + "|---" * len(columns) + "|"


def table_row(cells: list[str]) -> str:
    """A line of a markdown table."""
    return "| " + " | ".join(cells) + " |"
