"""The files of an evaluation: rows in, rows out."""

import json
from pathlib import Path

from conversations import read_rows


def write_lines(path, rows):
    """One JSON object a line, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    partial.replace(path)


def field(row, where, *names):
    """row[name] for each name; ValueError says where one is missing."""
    for name in names:
        if not isinstance(row, dict) or name not in row:
            raise ValueError(
                f"{where}: no {name!r}; give the official file, or one that this program wrote"
            )
    return [row[name] for name in names]


def rows_of(path):
    """[(where, row)] of a JSON or JSONL file; ValueError when there are none."""
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path}: empty; give the official file, or one that this program wrote")
    return rows


def turns_of(turns, where):
    """One or two texts."""
    if (
        not isinstance(turns, list)
        or not 1 <= len(turns) <= 2
        or not all(isinstance(t, str) for t in turns)
    ):
        raise ValueError(
            f"{where}: turns are one or two texts, not {str(turns)[:60]}; mend the line"
        )
    return turns


def check_out(out, *inputs):
    """ValueError when the result can't be written, or would overwrite what it is made from: before any work."""
    for path in inputs:
        if path and Path(path).resolve() == Path(out).resolve():
            raise ValueError(f"--out {out} is an input; give another name")
    if not Path(out).resolve().parent.is_dir() or Path(out).is_dir():
        raise ValueError(
            f"--out {out}: no such folder, or a folder itself; make it first, or give another name"
        )
