"""What one pass over stored rows measures, for many SAEs at once: mergeable sums, then figures.

Owns what is summed over a part of the rows (`rows.RowParts`) and how the sums become figures,
standard errors and breakdowns. Needs no LM. The figures themselves are defined in `reconstruction`,
`latents`, `batches`, `spread` and `cooccurrence`.

Breakdowns: rows by position and by norm (`groups`), each with its n_rows, fvu (around the mean of all
    rows), mse, cosine and l0. The l0 and mse of a breakdown, weighted by n_rows, give the whole again.
Standard errors: delete-one jackknife over documents, numerator and denominator together; the mean row
    of fvu is taken again without each document.

Shapes: N rows of a part, D d_in, F d_sae, G groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sae.evals.batches import BatchSums
from sae.evals.cooccurrence import MAX_PARTS, Cooccurrence
from sae.evals.groups import (
    Grouped,
    Grouping,
    jackknife,
    norm_bucket,
    position_bucket,
    position_range,
    ratio_error,
)
from sae.evals.latents import LatentStats, encode
from sae.evals.reconstruction import Reconstruction, join_values, row_values
from sae.evals.rows import Part, RowParts
from sae.evals.spread import Spread
from sae.select import Scratch

_CHUNK_VALUES = 2**25  # latents of a chunk: 128 MB as dense float32
_GROUPINGS = ("document", "position", "norm")
_ROUNDING = 1e-12  # scatter below this share of the squares is what rounding left of none


@dataclass(frozen=True)
class Reference:
    """Of the train rows of a site: where sums are centred and norms are told apart."""

    mean_D: np.ndarray
    mean_norm: float


class SiteRows:
    """Sums of a site's rows that no SAE enters."""

    def __init__(self) -> None:
        self.groups = {name: Grouped() for name in _GROUPINGS}

    @classmethod
    def of(cls, centred_ND: Tensor, groups: Mapping[str, Grouping]) -> Self:
        """Rows minus the reference mean, float64, and the group of each."""
        found = cls()
        centred = centred_ND.cpu().numpy()
        square_N = np.einsum("nd,nd->n", centred, centred)
        values = {"n": np.ones(len(centred)), "square": square_N, "sum": centred}
        found.groups = {name: Grouped.of(group_N, values) for name, group_N in groups.items()}
        return found

    def merge(self, other: Self) -> None:
        """Add the rows of `other`."""
        for name, grouped in self.groups.items():
            grouped.merge(other.groups[name])

    def fvu_denominators(self) -> tuple[float, np.ndarray]:
        """sum ||x - mu||^2 of all rows, and [G] of the rows without each document, mu without it too."""
        by = self.groups["document"]
        n_G, square_G, sum_GD = by["n"], by["square"], by["sum"]
        sum_D, square, n = sum_GD.sum(0), square_G.sum(), n_G.sum()
        rest_n_G = n - n_G
        rest_square_G = sum_D @ sum_D - 2 * sum_GD @ sum_D + np.einsum("gd,gd->g", sum_GD, sum_GD)
        with np.errstate(divide="ignore", invalid="ignore"):
            without_G = square - square_G - rest_square_G / rest_n_G
        scatter = float(square - sum_D @ sum_D / n)
        return scatter if scatter > _ROUNDING * square else 0.0, without_G

    def scatter_by(self, name: str) -> np.ndarray:
        """[G]: sum ||x - mu||^2 over the rows of each group, mu the mean of all rows."""
        by = self.groups[name]
        mu_D = by["sum"].sum(0) / by["n"].sum()
        scatter: np.ndarray = by["square"] - 2 * by["sum"] @ mu_D + by["n"] * (mu_D @ mu_D)
        return scatter


