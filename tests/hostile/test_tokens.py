"""Tokens that a run is given are in nothing that it writes, prints or logs."""

from __future__ import annotations

import gzip
import io
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.reward_config import RewardConfig
from tests.hostile.runs import TRAINERS
from tests.model_factory import tiny_model
from tests.tiny_preferences import character_tokenizer

pytestmark = pytest.mark.timeout(120)

# Two of the shape that every scanner knows, and one that only its place gives away.
HUB = "hf_" + "CanaryHubToken" * 2 + "12"
ENVIRONMENT = "hf_" + "CanaryEnvironment" * 2
LOADING = "canary-in-loading-91xq77"
CANARIES = (HUB, ENVIRONMENT, LOADING)


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes as they lie there, and as they are when unpacked."""
    raw = path.read_bytes()
    yield raw
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)


def spelled(canary: str) -> list[bytes]:
    return [canary.encode(), canary.encode("utf-16-le"), canary[::-1].encode()]


def leaks(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)}: {canary}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for canary in CANARIES
        if any(form in content for content in contents(path) for form in spelled(canary))
    ]


def trackers() -> list[str]:
    """Those that write to this machine and are installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_search_finds_what_is_there(tmp_path: Path):
    (tmp_path / "plain.txt").write_text(f"token: {HUB}")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", LOADING)
    (tmp_path / "log.gz").write_bytes(gzip.compress(ENVIRONMENT.encode()))
    assert leaks(tmp_path) == [f"log.gz: {ENVIRONMENT}", f"packed.pt: {LOADING}", f"plain.txt: {HUB}"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("name", TRAINERS)
def test_tokens_of_a_run_are_written_nowhere(
    name: str,
    saved_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(variable, ENVIRONMENT)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    options: dict[str, Any] = {
        "hub_token": HUB,
        "hub_model_id": "me/tiny",
        "report_to": trackers(),
        "disable_tqdm": False,
        "model": str(saved_base),
        "model_init_kwargs": {"token": LOADING, "dtype": "float32"},
        "save_total_limit": 1,
        "run_name": "canary",
    }
    with caplog.at_level(logging.DEBUG):
        trainer = TRAINERS[name](tmp_path / "run", **options)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", {"loss": 1.0})
        trainer.save_metrics("train", {"loss": 1.0})
        again = TRAINERS[name](tmp_path / "run", **options)
        again.train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").is_file()
    assert list((tmp_path / "tensorboard").rglob("*tfevents*")) or not trackers()
    assert leaks(tmp_path) == []
    out, err = capfd.readouterr()
    for canary in CANARIES:
        assert canary not in out + err + caplog.text
        assert canary not in repr(trainer.record)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_fails_names_no_token(name: str, saved_base: Path, tmp_path: Path):
    options = {"hub_token": HUB, "model": str(saved_base), "model_init_kwargs": {"token": LOADING, "dtype": "float32"}}
    for broken in ({"lr_scheduler_type": "no such"}, {"max_grad_norm": -1.0, "beta": -1}, {"no_option": 1}):
        with pytest.raises((AlignkitError, ValueError, TypeError)) as caught:
            TRAINERS[name](tmp_path / "run", **options, **broken).train()
        assert not any(canary in str(caught.value) for canary in CANARIES)
    run = tmp_path / "run"
    assert leaks(run) == [] if run.exists() else True


def test_a_model_that_cannot_be_loaded_names_no_token(tmp_path: Path):
    from alignkit.models.load import load_model

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "strange"}')
    with pytest.raises(AlignkitError) as caught:
        load_model(tmp_path / "base", model_init_kwargs={"token": LOADING})
    assert LOADING not in str(caught.value)


@pytest.mark.parametrize("kind", [DPOConfig, RewardConfig, PPOConfig])
def test_what_is_printed_or_kept_of_a_config_has_no_token(kind: Any):
    loading = {"token": LOADING, "nested": [{"api_key": LOADING}], "revision": "main", "max_tokens": 5}
    args = kind("unused", hub_token=HUB, model_init_kwargs=loading, use_cpu=True, bf16=False, report_to=[])
    for shown in (args.to_json_string(), str(args), repr(args), str(args.to_sanitized_dict()), str(args.to_dict())):
        assert HUB not in shown
        assert LOADING not in shown
    assert (args.hub_token, args.model_init_kwargs["token"]) == (HUB, LOADING)
    kept = args.to_dict()["model_init_kwargs"]
    assert (kept["revision"], kept["max_tokens"], kept["token"]) == ("main", 5, "<TOKEN>")
