"""What a secret looks like: shapes of tokens and keys, and the values that this machine knows to be secret or its own.

A scanner for source code (detect-secrets, for one) reads text line by line and judges by entropy. What goes up here is
mostly weights and a vocabulary, where every line is entropy; and the secrets that matter most, the values in this
process's environment and this machine's paths, no list of shapes can know. So the shapes are written out here.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import html
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

# No pattern matches more bytes than this; chunks of a file overlap by as much.
LONGEST_MATCH = 8192

# Shorter values cannot be told from ordinary text, neither can plain words and numbers: see `is_distinctive`.
_SHORTEST_VALUE = 8
_SHORTEST_PLAIN_VALUE = 16

_SECRET_WORDS = frozenset(
    {"TOKEN", "TOKENS", "KEY", "KEYS", "APIKEY", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS"}
    | {"CREDENTIAL", "CREDENTIALS", "AUTH", "PAT", "JWT", "COOKIE", "WEBHOOK", "DSN", "PWD", "SSHPASS"}
)
# Written as one word too: PGPASSWORD, APITOKEN.
_SECRET_ENDINGS = ("TOKEN", "PASSWORD", "PASSWD", "SECRET", "APIKEY", "SECRETKEY", "ACCESSKEY")
_HARMLESS_NAMES = frozenset({"SSH_AUTH_SOCK", "GPG_TTY", "PASS_DIR", "PWD", "OLDPWD"})


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of secret. Only the surroundings of `hints`, which are fast to find, are compared with the pattern.

    Group 1 of the pattern, where there is one, is the secret itself. A match starts at the hint, or up to `before`
    bytes earlier. `folded`: hints are found in either case.
    """

    kind: str
    pattern: re.Pattern[bytes]
    hints: tuple[bytes, ...]
    before: int = 0
    folded: bool = False


# In a JSON string or an address, the letters before a token may be the end of an escape: "\nhf_...", "%3Dhf_...".
_BEFORE = rb"(?:(?<![A-Za-z0-9_])|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4})|(?<=\\x[0-9A-Fa-f]{2})|(?<=%[0-9A-Fa-f]{2}))"
_AFTER = rb"(?![A-Za-z0-9])"
_QUOTES = rb"[\"'\\]{0,3}"
_IS = _QUOTES + rb"\s{0,8}[:=]\s{0,8}" + _QUOTES


def _token(kind: str, pattern: bytes, *hints: bytes) -> Shape:
    return Shape(kind, re.compile(_BEFORE + pattern), hints)


