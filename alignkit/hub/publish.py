"""One call that publishes what a run made, or nothing at all."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from transformers import Trainer

from alignkit import __version__
from alignkit.errors import ConfigError, PublishError, printable
from alignkit.hub.secrets import Scanner, config_paths, refuse_secrets
from alignkit.hub.staging import CARD, Staged, stage
from alignkit.hub.trouble import Patience, diagnose
from alignkit.hub.upload import Target, upload
from alignkit.hub.verify import Verify, verify

_DRY = "nothing: this was a dry run"

logger = logging.getLogger(__name__)


class Published(NamedTuple):
    """Where it went.

    Attributes:
        url: of the repository.
        commit: its hash; `None` after a dry run.
        pull_request: its address, where one was opened.
        private: whether the repository is; after a dry run, whether a new one would be.
        files: names of the files that went up, or would.
        verified: what was checked afterwards, and what was not, in a sentence.
    """

    url: str
    commit: str | None
    pull_request: str | None
    private: bool
    files: tuple[str, ...]
    verified: str


def publish(
    trainer_or_dir: Trainer | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    max_retries: int = 5,
    timeout_s: float = 120.0,
) -> Published:
    """Publish an adapter or a model with its tokenizer, card, run record and pictures, and check what arrived.

    What goes up is first copied into a folder of its own, checked, and searched for secrets and paths of this machine.
    Pickles (`training_args.bin`), optimizer states, checkpoints, rollouts, critics and references never go up. A card
    that a person wrote is kept, here and there. The files on this disk are only read.

    Args:
        trainer_or_dir: a trainer, whose model is published as it is now, or the folder that one saved to.
        repo_id: `owner/name`.
        private: `None`: a new repository is private, an existing one keeps its visibility.
        branch: a branch, made from the main one if it does not exist.
        create_pr: open a pull request instead of committing.
        dry_run: print the card and the list of files, and use no network.
        token: by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: also the title of a pull request.
        base_model: the base's name on the Hub, for an adapter that was trained on a local copy.
        max_retries: attempts after the first, where the Hub is busy or the connection breaks.
        timeout_s: seconds without an answer after which an attempt has failed.

    Returns:
        Where it went. Calling this again with the same files sends nothing and makes no second commit.

    Raises:
        SecretFound: secrets or paths of this machine stand in the files; nothing was uploaded.
        ConfigError, ModelError: the arguments or the files are not fit to be published; nothing was uploaded.
        PublishError: the Hub refused or could not be reached, the disk is full, or what arrived is not what was sent.
    """
    target = make_target(repo_id, private=private, branch=branch, create_pr=create_pr, commit_message=commit_message)
    configured = trainer_or_dir.args.hub_token if isinstance(trainer_or_dir, Trainer) else None
    secrets = {"hub_token": configured} if configured else {}
    with tempfile.TemporaryDirectory(prefix="alignkit-publish-") as scratch:
        with _peft_asks_no_hub() if dry_run else contextlib.nullcontext():
            sources = _sources(trainer_or_dir, Path(scratch) / "saved", repo_id)

        def go() -> Published:
            inner = Path(scratch) / "staged"
            staged = pack(sources, inner, repo_id, token=token, secrets=secrets, base_model=base_model)
            if dry_run:
                _show(staged, repo_id)
                return Published(_url(repo_id), None, None, private is not False, staged.files, _DRY)
            patience = Patience(max_retries, timeout_s)
            return send(staged, target, token=token or configured, patience=patience, verify=verify)

        if isinstance(trainer_or_dir, Trainer) and trainer_or_dir.args.world_size > 1:
            return _on_the_first_process(trainer_or_dir, go)
        return go()


def make_target(
    repo_id: str,
    *,
    private: bool | None,
    branch: str | None,
    create_pr: bool,
    commit_message: str | None,
) -> Target:
    """Check where to publish.

    Raises:
        ConfigError: a name that the Hub would not take, or a branch together with a pull request.
    """
    check_repo_id(repo_id)
    return Target(repo_id, private, branch, create_pr, commit_message or f"Upload with alignkit {__version__}")


def pack(
    sources: Sequence[Path],
    folder: Path,
    repo_id: str,
    *,
    token: str | None,
    secrets: Mapping[str, str],
    base_model: str | None = None,
) -> Staged:
    """Copy what may go up from `sources` into `folder`, which must not exist, and search it for secrets.

    Args:
        sources, repo_id, base_model: see `stage`.
        folder: where to.
        token: the Hub's, if it is not this machine's.
        secrets: more values that must not go up, by name.

    Raises:
        SecretFound, ConfigError, ModelError, DataError: it is not fit to be published.
        PublishError: the disk is full, or something cannot be read.
    """
    try:
        folder.mkdir()
        staged = stage(sources, folder, repo_id=repo_id, base_model=base_model)
    except OSError as error:
        raise PublishError(f"the export failed before anything was sent: {diagnose(error, repo_id).text}") from error
    paths = [folder.parent, *sources]
    if staged.base is not None and Path(staged.base.here).is_dir():
        paths.append(Path(staged.base.here))
    scanner = Scanner.of_this_machine(token=token, secrets=secrets, paths=paths)
    files = {name: staged.folder / name for name in staged.files}
    refuse_secrets((*scanner.scan(files), *config_paths(files)))
    return staged


def send(staged: Staged, target: Target, *, token: str | None, patience: Patience, verify: Verify) -> Published:
    """Upload what was packed, and check what arrived.

    Raises:
        ConfigError: the repository has another visibility than asked for.
        PublishError: there is no token, the Hub refused or could not be reached, or what arrived is not what was sent.
    """
    api = HfApi(token=require_token(token), library_name="alignkit", library_version=__version__)
    uploaded = upload(api, staged, target, patience)
    checked = verify(api, staged, uploaded, target.repo_id, patience)
    url = _url(target.repo_id)
    logger.info("Published %s at commit %s: %s.", url, uploaded.commit, checked.text)
    return Published(url, uploaded.commit, uploaded.pull_request, uploaded.private, uploaded.sent, checked.text)


def require_token(token: str | None) -> str:
    """Return `token`, or the one of this machine.

    Raises:
        PublishError: there is none.
    """
    found = token or get_token()
    if not found:
        raise PublishError(
            "there is no token for the Hub. Create one with write access in its settings and run `hf auth login`, set "
            "HF_TOKEN, or pass it."
        )
    return found


def _url(repo_id: str) -> str:
    return f"{constants.ENDPOINT}/{repo_id}"


def _sources(source: Trainer | str | Path, saved: Path, repo_id: str) -> list[Path]:
    """Return the folders to take files from; a trainer's model is saved into `saved` first, as it is now."""
    if not isinstance(source, Trainer):
        return [Path(source).expanduser()]
    try:
        source.save_model(str(saved), _internal_call=True)
    except OSError as error:
        raise PublishError(f"saving the model failed: {diagnose(error, repo_id).text}") from error
    return [saved, Path(str(source.args.output_dir))]


