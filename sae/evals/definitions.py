"""The figures of an evaluation by name, each in one phrase, and the version of their definitions.

The formulas are in the docstrings of the modules that compute them.
"""

from collections.abc import Mapping

EVAL_VERSION = 2
"""Raised whenever a definition changes, so that figures of two versions are never compared."""

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Sparsity": {
        "l0": "mean number of latents active on a row",
        "l1": "mean sum of activations on a row",
        "dead_latents": "latents that fired on none of the evaluated rows",
        "dead_share": "dead latents as a share of all latents",
        "alive_share": "latents that fired at least once, as a share of all latents",
        "latents_over_1pct": "latents that fired on more than 1 % of rows",
        "latents_over_10pct": "latents that fired on more than 10 % of rows",
        "firings_over_1pct": "share of all firings that belong to latents that fire on more than 1 % of rows",
        "firings_over_10pct": "share of all firings that belong to latents that fire on more than 10 % of rows",
    },
    "Reconstruction": {
        "fvu": "fraction of variance unexplained: squared error over squared distance to the mean row",
        "explained_variance": "1 − FVU",
        "mse": "mean squared error of a row, summed over its dimensions",
        "cosine": "mean cosine between a row and its reconstruction",
        "l2_ratio": "mean norm of the reconstruction over norm of the row; below 1 is shrinkage",
        "relative_bias": "squared norm of reconstructions over their product with the rows; below 1 is shrinkage",
        "shrinkage": "1 − relative bias: how much too short the reconstructions are",
    },
    "In the language model": {
        "ce_clean": "the language model's own loss on the evaluated tokens, nats per token",
        "ce_spliced": "its loss with the reconstruction in place of the activations",
        "ce_zero": "its loss with zeros in their place",
        "ce_mean": "its loss with the mean training row in their place",
        "ce_random": "its loss with errors of the SAE's size in random directions",
        "ce_recovered_zero": "share of the loss lost to zeros that the reconstruction wins back; 1 is perfect",
        "ce_recovered_mean": "the same against the mean training row",
        "kl": "divergence of the spliced model's predictions from the clean ones, nats per token",
        "kl_zero": "the same divergence with zeros in place of the activations",
        "kl_mean": "the same divergence with the mean training row in their place",
        "kl_random": "the same divergence with errors of the SAE's size in random directions",
        "kl_ratio": "how many times the divergence of equally large random errors the SAE's errors cause",
        "kl_score": "1 − divergence of the spliced model over that of zeros; 1 is perfect",
        "top1_agreement": "share of tokens where the spliced model's best guess is the clean model's",
    },
    "Latents": {
        "partner_overlap": "mean over latents of the share of firings that a latent has in common with its closest partner",
        "positional_latents": "latents more than half of whose variance is explained by the position in the sequence",
        "decoder_max_cosine": "mean over latents of the absolute cosine to the nearest other decoder row",
        "logit_kurtosis": "median over latents of the excess kurtosis of logit weights; high means a few tokens are meant",
    },
    "As other projects define them": {
        "explained_variance_legacy": "mean over rows of 1 − error over distance to the mean of 16 sequences, as papers report it",
        "relative_bias_saebench": "relative bias of batches of 16 sequences, averaged, as SAEBench",
        "mse_saebench": "mean squared error over the number of rows in a batch of 16 sequences, as SAEBench",
        "explained_variance_saebench_wrong": "SAEBench 0.6's explained variance, whose variance term is mistaken",
    },
}
"""Figures by what they are about, in the order to show them."""

DEFINITIONS: Mapping[str, str] = {name: text for group in GROUPS.values() for name, text in group.items()}
"""What each figure of a result means, in one phrase."""
