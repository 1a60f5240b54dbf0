"""The Hub's own interface: who am I, repositories, commits, branches, pull requests, settings."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import yaml

from .store import Blob, Commit, Discussion, Repo, Store, upload_mode
from .wire import KIND, REPO, REVISION, HubError, Request, Response, Routes, answer

if TYPE_CHECKING:
    from .server import HubServer

CREATED = "2026-01-01T00:00:00.000Z"


def register(routes: Routes, hub: HubServer) -> None:
    _register_repos(routes, hub)
    _register_references(routes, hub)
    _register_commits(routes, hub)
    _register_discussions(routes, hub)


def _register_repos(routes: Routes, hub: HubServer) -> None:
    store = hub.store

    @routes.on("GET", r"/api/whoami-v2")
    def whoami(request: Request) -> Response:
        user = store.user(request.token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return answer({"type": "user", "name": user.name, "orgs": [], "auth": {"type": "access_token"}})

    @routes.on("POST", r"/api/repos/create")
    def create(request: Request) -> Response:
        user, asked = store.user(request.token), request.json()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = asked.get("organization") or user.name
        repo_id = f"{owner}/{asked['name']}"
        if owner != user.name or not user.can_write:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{hub.url}/{repo_id}"
        if repo_id in store.repos:
            raise HubError(409, "You already created this model repo", url=url)
        hub.add_repo(repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return answer({"url": url, "name": repo_id, "id": repo_id})

    @routes.on("GET", rf"/api/{KIND}/{REPO}(?:/revision/{REVISION})?")
    def info(request: Request, repo_id: str, revision: str = "main") -> Response:
        repo = store.readable(repo_id, request.token)
        commit = repo.resolve(revision)
        return answer(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.sha,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "createdAt": CREATED,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )


def _register_references(routes: Routes, hub: HubServer) -> None:
    store = hub.store

    @routes.on("PUT", rf"/api/{KIND}/{REPO}/settings")
    def settings(request: Request, repo_id: str) -> Response:
        repo, asked = store.writable(repo_id, request.token), request.json()
        repo.private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        return answer({})

    @routes.on("GET", rf"/api/{KIND}/{REPO}/refs")
    def refs(request: Request, repo_id: str) -> Response:
        repo = store.readable(repo_id, request.token)
        listed: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, sha in repo.refs.items():
            is_pull_request = name.startswith("refs/")
            ref = name if is_pull_request else f"refs/heads/{name}"
            row = {"name": name.removeprefix("refs/"), "ref": ref, "targetCommit": sha}
            listed["pullRequests" if is_pull_request else "branches"].append(row)
        if "include_prs" not in request.query:
            del listed["pullRequests"]
        return answer(listed)

    @routes.on("POST", rf"/api/{KIND}/{REPO}/branch/(?P<branch>[^/]+)")
    def branch(request: Request, repo_id: str, branch: str) -> Response:
        repo = store.writable(repo_id, request.token)
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid branch: {branch}")
        if repo.is_branch(branch):
            raise HubError(409, "Reference already exists")
        repo.refs[branch] = repo.resolve(request.json().get("startingPoint", "main")).sha
        return answer({}, 201)


def _register_commits(routes: Routes, hub: HubServer) -> None:
    store = hub.store

    @routes.on("POST", r"/api/validate-yaml")
    def validate(request: Request) -> Response:
        content = request.json()["content"]
        try:
            found = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
        except yaml.YAMLError as error:
            return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return answer({"errors": [], "warnings": warnings})

    @routes.on("POST", rf"/api/{KIND}/{REPO}/preupload/{REVISION}")
    def preupload(request: Request, repo_id: str, revision: str) -> Response:
        present = _target(store, request, repo_id).resolve(revision).files
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            mode = upload_mode(path, base64.b64decode(file["sample"]), file["size"])
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            files.append(row | ({"oid": present[path].oid} if path in present else {}))
        return answer({"files": files})

    @routes.on("POST", rf"/api/{KIND}/{REPO}/commit/{REVISION}")
    def commit(request: Request, repo_id: str, revision: str) -> Response:
        repo = _target(store, request, repo_id)
        parent = repo.resolve(revision)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.sha):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        pull_request = None
        if "create_pr" in request.query:
            pull_request = _open(hub, repo, request, header["summary"], revision)
            revision = f"refs/pr/{pull_request.num}"
        elif not repo.is_branch(revision):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = _apply(hub, repo, parent, lines)
        made = repo.commit(revision, parent.sha, header["summary"], header["description"], files)
        url = None if pull_request is None else f"{hub.url}/{repo_id}/discussions/{pull_request.num}"
        return answer(
            {
                "success": True,
                "commitOid": made.sha,
                "commitUrl": f"{hub.url}/{repo_id}/commit/{made.sha}",
                "hookOutput": "",
                "pullRequestUrl": url,
            }
        )


def _target(store: Store, request: Request, repo_id: str) -> Repo:
    if "create_pr" in request.query or "/refs%2Fpr%2F" in request.path:
        return store.contributable(repo_id, request.token)
    return store.writable(repo_id, request.token)


def _apply(hub: HubServer, repo: Repo, parent: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob]:
    files = dict(parent.files)
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = _large_file(hub, repo, value["oid"])
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            files = {path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
    return files


def _large_file(hub: HubServer, repo: Repo, oid: str) -> Blob:
    xet_hash = hub.cas.hash_of(oid)
    if xet_hash is not None:
        hub.store.objects[oid] = hub.cas.rebuild(xet_hash)
        repo.lfs_oids.add(oid)
    if oid not in repo.lfs_oids:
        raise HubError(
            400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {oid}"
        )
    return Blob(hub.store.objects[oid], is_lfs=True, xet_hash=xet_hash)


def _register_discussions(routes: Routes, hub: HubServer) -> None:
    store = hub.store
    discussions = rf"/api/{KIND}/{REPO}/discussions"

    @routes.on("POST", discussions)
    def create(request: Request, repo_id: str) -> Response:
        repo, asked = store.contributable(repo_id, request.token), request.json()
        if not asked["pullRequest"]:
            raise HubError(400, "only pull requests are supported here")
        made = _open(hub, repo, request, asked["title"], "main", status="draft")
        return answer({"num": made.num, "pullRequest": True})

    @routes.on("GET", discussions)
    def listed(request: Request, repo_id: str) -> Response:
        repo = store.readable(repo_id, request.token)
        wanted = request.query.get("author")
        rows = [_row(repo, found) for found in repo.discussions if wanted in (None, found.author)]
        if request.query.get("status") == "open":
            rows = [row for row in rows if row["status"] in ("open", "draft")]
        return answer({"discussions": rows, "count": len(rows), "start": 0})

    @routes.on("GET", rf"{discussions}/(?P<num>\d+)")
    def details(request: Request, repo_id: str, num: str) -> Response:
        repo = store.readable(repo_id, request.token)
        found = next((row for row in repo.discussions if row.num == int(num)), None)
        if found is None:
            raise HubError(404, "Discussion not found")
        changes = {"base": "refs/heads/main"}
        return answer({**_row(repo, found), "events": [], "changes": changes, "filesWithConflicts": [], "diff": ""})

    @routes.on("POST", rf"{discussions}/(?P<num>\d+)/status")
    def status(request: Request, repo_id: str, num: str) -> Response:
        repo = store.contributable(repo_id, request.token)
        found = next(row for row in repo.discussions if row.num == int(num))
        found.status = request.json()["status"]
        event = {"id": "1", "type": "status-change", "createdAt": CREATED, "author": {"name": found.author}}
        return answer({"newStatus": {**event, "data": {"status": found.status}}})


def _open(
    hub: HubServer, repo: Repo, request: Request, title: str, revision: str, *, status: str = "open"
) -> Discussion:
    user = hub.store.user(request.token)
    made = Discussion(len(repo.discussions) + 1, title, "" if user is None else user.name, True, status)
    repo.discussions.append(made)
    repo.refs[f"refs/pr/{made.num}"] = repo.resolve(revision).sha
    return made


def _row(repo: Repo, found: Discussion) -> dict[str, Any]:
    return {
        "num": found.num,
        "title": found.title,
        "author": {"name": found.author},
        "createdAt": CREATED,
        "status": found.status,
        "isPullRequest": found.is_pull_request,
        "repo": {"name": repo.repo_id, "type": "model"},
    }
