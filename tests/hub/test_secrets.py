"""The scan finds secrets wherever they lie in whatever kind of file, shows none, and leaves honest files alone."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from alignkit.errors import ConfigError
from alignkit.hub.secret_patterns import (
    LONGEST_MATCH,
    SHAPES,
    environment_secrets,
    is_distinctive,
    looks_secret,
    path_needles,
    secret_needles,
)
from alignkit.hub.secrets import Finding, Scanner, SecretFound, config_paths, refuse_secrets

CANARY = "Canary-7f3a-value/+x"
SECRETS: dict[str, str] = {
    "Hugging Face token": "hf_" + "aB3dE" * 7,
    "OpenAI or Anthropic key": "sk-proj-" + "aB3_-" * 8,
    "GitHub token": "ghp_" + "aB3dE6" * 6,
    "GitLab token": "glpat-" + "aB3-_" * 4,
    "AWS access key": "AKIA" + "ABCD1234" * 2,
    "Google key": "AIza" + "aB3-_" * 7,
    "Slack token": "xoxb-" + "1234567890-" * 2 + "abcdef",
    "Stripe key": "sk_live_" + "aB3dE6fG" * 3,
    "package index token": "pypi-AgE" + "aB3-_" * 14,
    "npm token": "npm_" + "aB3dE6" * 6,
    "key of an inference service": "gsk_" + "aB3dE6fG" * 6,
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "JSON Web Token": "eyJ" + "aB3_" * 5 + ".eyJ" + "aB3_" * 5 + "." + "aB3-" * 6,
    "Weights & Biases key": "wandb_api_key: " + "0123456789abcdef" * 2 + "01234567",
    "password in an address": "https://jane:s3cretword@example.org/x",
    "secret in an assignment": 'api_key = "Abcd1234Efgh5678"',
}
PLAIN = Scanner(())


def kinds(scanner: Scanner, data: bytes, name: str = "file") -> set[str]:
    return {finding.kind for finding in scanner.scan_bytes(name, data)}


def test_every_shape_has_an_example() -> None:
    assert {shape.kind for shape in SHAPES} == set(SECRETS)


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("around", [(b"", b""), (b'{"x": "', b'"}\n'), (b"\0\1", b"\0\xff"), (b"a b\n\n", b"\nrest")])
def test_a_secret_is_found_and_not_shown(kind: str, around: tuple[bytes, bytes]) -> None:
    secret = SECRETS[kind].encode()
    (before, after) = around
    findings = [each for each in PLAIN.scan_bytes("file", before + secret + after) if each.kind == kind]
    assert len(findings) == 1
    (finding,) = findings
    assert len(before) <= finding.offset < len(before) + len(secret)
    assert finding.line == (None if b"\0" in before else before.count(b"\n") + 1)
    told = str(finding)
    assert not any(part in told for part in _long_parts(SECRETS[kind]))


def _long_parts(secret: str) -> list[str]:
    value = secret.split("=")[-1].split(": ")[-1].split("//")[-1].strip(' "')
    return [value[i : i + 9] for i in range(len(value) - 8)] if "PRIVATE KEY" not in secret else []


@pytest.mark.parametrize("seed", range(30))
def test_no_split_hides_a_secret(seed: int) -> None:
    """Small chunks with secrets at random places: every one is found once, where it is."""
    source = random.Random(seed)
    needle = secret_needles({"$CANARY": CANARY})
    chosen = [*source.sample(sorted(SECRETS), 4), "canary"]
    alphabet = b"abc xyz,.\n" if seed % 2 else b"abc xyz,.\n\0\xfe"
    data, planted = b"", []
    for kind in chosen:
        filler = bytes(source.choices(alphabet, k=source.randint(1, 3 * LONGEST_MATCH)))
        secret = (CANARY if kind == "canary" else SECRETS[kind]).encode()
        data += filler + b"\n"
        planted.append((kind, len(data), len(data) + len(secret)))
        data += secret + b"\n"
    chunked = Scanner(tuple(needle), chunk_bytes=source.choice([100, 1000, LONGEST_MATCH, 2 * LONGEST_MATCH + 7]))
    found = chunked.scan_bytes("file", data)
    for kind, start, end in planted:
        wanted = "secret value ($CANARY)" if kind == "canary" else kind
        hits = [each for each in found if each.kind == wanted and start <= each.offset < end]
        assert len(hits) == 1, (kind, start, end)
        assert hits[0].line == (data.count(b"\n", 0, start) + 1 if seed % 2 else None)
    assert found == Scanner(tuple(needle), chunk_bytes=len(data) + 1).scan_bytes("file", data)


@pytest.mark.parametrize("place", range(97, 103))
def test_no_split_makes_a_secret_of_a_word(place: int) -> None:
    """What looks like a token from the chunk's edge on is the end of a longer word."""
    data = b"." * (place - 1) + b"x" + SECRETS["Hugging Face token"].encode() + b"." * 3 * LONGEST_MATCH
    for chunk_bytes in (100, LONGEST_MATCH + 100):
        assert Scanner((), chunk_bytes=chunk_bytes).scan_bytes("file", data) == []


