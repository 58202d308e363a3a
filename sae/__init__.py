"""Sparse autoencoders on cached activations: train, load, evaluate, export.

    saes = sae.train(stream, [sae.TopK(d_sae=6144, k=32)], sae.Training(n_rows=2_000_000), out="runs/x")
    s = sae.load("runs/x/topk-6144-32")

Names are imported when first used, so `import sae` costs nothing.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import BatchTopK, TopK
    from .core import SAE, load
    from .evals import evaluate
    from .export import export
    from .streams import ArrayStream
    from .train import NonFiniteLoss, Training, train

_HOMES = {
    "ArrayStream": "streams",
    "BatchTopK": "architectures",
    "NonFiniteLoss": "train",
    "SAE": "core",
    "TopK": "architectures",
    "Training": "train",
    "evaluate": "evals",
    "export": "export",
    "load": "core",
    "train": "train",
}

__all__ = [
    "SAE",
    "ArrayStream",
    "BatchTopK",
    "NonFiniteLoss",
    "TopK",
    "Training",
    "evaluate",
    "export",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `sae.train` and `sae.export` functions: importing the submodules of those names,
    which Python then sets on the package, must not hide them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
