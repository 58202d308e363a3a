"""Checks that the configs of sparse architectures share."""

from typing import Protocol


class SparseConfig(Protocol):
    """What TopK and its relatives have in common."""

    @property
    def d_sae(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def k_aux(self) -> int | None: ...
    @property
    def aux_coefficient(self) -> float: ...


def sparse(config: SparseConfig) -> None:
    """Raise `ValueError` for a width, k or AuxK setting that can not be trained."""
    if config.d_sae < 1:
        raise ValueError(f"d_sae is {config.d_sae}; it must be at least 1")
    if not 1 <= config.k <= config.d_sae:
        raise ValueError(f"k is {config.k}; it must be between 1 and d_sae = {config.d_sae}")
    if config.k_aux is not None and config.k_aux < 1:
        raise ValueError(f"k_aux is {config.k_aux}; it must be at least 1, or None for d_in / 2")
    if not 0 <= config.aux_coefficient < float("inf"):
        raise ValueError(f"aux_coefficient is {config.aux_coefficient}; it must be finite and not negative")
