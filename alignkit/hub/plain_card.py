"""Cards without a run record: whether a person wrote one, and the least that is written where there is none."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from alignkit.data.front_matter import check_yaml, front_matter
from alignkit.errors import ConfigError
from alignkit.hub.bases import BaseName
from alignkit.hub.card import is_generated

_MARK = "There was no run record beside the files that were published"

_BODY = f"""# {{name}}

{{what}}

{_MARK}, so nothing more is known about the training, and nothing
is claimed.
"""


def is_written(path: str | Path) -> bool:
    """Whether a person wrote the card at `path`, so that something would be lost with it.

    Raises:
        ConfigError: its metadata cannot be read, so that the Hub would refuse it.
    """
    text = read_card(path).text
    return not is_generated(text) and _MARK not in text


def read_card(path: str | Path) -> ModelCard:
    """Read a card.

    Raises:
        ConfigError: its metadata cannot be read, so that the Hub would refuse it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_yaml(front_matter(text))
        return ModelCard(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"the metadata at the top of {Path(path).name} cannot be read, and the Hub would refuse it: {error}. "
            "Correct it, or remove the file to have a card written."
        ) from error


def write_plain_card(path: Path, *, repo_id: str, base: BaseName | None) -> None:
    """Write a card that says what is known without a record: the base, and that this is an adapter or a model."""
    is_known = base is not None and base.is_on_hub
    data = ModelCardData(
        library_name="transformers" if base is None else "peft",
        base_model=base.name if base is not None and is_known else None,
        tags=["alignkit", *([f"base_model:adapter:{base.name}"] if base is not None and is_known else [])],
    )
    what = "A model that was trained whole." if base is None else f"A PEFT adapter of `{base.name}`."
    path.write_text(f"---\n{data}\n---\n\n{_BODY.format(name=repo_id.split('/')[-1], what=what)}", encoding="utf-8")
