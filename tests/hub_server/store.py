"""Repositories, commits and blobs, in memory."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from .wire import HubError

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE_TEXT_BYTES = 10 * 1024 * 1024
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Blob:
    """A file's content; `xet_hash` is set where it came in over Xet."""

    data: bytes
    is_lfs: bool = False
    xet_hash: str | None = None

    @property
    def git_oid(self) -> str:
        data = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        """What `preupload` tells the client, which compares it with its own file."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True, slots=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    files: dict[str, Blob]


@dataclass(slots=True)
class Discussion:
    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str


@dataclass(slots=True)
class Repo:
    """One model repository: `refs` holds branches by name and pull requests as `refs/pr/N`."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    lfs_oids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commit("main", None, "initial commit", "", {".gitattributes": Blob(GITATTRIBUTES)})

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        revision = revision.removeprefix("refs/heads/")
        sha = self.refs.get(revision, revision)
        if sha in self.commits:
            return self.commits[sha]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def is_branch(self, revision: str) -> bool:
        return revision in self.refs

    def commit(self, ref: str, parent: str | None, title: str, description: str, files: dict[str, Blob]) -> Commit:
        text = repr((self.repo_id, len(self.commits), parent, title, sorted((p, b.git_oid) for p, b in files.items())))
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, description, files)
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a ref, newest first."""
        commits: list[Commit] = []
        sha: str | None = self.resolve(revision).sha
        while sha is not None:
            commits.append(self.commits[sha])
            sha = commits[-1].parent
        return commits

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the bytes of every file but `.gitattributes`, which the Hub adds by itself."""
        found = self.resolve(revision).files
        return {path: blob.data for path, blob in sorted(found.items()) if path != ".gitattributes"}


def upload_mode(path: str, sample: bytes, size: int) -> str:
    if path.endswith((".safetensors", ".bin", ".pt", ".gguf", ".png")) or b"\0" in sample or size > LARGE_TEXT_BYTES:
        return "lfs"
    return "regular"


@dataclass(frozen=True, slots=True)
class User:
    name: str
    can_write: bool = True


@dataclass(slots=True)
class Store:
    """Everything that the server knows."""

    users: dict[str, User] = field(default_factory=dict)  # by token
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)  # of multipart uploads

    def user(self, token: str | None) -> User | None:
        if token is None:
            return None
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def readable(self, repo_id: str, token: str | None) -> Repo:
        user, repo = self.user(token), self.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or user.name != repo.owner)):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str, token: str | None) -> Repo:
        repo, user = self.readable(repo_id, token), self.user(token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user.can_write or user.name != repo.owner:
            raise HubError(403, "Forbidden: you don't have write access to this repository")
        return repo

    def contributable(self, repo_id: str, token: str | None) -> Repo:
        """A repository to which this user may open a pull request: one that can be read."""
        repo, user = self.readable(repo_id, token), self.user(token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user.can_write:
            raise HubError(403, "Forbidden: this token has no write scope")
        return repo
