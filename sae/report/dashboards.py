"""What the page shows of each latent: its snippets, its effect on the logits, its neighbours.

Owns the choice of latents and the figures that need only weights; snippets come from
`sae.snippets`. Computes values, draws nothing.

Definitions:
    logit effect of latent f on token v = W_dec[f] . W_U[v], W_U the rows of the LM's unembedding,
    without the final norm (as SAE-VIS on unprocessed weights; nostalgebraist 2020, "logit lens").
    Only for sites in the residual basis: those as wide as the unembedding.
    nearest latents of f = the other latents with the largest cos(W_dec[f], W_dec[g]).

Shapes: L latents shown, F d_sae, D d_in, V vocabulary, K tokens, M neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.report.entries import damaged
from sae.snippets import BINS, Snippets, collect

N_LOGITS = 10
N_NEAREST = 6
_BLOCK = 256  # latents at a time: 50 MB of logits over 50,000 tokens


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """The tokens that each latent pushes up and down most."""

    top_ids: np.ndarray
    """int64 [L, K], largest first."""
    top: np.ndarray
    """float32 [L, K]"""
    bottom_ids: np.ndarray
    """int64 [L, K], most negative first."""
    bottom: np.ndarray
    """float32 [L, K]"""
    histogram: np.ndarray
    """int64 [L, BINS]: effects on all tokens, in equal bins from the smallest to the largest."""


@dataclass(frozen=True, eq=False)
class Dashboards:
    """All that is shown of an SAE's latents."""

    d_sae: int
    snippets: Snippets
    columns: dict[str, np.ndarray]
    """Numbers [L] to sort by, from `latents.parquet`; at least density, mean and max activation."""
    nearest_ids: np.ndarray | None
    """int64 [L, M]"""
    nearest: np.ndarray | None
    """float32 [L, M]: cosines, largest first."""
    logits: LogitEffects | None
    words: dict[str, np.ndarray] = field(default_factory=dict)
    """Texts [L] of the columns that hold a word, such as `token_set`."""

    @property
    def latents(self) -> np.ndarray:
        return self.snippets.latents


def build(
    s: Any,
    view: Any,
    n_rows: int,
    table: Path,
    *,
    n_latents: int,
    seed: int,
    W_U_VD: Tensor | None = None,
    on_rows: Callable[[int], None] = lambda n: None,
) -> Dashboards:
    """The dashboards of at most `n_latents` latents of an SAE over rows of a split.

    Args:
        s: the SAE.
        view: the split that was evaluated.
        n_rows: how many of its rows, from the first.
        table: `latents.parquet` of that evaluation.
        n_latents: where the SAE has more, living ones are drawn at random.
        seed: of that draw.
        W_U_VD: the LM's unembedding, one row for each token; without it there are no logit effects.
        on_rows: told the number of rows after each chunk.
    """
    stored = read_columns(table, int(s.cfg["d_sae"]))
    latents = choose(stored["fires"], n_latents, seed)
    snippets = collect(s, view, n_rows, latents, on_rows=on_rows)
    W_dec_FD = getattr(s, "W_dec", None)
    nearest_ids, nearest, logits = None, None, None
    if W_dec_FD is not None:
        W_dec_FD = W_dec_FD.detach().float().cpu()
        nearest_ids, nearest = nearest_latents(W_dec_FD, latents)
        if W_U_VD is not None and W_U_VD.shape[1] == W_dec_FD.shape[1]:
            logits = logit_effects(W_dec_FD[torch.from_numpy(latents)], W_U_VD.detach().float().cpu())
    columns = {name: values[latents] for name, values in stored.items()}
    words = {name: values[latents] for name, values in read_words(table).items()}
    return Dashboards(len(stored["fires"]), snippets, columns, nearest_ids, nearest, logits, words)


def choose(fires_F: np.ndarray, n_latents: int, seed: int) -> np.ndarray:
    """All latents, or `n_latents` of the living ones at random; ascending."""
    if len(fires_F) <= n_latents:
        return np.arange(len(fires_F))
    alive = np.flatnonzero(fires_F > 0)
    return np.sort(np.random.default_rng(seed).permutation(alive)[:n_latents])


def read_columns(path: Path, d_sae: int) -> dict[str, np.ndarray]:
    """Every column of `latents.parquet` that holds one number for each latent, but the latent itself.

    Raises:
        CorruptObject: it is no parquet file, or not one of `d_sae` latents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = (pa.types.is_integer, pa.types.is_floating)
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        names = [f.name for f in schema if f.name != "latent" and any(kind(f.type) for kind in kinds)]
        table = file.read(columns=names)
    except (pa.ArrowException, OSError) as err:
        raise damaged(path, str(err).splitlines()[0].rstrip(".")) from err
    if "fires" not in names or table.num_rows != d_sae:
        raise damaged(path, f"it has {table.num_rows} rows and {names}, not fires of {d_sae} latents")
    return {name: table[name].to_numpy() for name in names}


def read_words(path: Path) -> dict[str, np.ndarray]:
    """Every column of `latents.parquet`, which `read_columns` has checked, that holds a text for each latent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [f.name for f in file.schema_arrow if pa.types.is_string(f.type)]
    table = file.read(columns=names)
    return {name: np.array(table[name].to_pylist(), object) for name in names}


@torch.no_grad()
def nearest_latents(W_dec_FD: Tensor, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, cosines) [L, M] of the latents whose decoder rows point the same way, largest first."""
    unit_FD = torch.nn.functional.normalize(W_dec_FD, dim=1)
    m = min(N_NEAREST, len(unit_FD) - 1)
    ids, cosines = [], []
    for start in range(0, len(latents), _BLOCK):
        own = torch.from_numpy(latents[start : start + _BLOCK])
        cos_BF = unit_FD[own] @ unit_FD.T
        cos_BF[torch.arange(len(own)), own] = -torch.inf
        best = cos_BF.topk(m, dim=1)
        ids.append(best.indices.numpy())
        cosines.append(best.values.numpy())
    return np.concatenate(ids), np.concatenate(cosines)


@torch.no_grad()
def logit_effects(W_dec_LD: Tensor, W_U_VD: Tensor) -> LogitEffects:
    """The K largest and K smallest logit effects of each decoder row."""
    k = min(N_LOGITS, len(W_U_VD))
    parts: list[list[np.ndarray]] = [[], [], [], [], []]
    for start in range(0, len(W_dec_LD), _BLOCK):
        logits_BV = W_dec_LD[start : start + _BLOCK] @ W_U_VD.T
        top, bottom = logits_BV.topk(k, dim=1), logits_BV.topk(k, dim=1, largest=False)
        low_B1, high_B1 = bottom.values[:, :1], top.values[:, :1]
        width_B1 = ((high_B1 - low_B1) / BINS).clamp_min(torch.finfo(torch.float32).tiny)
        bins_BV = ((logits_BV - low_B1) / width_B1).long().clamp_(0, BINS - 1)
        counts_BK = torch.zeros(len(logits_BV), BINS, dtype=torch.long)
        counts_BK.scatter_add_(1, bins_BV, torch.ones_like(bins_BV))
        found = (top.indices, top.values, bottom.indices, bottom.values, counts_BK)
        for part, values in zip(parts, found, strict=True):
            part.append(values.numpy())
    return LogitEffects(*(np.concatenate(part) for part in parts))


def unembedding(lm: Any) -> Tensor | None:
    """The LM's [V, D], or None for one that has no such matrix."""
    layer = getattr(lm.model, "get_output_embeddings", lambda: None)()
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None
