"""JSON objects from a disk, read field by field: what type and range each must have is said where
it is read.

    fields = read_fields(folder / "config.json")
    width = fields.whole("hidden_size", 1, 2**17)

A field that is missing or of another kind is a ValueError of one line: the place, the value and
what to do about it.
"""

import json
import math
from pathlib import Path

# what a file that was broken on its way needs
FETCH = "fetch the file again"
# characters of a value that a message shows
SHOWN = 80
# "not given", where None is a value
NO_DEFAULT = object()


def read_fields(path: str | Path, remedy: str = FETCH) -> "Fields":
    """The object in a JSON file. ValueError: no such file, or one that holds none."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {remedy}") from None
    return Fields(parse_object(content, str(path), remedy), str(path), remedy)


def parse_object(content: bytes, place: str, remedy: str = FETCH) -> dict:
    """The object that JSON holds, in UTF-8.

    ValueError: no JSON, no object, a name twice in one object (which of the two counts?), or half
    of a character, which could not be printed or tokenized.
    """
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=without_doubles)
        check_characters(parsed)
    # RecursionError: brackets without an end
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); {remedy}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{place}: not a JSON object; {remedy}")
    return parsed


def without_doubles(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{shown(double)} stands twice in one object")
    return found


def check_characters(value: object) -> None:
    """ValueError: a text in this JSON value holds half of a surrogate pair, as `\\ud800` makes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is half of a character") from None


def shown(value: object) -> str:
    """A value as a message shows it."""
    # the digits of a huge number are not even computed: Python refuses to
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a number of more than 80 digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}.."


def is_whole(value: object) -> bool:
    """Whether a JSON value is a whole number; to Python, true is the number 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    if isinstance(value, float):
        return math.isfinite(value)
    # a whole number beyond the floats cannot be computed with
    return is_whole(value) and abs(value) < 2**1000


class Fields:
    """The fields of one JSON object, at a place that messages name.

    Each method takes a field's name and gives its value. Where the field is missing or null it
    gives `default`, and without one it is an error.
    """

    def __init__(self, content: dict, place: str, remedy: str = FETCH, within: str = ""):
        """within: what stands before a name in messages, "rope_scaling." for an object's field."""
        self.content = content
        self.place = place
        self.remedy = remedy
        self.within = within

    def wrong(self, name: str, wanted: str) -> ValueError:
        """The error that a field is not what is wanted."""
        value = shown(self.content[name])
        return ValueError(
            f"{self.place}: {self.within}{name} = {value} is not {wanted}; {self.remedy}"
        )

    def missing(self, name: str) -> ValueError:
        return ValueError(f"{self.place}: no {self.within}{name}; {self.remedy}")

    def has(self, name: str) -> bool:
        """Whether the field is there, and not null."""
        return self.content.get(name) is not None

    def whole(self, name: str, least: int, most: int, default=NO_DEFAULT) -> int:
        """A whole number from `least` to `most`."""
        if not self.has(name):
            return self.given(name, default)
        value = self.content[name]
        if not is_whole(value) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least:,} to {most:,}")
        return value

    def above_0(self, name: str, most: float, default=NO_DEFAULT) -> float:
        """A number above 0 and at most `most`. JSON writes some floats without a point."""
        if not self.has(name):
            return self.given(name, default)
        value = self.content[name]
        if not is_number(value) or not 0 < value <= most:
            raise self.wrong(name, f"a number above 0 and at most {most:g}")
        return value

    def number(self, name: str, least: float, most: float, default=NO_DEFAULT) -> float:
        """A number from `least` to `most`."""
        if not self.has(name):
            return self.given(name, default)
        value = self.content[name]
        if not is_number(value) or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return value

    def text(self, name: str, default=NO_DEFAULT) -> str:
        if not self.has(name):
            return self.given(name, default)
        value = self.content[name]
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def flag(self, name: str, default=NO_DEFAULT) -> bool:
        if not self.has(name):
            return self.given(name, default)
        value = self.content[name]
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def object(self, name: str, default=NO_DEFAULT) -> "Fields":
        """An object's own fields."""
        if not self.has(name):
            return self.given(name, default)
        value = self.content[name]
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, self.place, self.remedy, f"{self.within}{name}.")

    def objects(self, name: str) -> list["Fields"]:
        """The objects of an array."""
        if not self.has(name):
            raise self.missing(name)
        value = self.content[name]
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(name, "an array of objects")
        found = []
        for i, item in enumerate(value):
            found.append(Fields(item, self.place, self.remedy, f"{self.within}{name}[{i}]."))
        return found

    def given(self, name: str, default):
        """The default of a field that is not there."""
        if default is NO_DEFAULT:
            raise self.missing(name)
        return default


def file_in(folder: Path, name: str, place: str | Path) -> Path:
    """The file of this name in a folder. ValueError: a name that leads out of the folder.

    place: the file that has the name, for the message.
    """
    # a link is the owner's own: the hub's folders are made of them
    if name in ("", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"{place}: {shown(name)} is not the name of a file beside it; {FETCH}")
    return folder / name