class SaeRows:
    """Sums of one SAE over rows."""

    def __init__(self, d_in: int, d_sae: int, context_size: int) -> None:
        self.recon = Reconstruction()
        self.batches = BatchSums(d_in)
        self.latents = LatentStats(d_sae)
        self.spread = Spread(d_sae, context_size)
        self.pairs = Cooccurrence(d_sae)
        self.groups = {name: Grouped() for name in _GROUPINGS}

    def merge(self, other: Self) -> None:
        """Add the parts of `other`."""
        for name in ("recon", "batches", "latents", "spread", "pairs"):
            getattr(self, name).merge(getattr(other, name))
        for name, grouped in self.groups.items():
            grouped.merge(other.groups[name])

    def figures(self, site: SiteRows) -> dict[str, Any]:
        """All figures of rows, with `histograms`, `breakdowns` and `standard_errors`."""
        return {
            **self.latents.metrics(),
            **self.recon.metrics(site.fvu_denominators()[0]),
            **self.batches.metrics(),
            **self.pairs.metrics(),
            "positional_latents": int((np.nan_to_num(self.spread.positional_score_F()) > 0.5).sum()),
            "histograms": self.latents.histograms(),
            "breakdowns": {name: self._breakdown(site, name) for name in ("position", "norm")},
            "standard_errors": self._errors(site),
        }

    def columns(self) -> dict[str, Any]:
        """Columns of `latents.parquet`."""
        partner_F, overlap_F = self.pairs.partners()
        return {
            **self.latents.columns(),
            "prompts": self.spread.prompts_F,
            "positional_score": self.spread.positional_score_F(),
            "partner": partner_F,
            "partner_overlap": overlap_F,
        }

    def _breakdown(self, site: SiteRows, name: str) -> list[dict[str, Any]]:
        by, n_G = self.groups[name], site.groups[name]["n"]
        scatter_G = site.scatter_by(name)
        found = []
        for g, group in enumerate(by.ids_G.tolist()):
            first, last = position_range(max(group, 0))
            by_norm = {"norm_over_mean": 2.0 ** (group / 2)}
            where = {"from": first, "to": last} if name == "position" else by_norm
            n, nonzero = n_G[g], by["nonzero"][g]
            found.append(
                {
                    **where,
                    "n_rows": int(n),
                    "fvu": float(by["error"][g] / scatter_G[g]) if scatter_G[g] > 0 else None,
                    "mse": float(by["error"][g] / n),
                    "cosine": float(by["cosine"][g] / nonzero) if nonzero else None,
                    "l0": float(by["l0"][g] / n),
                }
            )
        return found

    def _errors(self, site: SiteRows) -> dict[str, float | None]:
        by, n_G = self.groups["document"], site.groups["document"]["n"]
        total, without_G = site.fvu_denominators()
        fvu = None
        if total > 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                fvu = jackknife((by["error"].sum() - by["error"]) / without_G)
        return {
            "l0": ratio_error(by["l0"], n_G),
            "l1": ratio_error(by["l1"], n_G),
            "fvu": fvu,
            "explained_variance": fvu,
            "mse": ratio_error(by["error"], n_G),
            "cosine": ratio_error(by["cosine"], by["nonzero"]),
            "l2_ratio": ratio_error(by["ratio"], by["nonzero"]),
            "relative_bias": ratio_error(by["recon_square"], by["dot"]),
        }


@dataclass
class RowSums:
    """What a part, or all of them, give: by site, and by SAE in their order."""

    sites: dict[str, SiteRows]
    saes: list[SaeRows]

    def merge(self, other: Self) -> None:
        """Add the parts of `other`."""
        for site, rows in self.sites.items():
            rows.merge(other.sites[site])
        for mine, theirs in zip(self.saes, other.saes, strict=True):
            mine.merge(theirs)


def empty_sums(saes: Sequence[Any], context_size: int) -> RowSums:
    """Sums of no rows."""
    return RowSums(
        {s.cfg["site"]: SiteRows() for s in saes},
        [SaeRows(int(s.cfg["d_in"]), int(s.cfg["d_sae"]), context_size) for s in saes],
    )