@contextlib.contextmanager
def _peft_asks_no_hub() -> Iterator[None]:
    """Keep PEFT from asking the Hub, when it saves an adapter, for the vocabulary that its base began with.

    What that decides is whether embeddings go into the adapter whose vocabulary was resized; PEFT says so itself.
    """
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT reads this each time
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def check_repo_id(repo_id: str) -> None:
    """Check the name of a repository, its owner's included.

    Raises:
        ConfigError: the Hub would not take it.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ConfigError(f"repo_id={repo_id!r} is no name for a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise ConfigError(f"repo_id={repo_id!r} must be 'owner/name', with your user name or an organisation's")


def _on_the_first_process(trainer: Trainer, go: Callable[[], Published]) -> Published:
    """Run `go` on one process of several, and tell the others what came of it, so that none waits for ever."""
    outcome: list[Published | str | None] = [None]
    trouble: Exception | None = None
    if trainer.is_world_process_zero():
        try:
            outcome = [go()]
        except Exception as error:  # noqa: BLE001 (whatever it is: it is raised again, once the others know)
            outcome, trouble = [str(error) or type(error).__name__], error
    broadcast_object_list(outcome)
    if trouble is not None:
        raise trouble
    (found,) = outcome
    if not isinstance(found, Published):
        raise PublishError(f"the first process could not publish: {found}")
    return found


def _show(staged: Staged, repo_id: str) -> None:
    """Print what would go up: every file with its size and hash, then the card."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{repo_id}: {len(staged.files)} files would go up (dry run, nothing was sent)")
    width = max(map(len, staged.files))
    for name in staged.files:
        console.print(f"  {printable(name):<{width}}  {staged.size(name):>12,} bytes  sha256 {staged.digest(name)}")
    console.print(f"\n{CARD}:\n")
    console.print(printable((staged.folder / CARD).read_text(encoding="utf-8")))
