"""Evaluate SAEs on a split: one pass over its rows for all of them, one over its sequences per LM.

Owns the result (`eval.json`, `latents.parquet` beside the SAE) and when it may be reused. The
figures are defined in `reconstruction`, `latents` and `language_model`; this file only feeds them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.errors import NonFiniteActivation, SpecError
from actcache.progress import Progress
from sae.evals.definitions import EVAL_VERSION
from sae.evals.language_model import Losses, lm_metrics, measure_losses
from sae.evals.latents import LatentStats, sparse_codes
from sae.evals.reconstruction import Reconstruction

_CHUNK_ROWS = 4096  # 100 MB of float32 latents at d_sae 6144


def evaluate(
    s: Any,
    ds: Any,
    model: Any = None,
    split: str = "validation",
    *,
    n_sequences: int = 256,
    n_rows: int | None = None,
    reuse: bool = True,
) -> dict[str, Any]:
    """The metrics of one SAE on a split of a dataset; see `evaluate_many`."""
    return evaluate_many([s], ds, model, split, n_sequences=n_sequences, n_rows=n_rows, reuse=reuse)[0]


def evaluate_many(
    saes: Sequence[Any],
    ds: Any,
    model: Any = None,
    split: str = "validation",
    *,
    n_sequences: int = 256,
    n_rows: int | None = None,
    reuse: bool = True,
) -> list[dict[str, Any]]:
    """The metrics of several SAEs, each as plain JSON, in the order given.

    The rows of each site are read once for all its SAEs; the clean and ablated losses are
    computed once per LM and per site. An SAE that has a directory (`s.path`) gets `eval.json`
    and `latents.parquet` there. Deterministic: rows and sequences are taken in stored order.

    Args:
        saes: what `sae.train` or `sae.load` returned, of any sites of `ds`.
        ds: what `actcache.open` returned.
        model: a path or hub id, an `actcache.lm.LM`, or None for the metrics that need no LM.
        split: the split of `ds` that is evaluated.
        n_sequences: sequences run through the LM, from the first; fewer where the split has fewer.
        n_rows: rows the SAEs see, from the first (rows are shuffled inside blocks); None for all.
        reuse: return the stored result where SAE, dataset, version and all settings are the same.

    Raises:
        SpecError: an SAE's site is not in `ds`, the split is empty, or the LM is not the harvested one.
    """
    view = ds.split(split)
    for s in saes:
        _check(s, ds, view, split)
    lm = _load(model, ds, _device(saes[0])) if saes else None
    n_rows = view.n_rows if n_rows is None else min(n_rows, view.n_rows)
    n_sequences = min(n_sequences, view.n_sequences) if lm else 0
    keys = [_key(s, ds, lm, split, n_rows, n_sequences) for s in saes]
    results = [_stored(s, key) if reuse else None for s, key in zip(saes, keys, strict=True)]
    todo = [i for i, result in enumerate(results) if result is None]
    fresh = _evaluate([saes[i] for i in todo], ds, view, lm, n_rows, n_sequences) if todo else []
    for i, (figures, latents) in zip(todo, fresh, strict=True):
        results[i] = {**keys[i], **figures}
        _store(saes[i], results[i], latents)
    return [result for result in results if result is not None]


def digest(s: Any) -> str:
    """Sha256 over an SAE's tensors and the settings that decide what they compute."""
    h = hashlib.sha256()
    settings = {name: s.cfg.get(name) for name in ("architecture", "d_in", "d_sae", "k", "site")}
    h.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(s.state_dict().items()):
        t = tensor.detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()


def _check(s: Any, ds: Any, view: Any, split: str) -> None:
    site = s.cfg["site"]
    if site not in ds.sites:
        raise SpecError(
            f"the SAE reads {site}, but {ds.url} holds {', '.join(ds.sites)}. "
            "Evaluate on the dataset it was trained on, or harvest that site."
        )
    if view.n_rows == 0:
        raise SpecError(f"the {split} split of {ds.url} has no rows. Choose another with --split.")


def _load(model: Any, ds: Any, device: torch.device) -> Any:
    """The LM, in the dtype of the harvest; its weights must be those that the dataset came from."""
    from actcache.lm import check_harvested, load_harvested_lm

    if model is None:
        return None
    if isinstance(model, str):
        return load_harvested_lm(ds.spec["model"], model, device=str(device))
    check_harvested(model, ds.spec["model"])
    return model


def _key(s: Any, ds: Any, lm: Any, split: str, n_rows: int, n_sequences: int) -> dict[str, Any]:
    """What decides the figures; the head of every result."""
    lm_id = {"id": lm.model_id, "revision": lm.revision, "lm_dtype": lm.lm_dtype} if lm else None
    names = ("architecture", "d_in", "d_sae", "k", "site")
    return {
        "eval_version": EVAL_VERSION,
        "sae": {"digest": digest(s), **{name: s.cfg.get(name) for name in names}},
        "dataset": ds.id,
        "split": split,
        "n_rows": n_rows,
        "n_sequences": n_sequences,
        "model": lm_id,
    }