@pytest.mark.parametrize("before", ["x\\n", "x\\t", "\\u0022", "x%3D", "\\x22"])
def test_an_escape_before_a_secret_is_no_part_of_it(before: str) -> None:
    assert kinds(PLAIN, f'{{"text": "{before}{SECRETS["Hugging Face token"]}"}}'.encode()) == {"Hugging Face token"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf_oauth_" + SECRETS["JSON Web Token"], "Hugging Face token"),
        ("aws_secret_access_key = wJalrXUtnFEMI1K7MDENGbPxRfiCY", "secret in an assignment"),
        ("DefaultEndpoints;AccountKey=wJalrXUtnFEMI1K7MDENGbPxRfiCY==", "secret in an assignment"),
        ("xai-" + "aB3dE6fG" * 8, "key of an inference service"),
        ("nvapi-" + "aB3-_" * 12, "key of an inference service"),
    ],
)
def test_more_shapes(text: str, kind: str) -> None:
    assert kinds(PLAIN, text.encode()) == {kind}


def test_a_secret_with_two_names_is_found_once() -> None:
    findings = PLAIN.scan_bytes("file", b'"auth_token_api_key": "Abcd1234Efgh5678"')
    assert [each.kind for each in findings] == ["secret in an assignment"]


SPELLINGS = {
    "as it is": CANARY.encode(),
    "in JSON": json.dumps(f'a"{CANARY}').encode(),
    "with escaped slashes": CANARY.replace("/", "\\/").encode(),
    "in an address": b"Canary-7f3a-value%2F%2Bx",
    "in UTF-16": CANARY.encode("utf-16-le"),
    **{f"in Base64, shifted by {n}": base64.b64encode(b"x" * n + CANARY.encode() + b"tail") for n in range(3)},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_known_value_is_found_in_any_spelling(spelling: str) -> None:
    scanner = Scanner(tuple(secret_needles({"$CANARY": CANARY})))
    for data in (SPELLINGS[spelling], b"\0\xff" * 7 + SPELLINGS[spelling] + b"\xff" * 9):
        (finding,) = scanner.scan_bytes("file", data)
        assert finding.kind == "secret value ($CANARY)"
        assert "7f3a" not in str(finding)


WILD = "p&ss<wo>'r d\"5/é"


@pytest.mark.parametrize(
    "spelled",
    [
        html.escape(WILD),
        html.escape(WILD, quote=False),
        str(escape(WILD)),
        json.dumps(WILD),
        json.dumps(WILD, ensure_ascii=False),
        'p\\u0026ss\\u003cwo\\u003e\\u0027r d\\"5/\\u00e9',  # Jinja's tojson
        quote(WILD),
        quote(WILD, safe="").lower(),
    ],
)
def test_a_value_of_many_kinds_of_characters(spelled: str) -> None:
    for value in (WILD, f"{WILD}\n"):
        (finding,) = Scanner(tuple(secret_needles({"$WILD": value}))).scan_bytes("f", f"x {spelled} y".encode())
        assert finding.kind == "secret value ($WILD)"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("add", [PngInfo.add_text, PngInfo.add_itxt])
def test_in_the_texts_of_a_picture(add: Any, packed: bool) -> None:
    texts, picture = PngInfo(), io.BytesIO()
    add(texts, "Comment", f"made with {SECRETS['Hugging Face token']}", zip=packed)
    Image.new("L", (4, 4)).save(picture, "png", pnginfo=texts)
    assert (SECRETS["Hugging Face token"].encode() in picture.getvalue()) is not packed
    assert kinds(PLAIN, picture.getvalue()) == {"Hugging Face token"}
    if packed:
        assert kinds(PLAIN, picture.getvalue()[:60]) == set(), "a broken picture is no error"


@pytest.mark.parametrize(
    ("value", "is_path"),
    [
        ("/home/alice/models/base", True),
        ("/scratch/alice", True),
        ("C:\\Users\\alice\\base", True),
        ("\\\\server\\share\\base", True),
        ("/think", False),
        ("owner/model", False),
        ("{{ '/a/b' }}", False),
        ("https://example.org/a/b", False),
    ],
)
def test_a_path_of_any_machine_in_a_configuration(value: str, is_path: bool, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("adapter_config.json", "other.json")}
    for file in files.values():
        file.write_text(json.dumps({"rank": 8, "inner": [{"place": value}]}, indent=1))
    found = config_paths(files)
    assert [(each.file, each.kind, each.line) for each in found] == [("adapter_config.json", "absolute path", 5)] * (
        is_path
    )
    assert not any(value in str(each) for each in found)


def test_inside_archives_and_weights(tmp_path: Path) -> None:
    secret = SECRETS["Hugging Face token"]
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/data.pkl", f"padding {secret} padding")
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        inner = gzip.compress(zipped.getvalue())
        entry = tarfile.TarInfo("a.zip.gz")
        entry.size = len(inner)
        archive.addfile(entry, io.BytesIO(inner))
    assert secret.encode() not in tarred.getvalue()
    (finding,) = PLAIN.scan_bytes("all.tar", tarred.getvalue())
    assert finding.file == "all.tar!a.zip.gz!(unpacked)!inner/data.pkl"
    weights = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(5)}, weights, metadata={"note": secret})
    assert [each.kind for each in PLAIN.scan({"w.safetensors": weights})] == ["Hugging Face token"]
    torch.save({"hub_token": secret, "a": torch.zeros(3)}, tmp_path / "args.bin")
    assert "Hugging Face token" in {each.kind for each in PLAIN.scan({"args.bin": tmp_path / "args.bin"})}


