"""What an adapter's base is called in public: its name on the Hub, or its own name without its folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.hub.record import RunRecord
from alignkit.models.demo import DEMO_HUB_ID, is_demo_copy

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# A snapshot in the Hub's cache: its repository and commit.
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True, slots=True)
class BaseName:
    """An adapter's base.

    Attributes:
        name: what goes into the published `adapter_config.json`.
        revision: the commit, where it is known.
        is_on_hub: whether `name` is meant as a repository of the Hub.
        here: where the base is loaded from on this machine: a folder, or a name on the Hub.
    """

    name: str
    revision: str | None
    is_on_hub: bool
    here: str


def hub_place(origin: str) -> tuple[str, str | None] | None:
    """Return the repository of the Hub that `origin` names, and its commit if a snapshot in the cache tells it.

    `None` for a local model: a path, or a folder that exists here under a name that the Hub could have.
    """
    snapshot = _SNAPSHOT.search(origin)
    if snapshot is not None:
        return f"{snapshot['owner']}/{snapshot['name']}", snapshot["commit"]
    if origin and _HUB_ID.fullmatch(origin) and not Path(origin).exists():
        return origin, None
    return None


def name_base(recorded: str, record: RunRecord | None, given: str | None) -> BaseName:
    """Find the public name of a base.

    Args:
        recorded: `base_model_name_or_path` of the adapter: a name on the Hub, or a path.
        record: the run's record, which knows what a path stood for.
        given: the name that the user says it has; it wins.

    Raises:
        ConfigError: `given` is no name of a repository, or nothing says what the base is.
    """
    if given is not None:
        if not _HUB_ID.fullmatch(given) or Path(given).exists():
            raise ConfigError(f"base_model={given!r} must be a name on the Hub, such as 'owner/model', not a path")
        return BaseName(given, None, True, recorded or given)
    if recorded and is_demo_copy(recorded):
        return BaseName(DEMO_HUB_ID, None, True, recorded)
    place = hub_place(recorded)
    if place is not None:
        return BaseName(*place, True, recorded)
    known = {} if record is None else record.base
    if known.get("hub_id"):
        return BaseName(str(known["hub_id"]), known.get("revision"), True, recorded)
    name = Path(recorded.replace("\\", "/")).name or str(known.get("name") or "")
    if not name:
        raise ConfigError(
            "nothing says what the adapter's base model is: base_model_name_or_path of adapter_config.json is empty. "
            "Pass base_model='owner/model'."
        )
    return BaseName(name, None, False, recorded)
