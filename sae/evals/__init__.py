"""Evaluation of SAEs: what they rebuild, what they cost the LM, what their latents do.

`evaluate` and `evaluate_many` are the whole surface; every figure is defined in the docstring of
the module that computes it (`reconstruction`, `latents`, `language_model`).
"""

from sae.evals.evaluation import DEFINITIONS, EVAL_VERSION, digest, evaluate, evaluate_many

__all__ = ["DEFINITIONS", "EVAL_VERSION", "digest", "evaluate", "evaluate_many"]