def test_a_broken_archive_is_searched_as_it_is() -> None:
    assert kinds(PLAIN, b"PK\x03\x04 broken " + SECRETS["npm token"].encode()) == {"npm token"}
    assert kinds(PLAIN, b"\x1f\x8b broken") == set()


def test_random_weights_and_ordinary_text_are_left_alone() -> None:
    noise = np.random.default_rng(0).standard_normal(400_000).astype(np.float32).tobytes()
    assert PLAIN.scan_bytes("w", noise) == []
    text = (
        b'{"bos_token": "<|im_start|>", "model_max_length": 8192, "password": 5123, "api_key": "your_key_here"}\n'
        b"/tmp /home /root /usr/bin hf_hub_download hf_xet sk-learn task-specific https://x.org/a:b@c AKIA ghp_ eyJ0 \n"
    )
    assert Scanner.of_this_machine().scan_bytes("t", text) == []


def test_names_and_values_of_the_environment() -> None:
    secret = (
        "MY_API_KEY",
        "HF_TOKEN",
        "aws_secret_access_key",
        "DB_PASSWORD",
        "CI-JWT",
        "GITHUB_PAT",
        "PGPASSWORD",
        "MYSQL_PWD",
    )
    plain = ("TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "PATH", "AUTHOR", "SSH_AUTH_SOCK", "COMPASS", "PWD")
    assert all(map(looks_secret, secret))
    assert not any(map(looks_secret, plain))
    assert is_distinctive("aB3dE6fG")
    assert not any(map(is_distinctive, ("short", "disabled", "1234567890", "password", "a" * 20)))
    environment = {"A_TOKEN": "x1y2z3w4", "KEY_FILE": __file__, "LANG": "C.UTF-8", "B_KEY": "/wJalrXU+tnFEMI1K7"}
    assert environment_secrets(environment) == {"$A_TOKEN": "x1y2z3w4", "$B_KEY": "/wJalrXU+tnFEMI1K7"}


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (b'"/home/jane/models/base"', True),
        (b'"\\/home\\/jane\\/models"', True),
        (b"file:///home/jane/models", True),
        (b"/home/jane/modelsets", False),
        (b"/home/janet/models", False),
        (b"/data/file.txt", True),
        (b'"/data": 512', False),
        (b"/database", False),
    ],
)
def test_paths_of_this_machine(text: bytes, is_found: bool) -> None:
    scanner = Scanner(tuple(path_needles(["/home/jane/models", "/data", "/", None])))
    assert bool(scanner.scan_bytes("f", text)) is is_found


def test_the_user_name_in_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "jane")
    scanner = Scanner.of_this_machine()
    for text in (b"/home/jane/x", b"/Users/jane/x", b"C:\\Users\\jane\\x", b'"C:\\\\Users\\\\jane"'):
        assert "user name in a path" in kinds(scanner, text), text
    assert kinds(scanner, b"jane, /home/janet, Users/jane of jane") == set()


def test_the_scanner_of_this_machine_knows_its_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_SECRET", CANARY)
    scanner = Scanner.of_this_machine(token="given-token-1", secrets={"hub_token": "other-token-2"}, paths=[tmp_path])
    text = f"{CANARY} given-token-1 other-token-2 {tmp_path}/x {Path.cwd()}/y".encode()
    assert kinds(scanner, text) == {
        "secret value ($SOME_SECRET)",
        "secret value (the Hub's token in use)",
        "secret value (hub_token)",
        "path of this machine",
    }


def test_a_name_of_a_file_is_searched_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert [each.kind for each in PLAIN.scan({SECRETS["npm token"]: tmp_path / "x"})] == ["npm token"]


def test_a_name_before_a_secret_is_no_secret_itself() -> None:
    scanner = Scanner(tuple(secret_needles({"$A": "CanarySecret", "$B": "Another-Secret-5"})))
    findings = scanner.scan_bytes("f", b'x = {"CanarySecret": "Another-Secret-5"}')
    assert len(findings) == 2
    assert not any("Canary" in str(each) or "Another" in str(each) for each in findings)


def test_findings_become_an_error() -> None:
    refuse_secrets(())
    finding = Finding("README.md", "npm token", 3, 1, "***")
    with pytest.raises(SecretFound, match=r"README\.md, line 1: npm token.*\n.*revoke") as raised:
        refuse_secrets((finding,))
    assert isinstance(raised.value, ConfigError)
    assert raised.value.findings == (finding,)
