"""The command line of every entry point: a dataclass's fields are its flags.

The comment lines directly above a field are what --help says of the flag.
"""

import ast
import dataclasses
import errno
import difflib
import inspect
import io
import itertools
import os
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

Config = typing.TypeVar("Config")

# How a message calls what a flag of this type wants.
WANTED = {bool: "true or false", int: "a whole number", float: "a number"}

# What asks for help, as a program's first word or among its flags.
HELP = "-h", "--help"

# An error's line is cut in its middle where it is longer: its start says the place, its end the
# remedy, and a value of a megabyte says no more than its beginning.
LONGEST_START = 700
LONGEST_END = 300

# What a shell reports of a program that a signal ended: 128 and the signal's number.
ENDED_BY_CTRL_C = 128 + 2
ENDED_BY_PIPE = 128 + 13


def parse_args(
    config_class: type[Config], argv: list[str], positional: str | None = None
) -> Config:
    """The dataclass, filled from --key=value and --key value; a bool also from a bare --key.

    positional: the field, a tuple, that takes the words which belong to no flag. ValueError: a
    flag that is none, or a value that is not of its field's type. Help: one of the words asks for
    it.
    """
    kinds = {}
    for field in dataclasses.fields(config_class):
        if field.name != positional:
            kinds[field.name] = value_type(field)

    values = {}
    words = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if word in HELP:
            raise Help(config_class, positional)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        if key not in kinds:
            raise ValueError(f"--{key} is no flag; {nearest_flag(key, kinds)}")
        if not equals:
            text = next_value(key, kinds[key], waiting)
        values[key] = converted(key, kinds[key], text)

    if positional:
        values[positional] = tuple(words)
    elif words:
        first_flag = next(iter(kinds))
        raise ValueError(f"{words[0]!r} is not a flag; flags look like --{first_flag} VALUE")
    return config_class(**values)


def value_type(field: dataclasses.Field) -> type:
    """int of a field `x: int`; and of `x: int | None` too, since no flag says None."""
    for kind in typing.get_args(field.type):
        if kind is not type(None):
            return kind
    return field.type


def nearest_flag(key: str, kinds: dict[str, type]) -> str:
    near = difflib.get_close_matches(key, kinds, 1)
    if near:
        return f"did you mean --{near[0]}?"
    return "the flags are " + " ".join(f"--{name}" for name in kinds)


def next_value(key: str, kind: type, waiting: list[str]) -> str:
    """The value of a flag that came without `=`: the next word, which is taken out of `waiting`."""
    if kind is bool and waiting[:1] not in (["true"], ["false"]):
        return "true"
    if not waiting:
        raise ValueError(f"--{key} needs a value")
    return waiting.pop(0)


def converted(key: str, kind: type, text: str) -> object:
    """The text as a value of this type."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"--{key} {text!r} is not {WANTED[kind]}") from None


# ---- help


class Help(SystemExit):
    """Somebody asks for help: `run` prints it, and the program ends with 0.

    config_class: whose flags are asked for; None, where a program's commands are.
    """

    def __init__(self, config_class: type | None = None, positional: str | None = None):
        super().__init__(0)
        self.config_class = config_class
        self.positional = positional


def check_help(argv: list[str]) -> None:
    """Help, where the first word asks for it: for a program that has commands."""
    if argv and argv[0] in HELP:
        raise Help


def help_text(doc: str, wanted: Help) -> str:
    """What --help prints: how the program's docstring begins, then each flag.

    Of a program that has commands it is the whole docstring, which names them.
    """
    if wanted.config_class is None:
        return doc.strip()
    # the sentence, and the commands below it
    first, *rest = doc.strip().split("\n\n")
    commands = itertools.takewhile(lambda part: part.startswith(" "), rest)
    parts = [first, *commands]
    parts.append(inspect.cleandoc(wanted.config_class.__doc__))
    for name, default, lines in flags_of(wanted.config_class):
        title = f"{name.upper()}.." if name == wanted.positional else f"--{name}"
        if default:
            lines = [*lines, f"default: {default}"]
        parts.append("\n".join([title, *(f"    {line}" for line in lines)]))
    return "\n\n".join(parts)


def flags_of(config_class: type) -> list[tuple[str, str, list[str]]]:
    """[(field, its default as text, the comment lines directly above it)], in their order.

    The default is "" where there is none to tell: the comment says it, or it is None or empty.
    """
    comments = {}
    for class_ in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(class_):
            comments |= comments_of(class_)
    found = []
    for field in dataclasses.fields(config_class):
        lines = comments[field.name]
        said = any(line.startswith("default:") for line in lines)
        is_empty = field.default in (None, "", (), dataclasses.MISSING)
        default = "" if said or is_empty else str(field.default)
        if isinstance(field.default, bool):
            default = str(field.default).lower()
        found.append((field.name, default, lines))
    return found


def comments_of(class_: type) -> dict[str, list[str]]:
    """{field: the comment lines directly above it} of the fields that a class itself has."""
    source = textwrap.dedent(inspect.getsource(class_))
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            above = lines[first : node.lineno - 1]
            found[node.target.id] = [line.strip().removeprefix("# ") for line in above]
    return found


# ---- errors


def one_line(error: BaseException) -> str | None:
    """What the user is told of an error that a user can cause. None: ours, it wants a traceback."""
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return printable(f"{place}; {remedy_of(error)}")
    if isinstance(error, (ValueError, SafetensorError)):
        return printable(str(error))
    return None


def remedy_of(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "change its permissions, or give another path"
    if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return "give another path"
    return "free space or choose another folder"


def printable(text: str) -> str:
    """The text on one line, whatever names and values stand in it, and not too long to read."""
    text = on_one_line(text)
    if len(text) > LONGEST_START + LONGEST_END:
        text = f"{text[:LONGEST_START]} .. {text[-LONGEST_END:]}"
    return text


def on_one_line(text: str) -> str:
    """The text with `\\n` for each line break: a name may have some."""
    return "\\n".join(text.splitlines())


def check_utf8(argv: list[str]) -> None:
    """ValueError: an argument that is not UTF-8, and so could be neither printed nor encoded."""
    for number, word in enumerate(argv, 1):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"argument {number}, {word!r}, is not UTF-8 from character {error.start} on; "
                "type it again, or rename the file"
            ) from None


def print_what_can_be() -> None:
    """A character that the terminal cannot show is printed as its number, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        # tests put others in their place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def call_or_help(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Call main(argv), and print help where it is asked for."""
    try:
        main(argv)
    except Help as wanted:
        # the docstring of the program's own file
        print(help_text(main.__globals__["__doc__"], wanted), flush=True)


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(argv). What a user can cause ends in one line on stderr and a non-zero exit."""
    print_what_can_be()
    try:
        check_utf8(sys.argv[1:])
        call_or_help(main, sys.argv[1:])
    except BrokenPipeError:
        # `.. | head` has seen enough. Python flushes stdout once more when it ends, which would
        # fail with a traceback: let it flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ENDED_BY_PIPE)
    except KeyboardInterrupt:
        sys.exit(ENDED_BY_CTRL_C)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {line}")
