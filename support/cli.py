"""The command line of every entry point: a dataclass's fields are its flags."""

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

Config = typing.TypeVar("Config")

# How a message calls what a flag of this type wants.
WANTED = {bool: "true or false", int: "a whole number", float: "a number"}

# What a shell reports of a program that a signal ended: 128 and the signal's number.
ENDED_BY_CTRL_C = 128 + 2
ENDED_BY_PIPE = 128 + 13


def parse_args(
    config_class: type[Config], argv: list[str], positional: str | None = None
) -> Config:
    """The dataclass, filled from --key=value and --key value; a bool also from a bare --key.

    positional: the field, a tuple, that takes the words which belong to no flag. ValueError: a
    flag that is none, or a value that is not of its field's type.
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


def one_line(error: BaseException) -> str | None:
    """What the user is told of an error that a user can cause. None: ours, it wants a traceback."""
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"{place}; free space or choose another folder"
    if isinstance(error, (ValueError, SafetensorError)):
        return str(error)
    return None


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(argv). What a user can cause ends in one line on stderr and a non-zero exit."""
    try:
        main(sys.argv[1:])
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
