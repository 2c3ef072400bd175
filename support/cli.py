"""The command line of every entry point."""

import dataclasses
import difflib
import os
import sys
from pathlib import Path

from safetensors import SafetensorError


def parse_args(config_class, argv, positional=None):
    """The dataclass filled from --key=value and --key value; bare words go to the field `positional`, a tuple."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    values, words, argv = {}, [], list(argv)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if key not in fields or key == positional:
            near = difflib.get_close_matches(key, fields, 1)
            flags = " ".join("--" + name for name in fields if name != positional)
            raise ValueError(
                f"--{key} is no flag; "
                + (f"did you mean --{near[0]}?" if near else f"the flags are {flags}")
            )
        kind = fields[key].type
        # `int | None` reads an int
        kind = next(k for k in getattr(kind, "__args__", (kind,)) if k is not type(None))
        if not equals:
            if kind is bool and argv[:1] not in (["true"], ["false"]):
                argv.insert(0, "true")  # a bare --flag
            if not argv:
                raise ValueError(f"--{key} needs a value")
            value = argv.pop(0)
        try:
            values[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{key} {value!r} is not {wanted}") from None
    if positional:
        values[positional] = tuple(words)
    elif words:
        raise ValueError(
            f"{words[0]!r} is not a flag; flags look like --{next(iter(fields))} VALUE"
        )
    return config_class(**values)


def one_line(error):
    """What the user is told of an error that a user can cause; None: it is ours, and wants a traceback."""
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"{place}; free space or choose another folder"
    return str(error) if isinstance(error, (ValueError, SafetensorError)) else None


def run(main):
    """Call main(argv); what a user can cause ends in one line on stderr and a non-zero exit."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # `.. | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {line}")
