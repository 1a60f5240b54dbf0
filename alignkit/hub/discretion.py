"""What is left out of a run's record: values of secret options, shapes of secrets, and folders of the machine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.hub.secret_patterns import SHAPES

MASK = "…"

_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|(?:api|access|private)[_-]?key|authorization", re.IGNORECASE
)
# Options that name a token of a vocabulary.
_SPECIAL_TOKEN = re.compile(r"(?:^|[_-])(?:pad|eos|bos|unk|sep|cls|mask|image)[_-]token$", re.IGNORECASE)
# An absolute path inside a text, up to its last part; that of an address (`https://host/v1`) is none.
_FOLDERS = re.compile(
    r"(?:file://(?=/)|(?<![\w./~\\-]))(?:~?/(?=[^\s/])|[A-Za-z]:[\\/])(?:[^\s\"',;:{}\[\]()=]*[/\\])?"
)


def is_secret(name: str, value: Any) -> bool:
    """Whether an option of that name holds a secret; a number of tokens is none, and neither is a padding token."""
    rest = _SPECIAL_TOKEN.sub("", name)
    if _SECRET_NAME.search(rest) is None:
        return False
    return _SECRET_NAME.search(re.sub("token", "", rest, flags=re.IGNORECASE)) is not None or not _is_number(value)


def masked(value: Any, name: str = "") -> Any:
    """Return `value` with `<NAME>` in the place of every secret, at any depth of mappings and lists.

    Args:
        value: of an option.
        name: the option's.
    """
    if value is not None and is_secret(name, value):
        return f"<{name.upper()}>"
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float):
        return True
    with contextlib.suppress(TypeError, ValueError):
        float(value)
        return len(str(value)) <= 12
    return False


def is_path(text: str) -> bool:
    """Whether a text as a whole is a path of the machine: absolute, or said to be relative to here or home."""
    return text.startswith(("/", "~", "./", "../", "\\", "file://")) or re.match(r"[A-Za-z]:[\\/]", text) is not None


def last_part(path: str) -> str:
    """The name of a file or folder without where it lies, with the separators of any system."""
    name = path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return Path(path).resolve().name if name in ("", ".", "..") else name


def without_secrets(text: str) -> str:
    """Mask what has the shape of a secret, and leave out the folders of paths."""
    found = text.encode("utf-8", "surrogatepass")
    for shape in SHAPES:
        found = shape.pattern.sub(MASK.encode(), found)
    return _FOLDERS.sub("", found.decode("utf-8", "surrogatepass"))
