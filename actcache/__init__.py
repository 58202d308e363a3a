"""actcache: harvest a language model's activations once, stream them anywhere.

`open` and everything that it returns need neither torch nor ray; names are loaded when used.
"""

from typing import TYPE_CHECKING, Any

__all__ = [
    "Corpus",
    "Dataset",
    "Spec",
    "Where",
    "find",
    "harvest",
    "list_datasets",
    "mix",
    "open",
    "plan",
    "zip",
]

_HOME = {
    "Corpus": ("spec", "Corpus"),
    "Spec": ("spec", "Spec"),
    "Dataset": ("reader", "Dataset"),
    "open": ("reader", "open_dataset"),
    "Where": ("filters", "Where"),
    "mix": ("mixing", "mix"),
    "zip": ("aligned", "zip_datasets"),
    "harvest": ("driver", "harvest"),
    "plan": ("planning", "plan"),
    "find": ("catalog", "find"),
    "list_datasets": ("catalog", "list_datasets"),
}

if TYPE_CHECKING:
    from .aligned import zip_datasets as zip
    from .catalog import find, list_datasets
    from .driver import harvest
    from .filters import Where
    from .mixing import mix
    from .planning import plan
    from .reader import Dataset
    from .reader import open_dataset as open
    from .spec import Corpus, Spec


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'actcache' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value
