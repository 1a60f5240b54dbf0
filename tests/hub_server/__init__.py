"""A server on loopback that speaks the Hub's protocol, so that the real client can be tested against it.

    with HubServer() as hub:
        hub.add_user("me", OWNER_TOKEN)
        subprocess.run(..., env={"HF_ENDPOINT": hub.url, "HF_TOKEN": OWNER_TOKEN})
        hub.repo("me/adapter").files()

Both upload paths of the client end in the same place: LFS objects, and Xet xorbs and shards, from which the server
rebuilds the bytes of a file. Every request is kept with its headers and its body, and requests can be made to fail.
"""

from __future__ import annotations

from .faults import Fault
from .server import HubServer

__all__ = ["Fault", "HubServer"]