SHAPES: tuple[Shape, ...] = (
    _token("Hugging Face token", rb"(?:hf|api_org)_[A-Za-z0-9]{30,64}" + _AFTER, b"hf_", b"api_org_"),
    _token("Hugging Face token", rb"hf_(?:oauth|jwt)_[A-Za-z0-9_.-]{20,4000}", b"hf_oauth_", b"hf_jwt_"),
    _token("OpenAI or Anthropic key", rb"sk-(?:[a-z0-9]{2,12}-){0,3}[A-Za-z0-9_-]{20,256}", b"sk-"),
    _token("GitHub token", rb"gh[pousr]_[A-Za-z0-9]{36,255}" + _AFTER, b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"),
    _token("GitHub token", rb"github_pat_[A-Za-z0-9_]{22,255}", b"github_pat_"),
    _token("GitLab token", rb"glpat-[A-Za-z0-9_-]{20,64}", b"glpat-"),
    _token("AWS access key", rb"(?:AKIA|ASIA)[A-Z0-9]{16}" + _AFTER, b"AKIA", b"ASIA"),
    _token("Google key", rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", b"AIza"),
    _token("Slack token", rb"xox[abeoprs]-[A-Za-z0-9-]{10,250}", b"xox"),
    _token(
        "Stripe key", rb"[rs]k_(?:live|test)_[A-Za-z0-9]{16,247}", b"sk_live_", b"sk_test_", b"rk_live_", b"rk_test_"
    ),
    _token("package index token", rb"pypi-AgE[A-Za-z0-9_-]{50,1000}", b"pypi-AgE"),
    _token(
        "key of an inference service",
        rb"(?:gsk_|xai-|r8_|nvapi-)[A-Za-z0-9_-]{32,256}",
        *(b"gsk_", b"xai-", b"r8_", b"nvapi-"),
    ),
    _token("npm token", rb"npm_[A-Za-z0-9]{36}" + _AFTER, b"npm_"),
    Shape(
        "private key", re.compile(rb"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"), (b"-----BEGIN ",)
    ),
    _token("JSON Web Token", rb"eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{16,1000}", b"eyJ"),
    Shape(
        "Weights & Biases key",
        re.compile(rb"(?i:wandb[a-z_ -]{0,20}key)" + _IS + rb"([0-9a-f]{40})(?![0-9a-f])"),
        (b"wandb",),
        folded=True,
    ),
    Shape(
        "password in an address",
        re.compile(rb"[a-z][a-z0-9+.-]{1,20}://[^\s:/@\"'\\]{1,100}:([^\s:/@\"'\\]{4,100})@[a-zA-Z0-9]"),
        (b"://",),
        before=22,
    ),
    Shape(
        "secret in an assignment",
        re.compile(
            rb"(?i:api[_-]?key|api[_-]?token|access[_-]?token|auth[_-]?token|hub[_-]?token"
            rb"|secret[_-]?(?:access[_-]?)?key|account[_-]?key|client[_-]?secret"
            rb"|private[_-]?key|passw(?:or)?d|bearer)(?:"
            + _IS
            + rb"|[\"']?\s{1,4})"
            + rb"((?=[A-Za-z0-9+/_.-]{0,255}[0-9])(?=[A-Za-z0-9+/_.-]{0,255}[A-Za-z])[A-Za-z0-9+/_.-]{16,256})"
        ),
        (b"key", b"token", b"secret", b"passw", b"bearer"),
        before=16,
        folded=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A value that must not go up, spelled as it may stand in a file. `name` says whose value it is."""

    kind: str
    name: str
    spellings: tuple[bytes, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the value is ASCII, so that it is found among the runs of text of a file."""
        return self.spellings[0].isascii()


def is_distinctive(value: str) -> bool:
    """Whether a value is unlikely to occur in a file by chance, so that finding it means something."""
    if len(value) >= _SHORTEST_PLAIN_VALUE:
        return len(set(value)) > 4
    return len(value) >= _SHORTEST_VALUE and not value.isdigit() and not (value.isalpha() and value.islower())


def looks_secret(name: str) -> bool:
    """Whether an environment variable's name says that its value is secret: a word of it, as in `MY_API_KEY`."""
    words = re.split(r"[^A-Z]+", name.upper())
    return name.upper() not in _HARMLESS_NAMES and any(
        word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words
    )


def secret_needles(values: Mapping[str, str]) -> list[Needle]:
    """Return what to look for, for secrets by the name that a finding may give them.

    Each is looked for as it is, escaped for JSON, HTML or an address, in UTF-16, and in Base64. White space around it,
    such as the line break of a file that it was read from, does not count.
    """
    return [
        Needle("secret value", name, _spellings(value) + _base64_spellings(value))
        for name, value in ((name, value.strip()) for name, value in values.items())
        if is_distinctive(value)
    ]


def environment_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of the environment whose names say that they are secret, but those that name a file here."""
    environment = os.environ if environment is None else environment
    return {
        f"${name}": value
        for name, value in environment.items()
        if looks_secret(name) and not os.path.exists(os.path.expanduser(value.strip()))
    }


def path_needles(paths: Iterable[str | Path | None]) -> list[Needle]:
    """Return what to look for, for folders of this machine: each as given and resolved, but not `/`."""
    found: dict[str, None] = {}
    for path in paths:
        if path is None:
            continue
        absolute = os.path.abspath(os.path.expanduser(path))
        for text in (absolute, os.path.realpath(absolute)):
            if len(Path(text).parts) > 1:
                found[text] = None
    return [Needle("path of this machine", "", _spellings(text)) for text in found]


def machine_paths(*more: str | Path | None) -> list[Needle]:
    """Return the home, working and temporary folders of this process, `more`, and its user's name in a home path."""
    needles = path_needles([Path.home(), Path.cwd(), tempfile.gettempdir(), *more])
    names = {Path.home().name, os.environ.get("USER", ""), os.environ.get("LOGNAME", "")}
    with contextlib.suppress(KeyError, OSError):  # no such user in the password database
        names.add(getpass.getuser())
    homes = tuple(
        spelling
        for name in sorted(names - {"", "root", "user"})
        for home in (f"/home/{name}", f"/Users/{name}", f"\\Users\\{name}")
        for spelling in _spellings(home)
    )
    return [*needles, Needle("user name in a path", "", homes)] if homes else needles


def _spellings(value: str) -> tuple[bytes, ...]:
    escaped, in_html = json.dumps(value)[1:-1], html.escape(value)
    texts = [value, escaped, json.dumps(value, ensure_ascii=False)[1:-1], value.replace("/", "\\/")]
    for address in (quote(value), quote(value, safe="")):
        texts += [address, re.sub("%..", lambda found: found[0].lower(), address)]
    # As `html` and as Jinja write it, and as Jinja writes JSON in a page.
    texts += [in_html, html.escape(value, quote=False), in_html.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")]
    texts.append(re.sub("[&<>']", lambda found: f"\\u{ord(found[0]):04x}", escaped))
    spelled = [text.encode() for text in texts] + [value.encode("utf-16-le"), value.encode("utf-16-be")]
    return tuple(dict.fromkeys(spelled))


def _base64_spellings(value: str) -> tuple[bytes, ...]:
    """Spell the middle of a value in Base64, for the three ways in which it may lie on groups of three bytes."""
    raw, spelled = value.encode(), []
    for shift in range(3):
        whole = raw[(3 - shift) % 3 :]
        encoded = base64.b64encode(whole[: len(whole) // 3 * 3])
        if len(encoded) >= 12:
            spelled += [encoded, encoded.translate(bytes.maketrans(b"+/", b"-_"))]
    return tuple(dict.fromkeys(spelled))
