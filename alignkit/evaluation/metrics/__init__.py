"""Our metrics as modules of `evaluate`, loaded from this folder and never from the Hub.

`evaluate.load(path_of("win_rate"))` works wherever alignkit is installed, and so does `load("win_rate")`. It takes the
extra `eval`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, nearest

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """List the metrics that are there."""
    return sorted(path.stem for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name)


def path_of(name: str) -> str:
    """Return the file of a metric, which `evaluate.load` takes.

    Raises:
        ConfigError: no such metric.
    """
    if name not in names():
        raise ConfigError(f"there is no metric {name!r}; there are {', '.join(names())}.{nearest(name, names())}")
    return str(_FOLDER / name / f"{name}.py")


def load(name: str, **options: Any) -> Any:
    """Load a metric as `evaluate.load` does, without asking the Hub for anything.

    Args:
        name: of `names()`.
        **options: further arguments of `evaluate.load`, such as `cache_dir` or `keep_in_memory`.

    Raises:
        ConfigError: no such metric, or `evaluate` is not installed.
    """
    path = path_of(name)
    if importlib.util.find_spec("evaluate") is None:
        raise ConfigError('metric modules need the package evaluate: pip install "alignkit[eval]"')
    import evaluate

    return evaluate.load(path, module_type="metric", **options)
