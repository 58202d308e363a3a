"""Decoder geometry: how close directions lie to each other, inside one SAE or between two.

From weights alone.

Definitions, cosines of decoder rows:
    nearest latent of a latent: the other one with the largest |cosine|; max cosine: that |cosine|
    mcc of two SAEs: mean |cosine| of pairs, each row used once at most, matched for the largest sum
        (mean correlation coefficient; Hyvarinen and Morioka 2016)

Shapes: F d_sae, D d_in.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK_VALUES = 2**25  # cosines in memory: 128 MB


def unit_decoder(s: Any) -> Tensor | None:
    """W_dec rows at unit norm, float32 [F, D]; rows of zeros stay zeros. None for an SAE without W_dec."""
    W_dec = getattr(s, "W_dec", None)
    if W_dec is None:
        return None
    return torch.nn.functional.normalize(W_dec.detach().float(), dim=1)


@torch.no_grad()
def nearest(unit_FD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nearest other latent int32 [F] and the |cosine| float32 [F]; -1 and 0 where there is no other."""
    n = len(unit_FD)
    index_F, cosine_F = np.full(n, -1, np.int32), np.zeros(n, np.float32)
    if n < 2:
        return index_F, cosine_F
    step = max(1, _CHUNK_VALUES // n)
    for start in range(0, n, step):
        block = (unit_FD[start : start + step] @ unit_FD.T).abs_()
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = -1
        value, index = block.max(1)
        index_F[start : start + step] = index.cpu().numpy()
        cosine_F[start : start + step] = value.clamp(0, 1).cpu().numpy()
    return index_F, cosine_F


@torch.no_grad()
def encoder_decoder_cosine(s: Any) -> np.ndarray | None:
    """Cosine of each latent's encoder and decoder direction, float32 [F]; None without W_enc or W_dec."""
    W_enc, W_dec = getattr(s, "W_enc", None), getattr(s, "W_dec", None)
    if W_enc is None or W_dec is None:
        return None
    cosine: np.ndarray = torch.nn.functional.cosine_similarity(W_enc.T.float(), W_dec.float()).cpu().numpy()
    return cosine


def compare(a: Any, b: Any) -> dict[str, float]:
    """How much two SAEs of one width share: `mcc`, and mean max |cosine| each way.

    Time grows with the cube of d_sae: a second at 1,000 latents, minutes at 6,000.

    Raises:
        ValueError: they have no decoder rows, or rows of different width.
    """
    one, other = unit_decoder(a), unit_decoder(b)
    if one is None or other is None or one.shape[1] != other.shape[1]:
        widths = [None if u is None else u.shape[1] for u in (one, other)]
        raise ValueError(f"decoder rows have widths {widths}; compare needs two SAEs of one d_in")
    cosine_FG = (one @ other.T).abs().cpu().numpy()
    return {
        "mcc": mean_matched(cosine_FG),
        "max_cosine_to_other": float(cosine_FG.max(1).mean()),
        "max_cosine_from_other": float(cosine_FG.max(0).mean()),
    }


def mean_matched(score_LF: np.ndarray) -> float:
    """The largest mean score of pairs that use each row and each column once at most.

    Shortest augmenting paths (Jonker and Volgenant 1987), one for each row of the shorter side.
    """
    cost = -np.asarray(score_LF, np.float64)
    cost = cost if cost.shape[0] <= cost.shape[1] else cost.T
    n, m = cost.shape
    u, v = np.zeros(n), np.zeros(m)
    row_of, column_of = np.full(m, -1), np.full(n, -1)
    for first in range(n):
        shortest, before = np.full(m, np.inf), np.full(m, -1)
        done = np.zeros(m, bool)
        row, reached, sink = first, 0.0, -1
        rows = [first]
        while sink < 0:
            new = reached + cost[row] - u[row] - v
            better = ~done & (new < shortest)
            shortest[better], before[better] = new[better], row
            column = int(np.where(done, np.inf, shortest).argmin())
            reached = shortest[column]
            done[column] = True
            if row_of[column] < 0:
                sink = column
            else:
                row = int(row_of[column])
                rows.append(row)
        u[first] += reached
        for other in rows[1:]:
            u[other] += reached - shortest[column_of[other]]
        v[done] -= reached - shortest[done]
        while sink >= 0:  # flip the path
            row = int(before[sink])
            row_of[sink] = row
            column_of[row], sink = sink, int(column_of[row])
    return float(-cost[np.arange(n), column_of].mean())
