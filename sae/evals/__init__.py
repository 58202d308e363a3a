"""Evaluation of SAEs: what they rebuild, what they cost the LM, what their latents do.

`evaluate` and `evaluate_many` give a result; every figure is defined in the docstring of the module that
computes it. From stored rows, by `row_pass` over the parts of `rows`: `reconstruction`, `latents`, `batches`,
`spread`, `cooccurrence`, summed by `groups`. From weights: `geometry`, `logit_lens`. Through the LM, over
`sequences`: `language_model`, `effects`. `workers` says who computes, `evaluation` what is stored, `tasks`
runs `probing` and `logit_difference`; `ground_truth` is for planted features. While SAEs are trained, `monitor` has
`during` evaluate their checkpoints, in a process (`elsewhere`) or `on_ray`. Names are imported when first
used, so that the command line's `--help` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .definitions import DEFINITIONS, EVAL_VERSION, GROUPS
    from .evaluation import digest, evaluate, evaluate_many

_HOMES = {
    "DEFINITIONS": "definitions",
    "EVAL_VERSION": "definitions",
    "GROUPS": "definitions",
    "digest": "evaluation",
    "evaluate": "evaluation",
    "evaluate_many": "evaluation",
}

__all__ = ["DEFINITIONS", "EVAL_VERSION", "GROUPS", "digest", "evaluate", "evaluate_many"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae.evals' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
