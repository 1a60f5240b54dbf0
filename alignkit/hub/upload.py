"""Sending a staged export to the Hub: the repository, the branch, the pull request, and one commit with all files."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from alignkit.errors import ConfigError
from alignkit.hub.plain_card import is_written
from alignkit.hub.staging import CARD, Staged
from alignkit.hub.trouble import Patience

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAIN = "main"
_PULL_REQUEST = "refs/pr/"
_DANGEROUS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to publish: see `alignkit.publish` for the meaning of each."""

    repo_id: str
    private: bool | None
    branch: str | None
    create_pr: bool
    message: str

    def __post_init__(self) -> None:
        if self.create_pr and self.branch not in (None, _MAIN):
            raise ConfigError(
                f"branch={self.branch!r} and create_pr=True: a pull request is opened against the main branch. Leave "
                "one of the two out."
            )


class Uploaded(NamedTuple):
    """A commit on the Hub; `sent` are the names of the files that are in it as staged."""

    commit: str
    pull_request: str | None
    private: bool
    sent: tuple[str, ...]


class _Repository(NamedTuple):
    private: bool
    files: frozenset[str]


def upload(api: HfApi, staged: Staged, target: Target, patience: Patience) -> Uploaded:
    """Send what is staged; files of the repository that are not ours stay as they are.

    A second call with the same files sends nothing and makes no commit.

    Raises:
        ConfigError: the repository has another visibility than asked for.
        PublishError: the Hub refused or could not be reached.
    """
    sender = _Sender(api, target, patience)
    repository = sender.prepare_repository()
    dangerous = sorted(name for name in repository.files if name.rsplit("/", 1)[-1] in _DANGEROUS)
    if dangerous:
        logger.warning(
            "'%s' holds %s from an earlier upload, which may hold tokens. Look at it, delete it there, and revoke "
            "what it held.",
            target.repo_id,
            ", ".join(dangerous),
        )
    revision = sender.prepare_branch()
    names = staged.files
    # A branch may have a card that the main one, whose files were listed, lacks.
    may_have_card = CARD in repository.files or revision != _MAIN
    if may_have_card and not staged.keeps_card and sender.card_is_written(revision):
        logger.warning("%s on the Hub was written by a person and stays as it is.", CARD)
        names = tuple(name for name in names if name != CARD)
    is_pr = target.create_pr
    found = sender.commit_to_pull_request(staged, names) if is_pr else sender.commit(staged, names, revision)
    return Uploaded(found.oid, found.pr_url, repository.private, names)


class _Sender:
    """The steps of an upload, each tried until it succeeds or cannot."""

    def __init__(self, api: HfApi, target: Target, patience: Patience) -> None:
        self.api = api
        self.target = target
        self.patience = patience

    def ask(self, action: Callable[[], T], doing: str) -> T:
        """Try until it succeeds or cannot."""
        return self.patience.ask(action, doing, self.target.repo_id)

    def prepare_repository(self) -> _Repository:
        """Look at the repository; make it, private unless asked otherwise, if there is none."""
        target = self.target
        found = self.ask(self._look, "read the repository")
        if found is None:
            private = target.private is not False
            # Between the look and this somebody else may have made it, as may an attempt whose answer was lost.
            self.ask(lambda: self._create(private), "create the repository")
            return self.ask(self._look, "read the new repository") or _Repository(private, frozenset())
        if target.private is not None and target.private != found.private:
            now, wanted = ("private", "public") if found.private else ("public", "private")
            raise ConfigError(
                f"private={target.private}, but '{target.repo_id}' exists and is {now}. Its visibility is yours to "
                f"change: make it {wanted} in its settings on the Hub, or leave `private` out to keep it {now}."
            )
        logger.info("'%s' exists and stays %s.", target.repo_id, "private" if found.private else "public")
        return found

    def _look(self) -> _Repository | None:
        try:
            info = self.api.model_info(self.target.repo_id)
        except RepositoryNotFoundError:
            return None
        return _Repository(bool(info.private), frozenset(each.rfilename for each in info.siblings or ()))

    def _create(self, private: bool) -> None:
        if self._look() is None:
            self.api.create_repo(self.target.repo_id, private=private)

    def prepare_branch(self) -> str:
        """Return the branch to commit to; make it from the main branch if it is not there."""
        branch = self.target.branch
        if branch is None or branch == _MAIN:
            return _MAIN
        if branch.startswith(_PULL_REQUEST):
            return branch  # one that is open
        self.ask(lambda: self._branch(branch), f"create the branch '{branch}'")
        return branch

    def _branch(self, branch: str) -> None:
        refs = self.api.list_repo_refs(self.target.repo_id)
        if branch not in {ref.name for ref in refs.branches}:
            self.api.create_branch(self.target.repo_id, branch=branch, exist_ok=True)

    def card_is_written(self, revision: str) -> bool:
        """Whether the repository's card is a person's work."""
        with tempfile.TemporaryDirectory(prefix="alignkit-card-") as folder:

            def fetch() -> bool:
                try:
                    path = self.api.hf_hub_download(self.target.repo_id, CARD, revision=revision, local_dir=folder)
                except EntryNotFoundError:
                    return False
                return is_written(path)

            return self.ask(fetch, "read the card")

    def commit(self, staged: Staged, names: Sequence[str], revision: str) -> CommitInfo:
        """Commit the files; where an attempt got through and its answer was lost, the next one finds nothing to do."""

        def commit() -> CommitInfo:
            # New operations each time: the client keeps in them what the repository held before the first attempt.
            operations = _operations(staged, names)
            return self.api.create_commit(
                self.target.repo_id, operations, commit_message=self.target.message, revision=revision
            )

        return self.ask(commit, "upload the files")

    def commit_to_pull_request(self, staged: Staged, names: Sequence[str]) -> CommitInfo:
        """Open a pull request with the files, or return the open one of the same title and content.

        Opening one is not repeated blindly: an attempt whose answer was lost may have opened it.
        """

        def open_one() -> CommitInfo:
            same = self._same_pull_request(staged, names)
            if same is not None:
                return same
            operations = _operations(staged, names)
            return self.api.create_commit(
                self.target.repo_id, operations, commit_message=self.target.message, create_pr=True
            )

        return self.ask(open_one, "open a pull request")

    def _same_pull_request(self, staged: Staged, names: Sequence[str]) -> CommitInfo | None:
        discussions = self.api.get_repo_discussions(
            self.target.repo_id, discussion_type="pull_request", discussion_status="open"
        )
        for each in discussions:
            revision = f"{_PULL_REQUEST}{each.num}"
            if each.title != self.target.message or not each.is_pull_request:
                continue
            paths = self.api.get_paths_info(self.target.repo_id, list(names), revision=revision)
            present = {path.path: path for path in paths if isinstance(path, RepoFile)}
            if all(name in present and _is_same(present[name], staged, name) for name in names):
                info = self.api.model_info(self.target.repo_id, revision=revision)
                logger.info("Pull request %d is open and holds the same files.", each.num)
                return CommitInfo(
                    commit_url=f"{self.api.endpoint}/{self.target.repo_id}/commit/{info.sha}",
                    commit_message=each.title,
                    commit_description="",
                    oid=str(info.sha),
                    pr_url=each.url,
                )
        return None


def _operations(staged: Staged, names: Sequence[str]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, str(staged.folder / name)) for name in names]


def _is_same(file: RepoFile, staged: Staged, name: str) -> bool:
    if file.lfs is not None:
        return file.lfs.sha256 == staged.digest(name)
    data = (staged.folder / name).read_bytes()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