@torch.no_grad()
def measure_rows(
    saes: Sequence[Any],
    view: Any,
    parts: RowParts,
    number: int,
    references: Mapping[str, Reference],
    context_size: int,
) -> RowSums:
    """The sums over one part. A function of its arguments alone: whoever computes it gets the same.

    Args:
        saes: in evaluation mode.
        view: the split.
        parts, number: which rows.
        references: of each site.
        context_size: tokens in a sequence at most.
    """
    sums = empty_sums(saes, context_size)
    part = parts.part(number)
    if not len(part.row_N):
        return sums
    documents = getattr(view, "documents_at", None)
    document_N = documents(part.sequence_N, part.position_N).document if documents else part.sequence_N
    groups = {
        "document": Grouping.of(document_N),
        "position": Grouping.of(position_bucket(part.position_N)),
    }
    for site, reference in references.items():
        acts_ND = rows_tensor(view.read(site, part.row_N))
        own = [i for i, s in enumerate(saes) if s.cfg["site"] == site]
        acts_ND = acts_ND.to(device_of(saes[own[0]]))
        x = acts_ND.double()
        groups["norm"] = Grouping.of(norm_bucket(x.norm(dim=1).cpu().numpy(), reference.mean_norm))
        centred_ND = x.sub_(torch.as_tensor(reference.mean_D, device=x.device))
        sums.sites[site] = SiteRows.of(centred_ND, groups)
        distance_N = _distance_to_batch_mean(centred_ND, part.batch_N)
        del x, centred_ND
        for i in own:
            pairs = sums.saes[i].pairs if number < MAX_PARTS else None
            _measure_sae(saes[i], sums.saes[i], pairs, acts_ND, part, groups, distance_N)
    return sums


def _measure_sae(
    s: Any,
    sums: SaeRows,
    pairs: Cooccurrence | None,
    acts_ND: Tensor,
    part: Part,
    groups: Mapping[str, Grouping],
    distance_N: np.ndarray,
) -> None:
    """Add the rows of a part to the sums of one SAE."""
    sequences, local_N = np.unique(part.sequence_N, return_inverse=True)
    sums.spread.begin(len(sequences))
    found, l0, l1 = [], [], []
    device, scratch = device_of(s), Scratch()
    step = chunk_rows(sums.latents.d_sae)
    for start in range(0, len(acts_ND), step):
        here = slice(start, min(start + step, len(acts_ND)))
        chunk_ND = acts_ND[here].to(device)
        codes, recon_ND = encode(s, chunk_ND, scratch)
        found.append(row_values(chunk_ND, recon_ND))
        sums.latents.update(codes, part.sequence_N[here], part.position_N[here])
        sums.spread.update(codes, local_N[here], part.position_N[here])
        if pairs is not None:
            pairs.update(codes, len(acts_ND))
        l0.append(codes.l0_N)
        l1.append(codes.l1_N)
    sums.spread.end()
    if pairs is not None:
        pairs.end()
    sums.latents.rank()
    values = join_values(found)
    sums.recon.update(values)
    sums.batches.add(values, distance_N, part.batch_N)
    by_row = {
        "error": values.error_N,
        "cosine": values.cosine_N,
        "ratio": values.ratio_N,
        "nonzero": (values.norm_N > 0).astype(np.float64),
        "recon_square": np.square(values.recon_norm_N),
        "dot": values.dot_N,
        "l0": np.concatenate(l0),
        "l1": np.concatenate(l1),
    }
    sums.groups = {name: Grouped.of(group_N, by_row) for name, group_N in groups.items()}


def _distance_to_batch_mean(x: Tensor, batch_N: np.ndarray) -> np.ndarray:
    """||x - mean of its eval batch||^2 of each row, float64; batches are runs of rows."""
    starts = np.flatnonzero(np.diff(batch_N, prepend=-1))
    distance = []
    for rows in torch.tensor_split(x, torch.as_tensor(starts[1:])):
        apart = rows - rows.mean(0)
        distance.append(torch.linalg.vecdot(apart, apart).cpu().numpy())
    return np.concatenate(distance)


def chunk_rows(d_sae: int) -> int:
    """Rows encoded at a time: a power of two, 128 to 4,096."""
    return int(min(4096, max(128, 2 ** int(np.log2(max(1, _CHUNK_VALUES // d_sae))))))


def rows_tensor(acts_ND: np.ndarray) -> Tensor:
    """Float32, in memory of its own: a reader may hand out what must not be written into."""
    return torch.from_numpy(np.require(acts_ND, np.float32, ["C", "W"]))


def device_of(s: Any) -> torch.device:
    """Where an SAE computes."""
    return next(iter(s.parameters()), torch.zeros(())).device
