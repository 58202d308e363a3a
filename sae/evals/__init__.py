"""Evaluation of SAEs: what they rebuild, what they cost the LM, what their latents do.

`evaluate` and `evaluate_many` are the whole surface; every figure is defined in the docstring of
the module that computes it (`reconstruction`, `latents`, `language_model`). Names are imported
when first used, so that the command line's `--help` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .definitions import DEFINITIONS, EVAL_VERSION
    from .evaluation import digest, evaluate, evaluate_many

_HOMES = {
    "DEFINITIONS": "definitions",
    "EVAL_VERSION": "definitions",
    "digest": "evaluation",
    "evaluate": "evaluation",
    "evaluate_many": "evaluation",
}

__all__ = ["DEFINITIONS", "EVAL_VERSION", "digest", "evaluate", "evaluate_many"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae.evals' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
