"""Large files over Git LFS: the batch request, uploads whole or in parts, and the check afterwards."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from .wire import REPO, HubError, Request, Response, Routes, answer

if TYPE_CHECKING:
    from .server import HubServer


def register(routes: Routes, hub: HubServer) -> None:
    store = hub.store

    @routes.on("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def batch(request: Request, repo_id: str) -> Response:
        repo = store.contributable(repo_id, request.token)
        asked = request.json()
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise HubError(400, "unsupported LFS operation")
        objects = []
        for item in asked["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.lfs_oids:
                found["actions"] = {
                    "upload": _upload_action(item["oid"], item["size"], asked["transfers"]),
                    "verify": {"href": f"{hub.url}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(found)
        return answer({"transfer": "basic", "objects": objects})

    def _upload_action(oid: str, size: int, transfers: list[str]) -> dict:
        limit = hub.multipart_bytes
        if limit is None or size <= limit or "multipart" not in transfers:
            return {"href": f"{hub.cdn}/objects/{oid}"}
        count = -(-size // limit)
        header = {str(number): f"{hub.cdn}/objects/{oid}?part={number}" for number in range(1, count + 1)}
        return {"href": f"{hub.url}/lfs-complete", "header": {"chunk_size": str(limit), **header}}

    @routes.on("PUT", r"/objects/(?P<oid>[0-9a-f]{64})")
    def put(request: Request, oid: str) -> Response:
        if "authorization" in request.headers:
            raise HubError(400, "the object store takes signed addresses, not the Hub's token")
        part = request.query.get("part")
        if part is not None:
            store.parts[oid, int(part)] = request.body
            return Response(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        return _keep(oid, request.body)

    @routes.on("POST", r"/lfs-complete")
    def complete(request: Request) -> Response:
        oid, numbers = request.json()["oid"], [part["partNumber"] for part in request.json()["parts"]]
        return _keep(oid, b"".join(store.parts.pop((oid, number)) for number in sorted(numbers)))

    def _keep(oid: str, data: bytes) -> Response:
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "the content does not have the hash that was announced")
        store.objects[oid] = data
        return Response()

    @routes.on("POST", rf"/{REPO}\.git/info/lfs/verify")
    def verify(request: Request, repo_id: str) -> Response:
        repo, asked = store.contributable(repo_id, request.token), request.json()
        if len(store.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "the object was not uploaded whole")
        repo.lfs_oids.add(asked["oid"])
        return answer({})
