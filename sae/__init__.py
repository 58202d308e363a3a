"""Sparse autoencoders on cached activations: train, load, evaluate, export.

    saes = sae.train(stream, [sae.TopK(d_sae=6144, k=32)], sae.Training(n_rows=2_000_000), out="runs/x")
    s = sae.load("runs/x/topk-6144-32")

Names are imported when first used, so `import sae` costs nothing.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import BatchTopK, Gated, JumpReLU, Matryoshka, Optimiser, Standard, TopK
    from .core import SAE, load
    from .evals import evaluate
    from .evals.during import EvalDuring
    from .export import export
    from .revival import AuxK, GhostGrads, Resampling
    from .snapshots import load_checkpoint
    from .splicing import splice
    from .streams import ArrayStream
    from .train import NonFiniteLoss, train
    from .training import Training

_HOMES = {
    "ArrayStream": "streams",
    "AuxK": "revival",
    "BatchTopK": "architectures",
    "EvalDuring": "evals.during",
    "Gated": "architectures",
    "GhostGrads": "revival",
    "JumpReLU": "architectures",
    "Matryoshka": "architectures",
    "NonFiniteLoss": "train",
    "Optimiser": "architectures",
    "Resampling": "revival",
    "SAE": "core",
    "Standard": "architectures",
    "TopK": "architectures",
    "Training": "training",
    "evaluate": "evals",
    "export": "export",
    "load": "core",
    "load_checkpoint": "snapshots",
    "splice": "splicing",
    "train": "train",
}

__all__ = [
    "SAE",
    "ArrayStream",
    "AuxK",
    "BatchTopK",
    "EvalDuring",
    "Gated",
    "GhostGrads",
    "JumpReLU",
    "Matryoshka",
    "NonFiniteLoss",
    "Optimiser",
    "Resampling",
    "Standard",
    "TopK",
    "Training",
    "evaluate",
    "export",
    "load",
    "load_checkpoint",
    "splice",
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
