"""Xet storage: tokens from the Hub, xorbs and shards in, files rebuilt from them, and reconstruction for downloads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .files import content
from .wire import KIND, REPO, REVISION, HubError, Request, Response, Routes, answer
from .xet_format import Chunk, ShardFile, read_shard, read_xorb

if TYPE_CHECKING:
    from .server import HubServer

WRITE_TOKEN, READ_TOKEN = "xet-write", "xet-read"
HASH = r"(?P<name>[0-9a-f]{64})"


@dataclass(slots=True)
class CAS:
    """Content-addressed storage."""

    raw: dict[str, bytes] = field(default_factory=dict)  # serialized xorbs
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    files: dict[str, ShardFile] = field(default_factory=dict)
    by_sha256: dict[str, str] = field(default_factory=dict)

    def add_xorb(self, name: str, raw: bytes) -> bool:
        if name in self.raw:
            return False
        self.chunks[name], self.raw[name] = read_xorb(raw), raw
        return True

    def add_shard(self, raw: bytes) -> bool:
        files, table = read_shard(raw)
        missing = {segment.xorb for file in files for segment in file.segments} - self.raw.keys()
        if missing:
            raise HubError(400, f"the shard names xorbs that were not uploaded: {sorted(missing)}")
        known = all(file.file_hash in self.files for file in files)
        for file in files:
            self.files[file.file_hash] = file
            if file.sha256 is not None:
                self.by_sha256[file.sha256] = file.file_hash
        for name, hashes in table.items():
            if len(hashes) != len(self.chunks[name]):
                raise HubError(400, f"the shard counts {len(hashes)} chunks in a xorb of {len(self.chunks[name])}")
        return not known

    def hash_of(self, sha256: str) -> str | None:
        return self.by_sha256.get(sha256)

    def rebuild(self, file_hash: str) -> bytes:
        """Put a file together from the chunks that its shard names."""
        pieces = []
        for segment in self.files[file_hash].segments:
            data = b"".join(chunk.data for chunk in self.chunks[segment.xorb][segment.first : segment.last])
            if len(data) != segment.length:
                raise HubError(400, "a segment is not as long as the shard says")
            pieces.append(data)
        return b"".join(pieces)

    def reconstruction(self, file_hash: str, cdn: str) -> dict[str, Any]:
        terms, fetch = [], {}
        for segment in self.files[file_hash].segments:
            span = {"start": segment.first, "end": segment.last}
            chunks = self.chunks[segment.xorb][segment.first : segment.last]
            terms.append({"hash": segment.xorb, "unpacked_length": segment.length, "range": span})
            url_range = {"start": chunks[0].start, "end": chunks[-1].end - 1}
            found = {"range": span, "url": f"{cdn}/xorb-data/{segment.xorb}", "url_range": url_range}
            fetch.setdefault(segment.xorb, [])
            if found not in fetch[segment.xorb]:
                fetch[segment.xorb].append(found)
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": fetch}


def register(routes: Routes, hub: HubServer) -> None:
    store, cas = hub.store, hub.cas

    @routes.on("GET", rf"/api/{KIND}/{REPO}/xet-write-token/{REVISION}")
    def write_token(request: Request, repo_id: str, revision: str) -> Response:
        if "create_pr" in request.query or revision.startswith("refs/pr/"):
            store.contributable(repo_id, request.token)
        else:
            store.writable(repo_id, request.token)
        return _connection(WRITE_TOKEN)

    @routes.on("GET", rf"/api/{KIND}/{REPO}/xet-read-token/{REVISION}")
    def read_token(request: Request, repo_id: str, revision: str) -> Response:
        store.readable(repo_id, request.token)
        return _connection(READ_TOKEN)

    def _connection(token: str) -> Response:
        expires = int(time.time()) + 3600
        names = {"X-Xet-Cas-Url": hub.url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        found = answer({"casUrl": hub.url, "accessToken": token, "exp": expires})
        found.headers.update(names)
        return found

    def _check(request: Request, *tokens: str) -> None:
        if request.token not in tokens:
            raise HubError(401, "a token of Xet storage is needed here, not the Hub's")

    @routes.on("POST", rf"/v1/xorbs/default/{HASH}")
    def add_xorb(request: Request, name: str) -> Response:
        _check(request, WRITE_TOKEN)
        try:
            return answer({"was_inserted": cas.add_xorb(name, request.body)})
        except ValueError as error:
            raise HubError(400, str(error)) from error

    @routes.on("POST", r"/v1/shards")
    def add_shard(request: Request) -> Response:
        _check(request, WRITE_TOKEN)
        return answer({"result": int(cas.add_shard(request.body))})

    @routes.on("GET", rf"/v1/chunks/[a-z-]+/{HASH}")
    def find_chunk(request: Request, name: str) -> Response:
        """Global deduplication: what another repository holds is never given away here."""
        _check(request, WRITE_TOKEN, READ_TOKEN)
        raise HubError(404, "no such chunk")

    @routes.on("POST", r"/v1/telemetry")
    def telemetry(request: Request) -> Response:
        return answer({})

    @routes.on("GET", rf"/v1/reconstructions/{HASH}")
    def reconstruct(request: Request, name: str) -> Response:
        _check(request, READ_TOKEN, WRITE_TOKEN)
        if name not in cas.files:
            raise HubError(404, "no such file")
        return answer(cas.reconstruction(name, hub.cdn))

    @routes.on("GET", rf"/xorb-data/{HASH}")
    def xorb_data(request: Request, name: str) -> Response:
        return content(request, cas.raw[name], {})
