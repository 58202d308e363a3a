"""Replay: rows of a dataset computed again by the LM, and compared with what is stored.

The one check that needs the LM. Rows are drawn by seed, evenly over sites and splits. Imports torch.
Shapes: K rows, B sequences of a batch, T tokens, D = d_in.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .codec import Precision
from .progress import Progress
from .reader import Dataset

_BATCH_SEQUENCES = 8
_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Half a unit in the last place of `lm_dtype`, relative."""
KERNEL_UNITS = 128.0
"""How far another kernel or LM batch may move a value, in units of the row's largest value: eager attention
in place of SDPA moved the bundled LM's last residual by at most 69 (float16; 54 bfloat16, 64 float32; 32
sequences), other batch sizes and thread counts by 1 at most."""


def replay(
    dataset: Dataset,
    n_rows: int,
    *,
    seed: int = 0,
    model: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Recompute `n_rows` random rows; returns counts, and a line for each row that differs.

    A value may differ from the LM's by the stated error of its precision (docs/format.md,
    "Precision"), and by `KERNEL_UNITS` units in the last place of `lm_dtype` of the row's largest value:
    another kernel or batch adds in another order.

    Raises:
        SpecError: the LM is not there, or of another revision.
    """
    import torch

    from .capture import run_capture
    from .lm import load_harvested_lm

    identity, attention = dataset.manifest.identity, dataset.manifest.provenance.get("attention")
    harvested = identity["model"]
    lm = load_harvested_lm(harvested, model, device=device, attn_implementation=attention)
    precision, unit = Precision.parse(identity["precision"]), _UNIT[harvested["lm_dtype"]]
    problems: list[str] = []
    worst = 0.0
    drawn = _draw(dataset, n_rows, seed)
    with Progress("replay", sum(map(len, drawn.values())), "rows", show=progress) as bar:
        for (split, site), rows_K in drawn.items():
            view = dataset.split(split)
            tokens, stored_KD = view.rows(rows_K), view.read(site, rows_K)
            allowed_KD = _stated_error(view, site, rows_K, stored_KD, precision)
            for i in range(0, len(rows_K), _BATCH_SEQUENCES):
                part = slice(i, i + _BATCH_SEQUENCES)
                sequences = view.sequences(tokens.sequence[part])
                input_ids_BT, position_ids_BT = sequences.input_ids.astype(np.int64), None
                if sequences.position_ids is not None:
                    position_ids_BT = torch.from_numpy(sequences.position_ids.astype(np.int64)).to(device)
                with torch.inference_mode():
                    ids = torch.from_numpy(input_ids_BT).to(device)
                    acts = run_capture(lm.model, ids, [site], position_ids_BT=position_ids_BT)[site]
                acts_BTD = acts.float().cpu().numpy()
                at = np.arange(len(input_ids_BT)), tokens.position[part]
                lm_KD, ids_K = acts_BTD[at], input_ids_BT[at]
                slack_K1 = KERNEL_UNITS * unit * np.abs(lm_KD).max(axis=1, keepdims=True)
                error_KD = np.abs(lm_KD - stored_KD[part])
                wrong_K = (error_KD > allowed_KD[part] + slack_K1).any(axis=1) | (
                    ids_K != tokens.token_id[part]
                )
                share_KD = error_KD / np.maximum(allowed_KD[part], np.finfo(np.float32).tiny)
                worst = max(worst, float(share_KD.max()))
                problems += [
                    f"{dataset.url} row {rows_K[i + k]} of {split}/{site} is not the LM's value: off by "
                    f"{error_KD[k].max():.3g}, allowed {(allowed_KD[part] + slack_K1)[k].max():.3g}; "
                    "harvest on another root and compare, or restore a copy"
                    for k in np.flatnonzero(wrong_K)
                ]
                bar.advance(len(lm_KD))
    counts: dict[str, Any] = {
        "rows replayed": sum(map(len, drawn.values())),
        "rows beyond the stated error": len(problems),
    }
    if precision.quantised:
        counts["largest error, in units of the row's scale"] = round(worst / 2, 4)
    elif precision.kind != "fp32":
        counts["largest error, in units in the last place"] = round(worst / 2, 4)
    return counts, problems


def _draw(dataset: Dataset, n_rows: int, seed: int) -> Mapping[tuple[str, str], np.ndarray]:
    """Rows by (split, site), as even as they go; with repetition, so a short split is no trouble."""
    views = {split: dataset.split(split) for split in dataset.splits}
    sizes = {
        (split, site): n
        for split, view in views.items()
        for site in dataset.sites
        if (n := view._site_rows(site))
    }
    rng = np.random.default_rng(seed)
    shares = {place: n_rows // len(sizes) + (i < n_rows % len(sizes)) for i, place in enumerate(sizes)}
    return {place: np.sort(rng.integers(sizes[place], size=n)) for place, n in shares.items() if n}


def _stated_error(
    view: Dataset, site: str, rows_K: np.ndarray, stored_KD: np.ndarray, precision: Precision
) -> np.ndarray:
    """The largest error [K, D] that docs/format.md, "Precision", allows."""
    if precision.quantised:
        scale_K = view._gather(f"{site}/scale", rows_K)
        channel_D = view._shared.calibration(site).loud_D
        widest = np.sqrt(stored_KD.shape[1]) if precision.rotated else 1.0 if channel_D is None else channel_D
        return np.broadcast_to(scale_K[:, None] / 2 * widest, stored_KD.shape)
    bits = {"bf16": 8, "fp16": 11, "fp32": 24}[precision.kind]
    exact = precision.kind == "fp32"
    half_unit_KD = np.ldexp(0.5, np.frexp(stored_KD)[1] - bits)
    smallest = 2.0**-25 if precision.kind == "fp16" else 0.0  # half a subnormal
    return np.zeros_like(stored_KD) if exact else np.maximum(half_unit_KD, smallest)
