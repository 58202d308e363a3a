"""The figures of an evaluation by name, each in one phrase, and the version of their definitions.

The formulas are in the docstrings of the modules that compute them.
"""

from collections.abc import Mapping

EVAL_VERSION = 1
"""Raised whenever a definition changes, so that figures of two versions are never compared."""

DEFINITIONS: Mapping[str, str] = {
    "l0": "mean number of latents active on a row",
    "l1": "mean sum of activations on a row",
    "fvu": "fraction of variance unexplained: squared error over squared distance to the mean row",
    "explained_variance": "1 − FVU",
    "mse": "mean squared error of a row, summed over its dimensions",
    "cosine": "mean cosine between a row and its reconstruction",
    "l2_ratio": "mean norm of the reconstruction over norm of the row; below 1 is shrinkage",
    "dead_latents": "latents that fired on none of the evaluated rows",
    "dead_share": "dead latents as a share of all latents",
    "latents_over_1pct": "latents that fired on more than 1 % of rows",
    "latents_over_10pct": "latents that fired on more than 10 % of rows",
    "ce_clean": "the language model's own loss on the evaluated tokens, nats per token",
    "ce_spliced": "its loss with the reconstruction in place of the activations",
    "ce_zero": "its loss with zeros in their place",
    "ce_mean": "its loss with the mean training row in their place",
    "ce_recovered_zero": "share of the loss lost to zeros that the reconstruction wins back; 1 is perfect",
    "ce_recovered_mean": "the same against the mean training row",
    "kl": "divergence of the spliced model's predictions from the clean ones, nats per token",
    "kl_zero": "the same divergence with zeros in place of the activations",
    "kl_mean": "the same divergence with the mean training row in their place",
}
"""What each figure of a result means, in one phrase."""
