"""Files: hashes, JSON, and what reaches the disk."""

import hashlib
import json
import os


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """The object in a JSON file of such a directory; ValueError names the file that is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; fetch the file again")
    return content


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
