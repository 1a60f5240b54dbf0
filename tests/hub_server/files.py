"""Reading: trees, single paths, and the content of files, straight or over the object store."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from .store import Blob
from .wire import KIND, REPO, REVISION, HubError, Request, Response, Routes, answer

if TYPE_CHECKING:
    from .server import HubServer


def register(routes: Routes, hub: HubServer) -> None:
    store = hub.store

    @routes.on("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<folder>.*))?")
    def tree(request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
        found = store.readable(repo_id, request.token).resolve(revision).files
        inside = {path: blob for path, blob in sorted(found.items()) if path.startswith(folder)}
        return answer([entry(path, blob) for path, blob in inside.items()])

    @routes.on("POST", rf"/api/{KIND}/{REPO}/paths-info/{REVISION}")
    def paths_info(request: Request, repo_id: str, revision: str) -> Response:
        found = store.readable(repo_id, request.token).resolve(revision).files
        wanted = parse_qs(request.body.decode())["paths"]
        return answer([entry(path, found[path]) for path in wanted if path in found])

    @routes.on("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(request: Request, repo_id: str, revision: str, path: str) -> Response:
        commit = store.readable(repo_id, request.token).resolve(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{blob.oid}"'}
        if not blob.is_lfs:
            return content(request, blob.data, headers)
        headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-ETag": f'"{blob.sha256}"'}
        if blob.xet_hash is not None:
            refresh = f"{hub.url}/api/models/{repo_id}/xet-read-token/{commit.sha}"
            links = f'<{refresh}>; rel="xet-auth"'
            headers |= {"X-Xet-Hash": blob.xet_hash, "Link": links, "X-Xet-Refresh-Route": refresh}
        return Response(302, b"", {**headers, "Location": f"{hub.cdn}/objects/{blob.sha256}"})

    @routes.on("GET HEAD", r"/objects/(?P<oid>[0-9a-f]{64})")
    def get_object(request: Request, oid: str) -> Response:
        data = store.objects.get(oid)
        if data is None:
            raise HubError(404, "no such object")
        return content(request, data, {"ETag": f'"{oid}"'})


def entry(path: str, blob: Blob) -> dict[str, Any]:
    """Describe a file as the tree does."""
    described: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
    if blob.is_lfs:
        described["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    if blob.xet_hash is not None:
        described["xetHash"] = blob.xet_hash
    return described


def content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """Return content, or the range of it that was asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    headers = {"Content-Type": "application/octet-stream", **headers}
    if asked is None:
        return Response(200, data, {**headers, "Content-Length": str(len(data))})
    start, end = int(asked[1]), int(asked[2] or len(data) - 1)
    if start >= len(data):
        raise HubError(416, "the range lies behind the end")
    piece = data[start : end + 1]
    return Response(206, piece, {**headers, "Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(data)}"})
