"""Answers that survive: what a run has answered so far stands in a file beside its result.

    with KeptAnswers(out, run, vocab_size) as kept:
        for i, answer in speaker.answer_each(prompts, config, kept.part("first")):
            ..
        with written_whole(out) as partial:
            ..

OUT.partial is of JSON lines. The first says what the answers depend on; each of the others is an
answer, written as its batch ends. The same command goes on with them, and makes the file that it
would have made at once. A command that differs is refused by what differs. When the result is
written the file is removed.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.fields import Fields, is_whole, parse_object, shown
from support.files import is_at, naming, try_lock

REMEDY = "remove the file to begin again, or give another name"
# rows of a file of prompts, at most
MOST_ROWS = 2**31


class Kept(NamedTuple):
    """An answer as the file has it. Its text stands there, too, for a reader."""

    ids: list[int]
    finish: str


def rows_sha256(rows: list) -> str:
    """The sha256 of JSON values: what was asked."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_out(out: str, *inputs: str) -> None:
    """ValueError when a result cannot be written, or would replace what it is made from."""
    for path in inputs:
        if path and os.path.realpath(path) == os.path.realpath(out):
            raise ValueError(f"{out} is an input; give another name for the result")
    if not Path(os.path.realpath(out)).parent.is_dir() or Path(out).is_dir():
        raise ValueError(
            f"{out}: no such folder, or a folder itself; make it first, or give another name"
        )


class KeptAnswers:
    """The answers of a run: those of an earlier call, and each batch as it is made.

    run: {what the answers depend on: its value}, all of JSON's kinds
    began: when the first call began, in seconds since 1970

    ValueError: the file is of another run, or of no run, or another process writes it.
    """

    def __init__(self, out: str | Path, run: dict, vocab_size: int):
        self.path = Path(f"{out}.partial")
        self.run = json.loads(json.dumps(run))
        self.vocab_size = vocab_size
        self.began = time.time()
        # {(part, row): answer}
        self.answers = {}

    def part(self, name: str) -> "Part":
        """The answers to one list of prompts; a run may have several lists."""
        return Part(self, name)

    def __enter__(self) -> "KeptAnswers":
        self.file = self.locked_file()
        try:
            self.read()
        except BaseException:
            self.file.close()
            raise
        if self.answers:
            print(f"{self.path}: going on after {len(self.answers):,} answers", file=sys.stderr)
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Without an answer there is nothing to keep. While the file is still locked: who waits for
        # it shall find another one.
        is_over = kind is None or not self.answers
        if is_over:
            self.path.unlink(missing_ok=True)
        # what a full disk did not take cannot be flushed either
        with suppress(OSError):
            self.file.close()
        if is_over:
            return
        if issubclass(kind, KeyboardInterrupt):
            kept = f"{len(self.answers):,} answers are kept in {self.path}"
            print(f"\n{kept}; the same command goes on", file=sys.stderr)

    def locked_file(self):
        """The file, open. ValueError: another process is at it."""
        while True:
            # "a": it is neither emptied nor created anew where it is there
            file = open(self.path, "a+b")
            if not try_lock(file, self.path):
                file.close()
                raise ValueError(
                    f"{self.path} is being written by another process; wait for it, or give "
                    "another name"
                )
            # it may have been removed after it was opened, before it was locked
            if is_at(file, self.path):
                return file
            file.close()

    def read(self) -> None:
        """What an earlier call left; a new file gets its first line."""
        self.file.seek(0)
        # every whole line ends in a newline, so what a kill cut short stands after the last one
        *lines, rest = self.file.read().split(b"\n")
        head = json.dumps({"run": self.run, "began": self.began})
        if not lines:
            # a first line that was cut short begins as ours does
            start = head.encode()[:8]
            if rest[:8] != start[: len(rest)]:
                raise ValueError(f"{self.path}: not a file of answers; {REMEDY}")
            self.file.truncate(0)
            self.write([head])
            return

        for number, line in enumerate(lines, 1):
            where = f"{self.path}:{number}"
            fields = Fields(parse_object(line, where, REMEDY), where, REMEDY)
            if number == 1:
                self.began = fields.above_0("began", 1e12)
                self.check_run(fields.object("run").content, len(lines) - 1)
            else:
                self.read_answer(fields)
        # half a line is dropped: its batch is answered again
        self.file.truncate(sum(len(line) + 1 for line in lines))

    def check_run(self, theirs: dict, answers: int) -> None:
        """ValueError names the first thing in which another run differs."""
        for name in self.run | theirs:
            ours_is, theirs_is = self.run.get(name), theirs.get(name)
            if ours_is != theirs_is:
                raise ValueError(
                    f"{self.path}: made with {name} {shown(theirs_is)}, not {shown(ours_is)}; "
                    f"the command used then resumes its {answers:,} answers; {REMEDY}"
                )

    def read_answer(self, fields: Fields) -> None:
        """A line that is an answer."""
        part = fields.text("part")
        row = fields.whole("row", 0, MOST_ROWS)
        finish = fields.text("finish")
        if finish not in ("stop", "length"):
            raise fields.wrong("finish", "stop or length")
        ids = fields.content.get("ids")
        is_list = isinstance(ids, list) and all(is_whole(i) for i in ids)
        if not is_list or not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"{fields.place}: ids are no list of token ids; {REMEDY}")
        self.answers[part, row] = Kept(ids, finish)

    def write(self, lines: list[str]) -> None:
        """Whole lines, in one piece, and out of this process: a kill costs none of them."""
        with naming(self.path):
            self.file.write("".join(f"{line}\n" for line in lines).encode())
            self.file.flush()


class Part:
    """The answers to one list of prompts, by their places in it."""

    def __init__(self, kept: KeptAnswers, name: str):
        self.kept = kept
        self.name = name

    def find(self, rows: list[int]) -> list[Kept] | None:
        """The answers of these rows, a batch; None unless all are there.

        A batch is made whole or not at all: fewer rows might be rounded otherwise.
        """
        answers = self.kept.answers
        found = [answers[self.name, row] for row in rows if (self.name, row) in answers]
        return found if len(found) == len(rows) else None

    def add(self, rows: list[int], answers: list, texts: list[str]) -> None:
        """Keep a batch's answers, each an (ids, finish)."""
        lines = []
        for row, (ids, finish), text in zip(rows, answers, texts):
            answer = {"part": self.name, "row": row, "text": text, "finish": finish, "ids": ids}
            lines.append(json.dumps(answer))
        self.kept.write(lines)
        for row, (ids, finish) in zip(rows, answers):
            self.kept.answers[self.name, row] = Kept(ids, finish)