def _stored(s: Any, key: dict[str, Any]) -> dict[str, Any] | None:
    """The result beside the SAE, if it is of the same version, SAE, data and settings."""
    path = getattr(s, "path", None)
    if path is None or not (Path(path) / "latents.parquet").exists():
        return None
    try:
        result = json.loads((Path(path) / "eval.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    same = isinstance(result, dict) and all(result.get(name) == value for name, value in key.items())
    return result if same else None


def _store(s: Any, result: dict[str, Any] | None, latents: LatentStats) -> None:
    path = getattr(s, "path", None)
    if path is None:
        return
    latents.write_parquet(Path(path) / "latents.parquet")
    partial_file = Path(path) / "eval.json.partial"
    partial_file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    partial_file.replace(Path(path) / "eval.json")


def _evaluate(
    saes: Sequence[Any], ds: Any, view: Any, lm: Any, n_rows: int, n_sequences: int
) -> list[tuple[dict[str, Any], LatentStats]]:
    """The figures of each SAE in evaluation mode; training mode is restored afterwards."""
    was_training = [s.training for s in saes]
    for s in saes:
        s.eval()
    try:
        from_rows = _row_figures(saes, view, n_rows)
        from_lm = _lm_figures(saes, ds, view, lm, n_sequences)
    finally:
        for s, mode in zip(saes, was_training, strict=True):
            s.train(mode)
    results = []
    for s, (figures, stats), more in zip(saes, from_rows, from_lm, strict=True):
        _check_finite(s, {**figures, **more})
        results.append(({**figures, **more}, stats))
    return results


def _check_finite(s: Any, figures: dict[str, Any]) -> None:
    bad = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise NonFiniteActivation(
            f"{_name(s)} gives {', '.join(bad)} that are not finite; a reconstruction was inf or NaN. "
            "Train it again (a lower learning rate, or float32)."
        )


def _name(s: Any) -> str:
    return str(s.path) if getattr(s, "path", None) else f"the {s.cfg['architecture']} SAE of {s.cfg['site']}"


@torch.no_grad()
def _row_figures(saes: Sequence[Any], view: Any, n_rows: int) -> list[tuple[dict[str, Any], LatentStats]]:
    recon = [Reconstruction(int(s.cfg["d_in"])) for s in saes]
    stats = [LatentStats(int(s.cfg["d_sae"])) for s in saes]
    sites = sorted({s.cfg["site"] for s in saes})
    with Progress("evaluating rows", total=n_rows, unit="rows") as progress:
        for start in range(0, n_rows, _CHUNK_ROWS):
            where = slice(start, min(start + _CHUNK_ROWS, n_rows))
            rows = view.rows(where)
            acts = {site: _tensor(view.read(site, where)) for site in sites}
            for i, s in enumerate(saes):
                acts_ND = acts[s.cfg["site"]].to(_device(s))
                latents_NF = s.encode(acts_ND)
                recon[i].update(acts_ND, s.decode(latents_NF))
                stats[i].update(sparse_codes(latents_NF), rows.sequence, rows.position)
            progress.advance(where.stop - where.start)
    return [
        ({**u.metrics(), **r.metrics(), "histograms": u.histograms()}, u)
        for r, u in zip(recon, stats, strict=True)
    ]


def _tensor(acts_ND: np.ndarray) -> Tensor:
    return torch.from_numpy(
        np.require(acts_ND, np.float32, ["C", "W"])
    )  # a reader may hand out read-only memory


def _device(s: Any) -> torch.device:
    return next(iter(s.parameters()), torch.zeros(())).device


def _lm_figures(saes: Sequence[Any], ds: Any, view: Any, lm: Any, n_sequences: int) -> list[dict[str, Any]]:
    if lm is None:
        return [{} for _ in saes]
    interventions: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for i, s in enumerate(saes):
        site = s.cfg["site"]
        mean_D = torch.as_tensor(ds.stats(site)["mean"], dtype=torch.float32, device=lm.device)
        interventions[f"zero:{site}"] = (site, torch.zeros_like)
        interventions[f"mean:{site}"] = (site, mean_D.expand_as)
        interventions[f"spliced:{i}"] = (site, partial(_reconstruct, s))
    losses: dict[str, Losses] = {}
    with Progress("evaluating the language model", total=n_sequences, unit="sequences") as progress:
        losses = measure_losses(lm, view, interventions, n_sequences, progress.advance)
    figures = []
    for i, s in enumerate(saes):
        zero, mean = losses[f"zero:{s.cfg['site']}"], losses[f"mean:{s.cfg['site']}"]
        metrics, errors = lm_metrics(losses["clean"], losses[f"spliced:{i}"], zero, mean)
        figures.append({**metrics, "standard_errors": errors, "n_tokens": sum(losses["clean"].n_tokens)})
    return figures


def _reconstruct(s: Any, acts_MD: Tensor) -> Tensor:
    recon_MD: Tensor = s(acts_MD.to(_device(s)))
    return recon_MD.to(acts_MD.device)
