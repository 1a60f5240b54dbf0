"""alignkit: align language models with human preferences on one consumer GPU, or none.

Names are imported when they are first used, so that `import alignkit` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignkit.errors import AlignkitError, CheckpointError, ConfigError, DataError, ModelError, TrainingError

__version__ = "0.1.0"

__all__ = [
    "AlignkitError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ModelError",
    "TrainingError",
    "__version__",
]

# Where each public name lives. A new name needs a row here, one in `__all__` and one in the block above.
_MODULE_OF = {
    "AlignkitError": "alignkit.errors",
    "CheckpointError": "alignkit.errors",
    "ConfigError": "alignkit.errors",
    "DataError": "alignkit.errors",
    "ModelError": "alignkit.errors",
    "TrainingError": "alignkit.errors",
}


def __getattr__(name: str) -> object:
    """Import the module that holds `name` and keep the result, so that this runs once per name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    value = vars(import_module(_MODULE_OF[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
