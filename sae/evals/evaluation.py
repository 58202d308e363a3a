"""Evaluate SAEs on a split: one pass over its rows for all of them, one over its sequences in the LM.

Owns the result (`eval.json`, `latents.parquet` beside the SAE, and every result by its key in `evals/`)
and when it may be reused. The figures are defined in the modules that sum them; this file feeds them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import NonFiniteActivation, SpecError
from actcache.progress import Progress
from sae.evals import language_model as lm_pass
from sae.evals.definitions import EVAL_VERSION
from sae.evals.latents import write_parquet
from sae.evals.row_pass import Reference, RowSums, empty_sums
from sae.evals.rows import EVAL_BATCH
from sae.evals.workers import Call, EvalJob, EvalWorker, LocalPool, RayPool, open_pool

_PILOT_SEQUENCES = 64
COMPAT = (None, "saelens")


def evaluate(s: Any, ds: Any, model: Any = None, split: str = "validation", **options: Any) -> dict[str, Any]:
    """The metrics of one SAE on a split of a dataset; see `evaluate_many`, which takes the same options."""
    return evaluate_many([s], ds, model, split, **options)[0]


def evaluate_many(
    saes: Sequence[Any],
    ds: Any,
    model: Any = None,
    split: str = "validation",
    *,
    n_sequences: int = 256,
    n_rows: int | None = None,
    target_error: float | None = None,
    join: int = 1,
    compat: str | None = None,
    tokenizer: Any = None,
    workers: int = 0,
    gpus_per_worker: float = 0,
    reuse: bool = True,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The metrics of several SAEs, each as plain JSON, in the order given.

    The rows of each site are read once for all its SAEs; the clean and ablated losses are
    computed once per LM and per site. An SAE that has a directory (`s.path`) gets `eval.json`
    and `latents.parquet` there. Deterministic, whatever `workers` is: rows and sequences are taken in
    stored order, in parts whose sums are added in one order.

    Args:
        saes: what `sae.train` or `sae.load` returned, of any sites of `ds`.
        ds: what `actcache.open` returned; another than the one they were trained on shows transfer.
        model: a path or hub id, an `actcache.lm.LM`, or None for the metrics that need no LM.
        split: the split of `ds` that is evaluated.
        n_sequences: sequences run through the LM, from the first; fewer where the split has fewer.
        n_rows: rows the SAEs see, from the first (rows are shuffled inside blocks); None for all.
        target_error: take as many sequences as a pilot of 64 says that the standard error of
            ce_recovered_zero needs to be this small for every SAE, at most all; instead of `n_sequences`.
        join: sequences joined into one for the LM, for contexts `join` times as long as harvested; what is
            left of the sequences behind the last whole group is not run.
        compat: "saelens" counts losses as SAELens and SAEBench do (`language_model`).
        tokenizer: the LM's, for token-set enrichment of each latent; None leaves it out.
        workers: Ray actors; 0 computes in this process.
        gpus_per_worker: of each actor.
        reuse: return the stored result where SAE, dataset, version and all settings are the same.
        progress: show how far it is.

    Raises:
        SpecError: an SAE's site is not in `ds`, the split is empty, the LM is not the harvested one, or its
            context is shorter than joined sequences.
        WorkerLost: actors died three times over one part.
    """
    if compat not in COMPAT:
        raise SpecError(f"compat is {compat!r}; it must be 'saelens' or None.")
    if join < 1:
        raise SpecError(f"join is {join}; it must be at least 1 sequence.")
    view = ds.split(split)
    for s in saes:
        _check(s, ds, view, split)
    if model is not None and not isinstance(model, str):
        from actcache.lm import check_harvested

        check_harvested(model, ds.spec["model"])
    n_rows = view.n_rows if n_rows is None else min(n_rows, view.n_rows)
    n_sequences = _joinable(min(n_sequences, view.n_sequences), join) if model is not None else 0
    settings = {
        "train_rows": ds.n_rows,  # their mean is an ablation, and grows with the dataset
        "target_error": target_error,
        "join": join,
        "compat": compat,
        "token_sets": tokenizer is not None,
    }
    keys = [_key(s, ds, model, split, n_rows, n_sequences, settings) for s in saes]
    results = [_stored(s, key) if reuse else None for s, key in zip(saes, keys, strict=True)]
    todo = [i for i, result in enumerate(results) if result is None]
    if todo:
        job = EvalJob(
            saes=[saes[i] for i in todo],
            ds=ds,
            split=split,
            n_rows=n_rows,
            model=model,
            compat=compat,
            join=join,
            tokenizer=tokenizer,
            references=_references(ds, [saes[i].cfg["site"] for i in todo]),
        )
        fresh = _evaluate(job, n_sequences, target_error, workers, gpus_per_worker, progress)
        for i, (figures, columns) in zip(todo, fresh, strict=True):
            results[i] = {**keys[i], **figures}
            _store(saes[i], keys[i], results[i], columns)
    return [result for result in results if result is not None]


def digest(s: Any) -> str:
    """Sha256 over an SAE's tensors and the settings that decide what they compute."""
    h = hashlib.sha256()
    settings = {name: s.cfg.get(name) for name in ("architecture", "d_in", "d_sae", "k", "site")}
    h.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(s.state_dict().items()):
        t = tensor.detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(_bytes()).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def _check(s: Any, ds: Any, view: Any, split: str) -> None:
    site = s.cfg["site"]
    if site not in ds.sites:
        raise SpecError(
            f"the SAE reads {site}, but {ds.url} holds {', '.join(ds.sites)}. "
            "Evaluate on the dataset it was trained on, or harvest that site."
        )
    if view.n_rows == 0:
        raise SpecError(f"the {split} split of {ds.url} has no rows. Choose another with --split.")


def _joinable(n_sequences: int, join: int) -> int:
    """Whole groups of `join` sequences."""
    if n_sequences < join:
        raise SpecError(f"{n_sequences} sequences cannot be joined {join} at a time. Give a smaller --join.")
    return n_sequences - n_sequences % join


def _references(ds: Any, sites: Sequence[str]) -> dict[str, Reference]:
    found = {}
    for site in sorted(set(sites)):
        stats = ds.stats(site)
        found[site] = Reference(np.asarray(stats["mean"], np.float64), float(stats["mean_norm"]))
    return found


def _key(
    s: Any, ds: Any, model: Any, split: str, n_rows: int, n_sequences: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """What decides the figures; the head of every result."""
    harvested = ds.spec["model"]
    names = ("id", "revision", "lm_dtype")
    return {
        "eval_version": EVAL_VERSION,
        "sae": {
            "digest": digest(s),
            **{name: s.cfg.get(name) for name in ("architecture", "d_in", "d_sae", "k", "site")},
        },
        "dataset": ds.id,
        "split": split,
        "n_rows": n_rows,
        "n_sequences": n_sequences,
        "model": None if model is None else {name: harvested[name] for name in names},
        "eval_batch_sequences": EVAL_BATCH,
        "settings": settings,
    }


# The files


def _place(s: Any, key: dict[str, Any]) -> Path | None:
    """Where the result of this key is kept beside the SAE, without the suffix."""
    path = getattr(s, "path", None)
    if path is None:
        return None
    settings = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return (
        Path(path) / "evals" / f"v{EVAL_VERSION}-{key['dataset'][:12]}-{key['sae']['digest'][:12]}-{settings}"
    )


def _stored(s: Any, key: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the same version, SAE, data and settings, if there is one; it becomes the current one."""
    place = _place(s, key)
    if place is None or not place.with_suffix(".parquet").exists():
        return None
    try:
        text = place.with_suffix(".json").read_text()
        result = json.loads(text)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    asked = {name: value for name, value in key.items() if name != "n_sequences"}
    if not isinstance(result, dict) or any(result.get(name) != value for name, value in asked.items()):
        return None
    _make_current(place)
    return result


def _store(s: Any, key: dict[str, Any], result: dict[str, Any] | None, columns: dict[str, Any]) -> None:
    place = _place(s, key)
    if place is None:
        return
    place.parent.mkdir(exist_ok=True)
    write_parquet(place.with_suffix(".parquet"), columns)
    _replace(place.with_suffix(".json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    _make_current(place)


def _make_current(place: Path) -> None:
    """`eval.json` and `latents.parquet` are those of the evaluation asked for last."""
    directory = place.parent.parent
    for suffix, name in ((".parquet", "latents.parquet"), (".json", "eval.json")):
        data = place.with_suffix(suffix).read_bytes()
        if not (directory / name).exists() or (directory / name).read_bytes() != data:
            _replace(directory / name, data)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


# The passes


def _evaluate(
    job: EvalJob,
    n_sequences: int,
    target_error: float | None,
    workers: int,
    gpus_per_worker: float,
    progress: bool,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Figures and columns of each SAE in evaluation mode; training mode is restored afterwards."""
    was_training = [s.training for s in job.saes]
    for s in job.saes:
        s.eval()
    try:
        with open_pool(job, workers, gpus_per_worker) as pool:
            sums = _row_sums(pool, job, progress)
            from_lm = _lm_figures(pool, job, n_sequences, target_error, progress)
            weights = list(pool.run([("weights", (i,)) for i in range(len(job.saes))]))
    finally:
        for s, mode in zip(job.saes, was_training, strict=True):
            s.train(mode)
    found = []
    for s, rows, more, columns in zip(job.saes, sums.saes, from_lm, weights, strict=True):
        figures = rows.figures(sums.sites[s.cfg["site"]])
        errors = {**figures.pop("standard_errors"), **more.pop("standard_errors", {})}
        breakdowns = {**figures.pop("breakdowns"), **more.pop("breakdowns", {})}
        extra = {"standard_errors": errors, "breakdowns": breakdowns}
        result = {**figures, **_weight_figures(rows, columns), **more, **extra}
        _check_finite(s, result)
        found.append((result, {**rows.columns(), **columns}))
    return found


def _weight_figures(rows: Any, columns: dict[str, Any]) -> dict[str, float]:
    """Figures of latents that are alive, from the columns that weights give."""
    alive_F = rows.latents.fires_F > 0
    found = {}
    if "nearest_cosine" in columns:
        found["decoder_max_cosine"] = float(columns["nearest_cosine"].mean())
    if "logit_kurtosis" in columns:
        kurtosis = columns["logit_kurtosis"][alive_F]
        if np.isfinite(kurtosis).any():
            found["logit_kurtosis"] = float(np.nanmedian(kurtosis))
    return found


def _check_finite(s: Any, figures: dict[str, Any]) -> None:
    bad = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise NonFiniteActivation(
            f"{_name(s)} gives {', '.join(bad)} that are not finite; a reconstruction was inf or NaN. "
            "Train it again (a lower learning rate, or float32)."
        )


def _name(s: Any) -> str:
    return str(s.path) if getattr(s, "path", None) else f"the {s.cfg['architecture']} SAE of {s.cfg['site']}"


def _row_sums(pool: LocalPool | RayPool, job: EvalJob, show: bool) -> RowSums:
    n_parts = EvalWorker(job).n_parts
    total = empty_sums(job.saes, int(job.ds.spec.context_size))  # of our own: what Ray hands out is read-only
    with Progress("evaluating rows", total=job.n_rows, unit="rows", show=show) as progress:
        for sums in pool.run([("rows", (i,)) for i in range(n_parts)]):
            progress.advance(sums.saes[0].recon.n_rows)
            total.merge(sums)
    return total


def _lm_figures(
    pool: LocalPool | RayPool, job: EvalJob, n_sequences: int, target_error: float | None, show: bool
) -> list[dict[str, Any]]:
    if job.model is None:
        return [{} for _ in job.saes]
    losses: dict[str, lm_pass.Losses] = {}
    available = _joinable(job.ds.split(job.split).n_sequences, job.join)
    if target_error is not None:
        pilot = _joinable(min(max(_PILOT_SEQUENCES, job.join), available), job.join)
        _add_losses(pool, losses, 0, pilot, job.join, show)
        n_sequences = _sequences_for(job, losses, pilot, target_error, available)
        _add_losses(pool, losses, pilot, n_sequences, job.join, show)
    else:
        _add_losses(pool, losses, 0, n_sequences, job.join, show)
    figures = []
    for i, s in enumerate(job.saes):
        clean, zero, mean = (
            losses[name] for name in ("clean", f"zero:{s.cfg['site']}", f"mean:{s.cfg['site']}")
        )
        spliced, random = losses[f"spliced:{i}"], losses[f"random:{i}"]
        metrics, errors = lm_pass.lm_metrics(clean, spliced, zero, mean, random)
        by_position = lm_pass.losses_by_position(clean, spliced, zero, int(job.ds.spec.context_size))
        figures.append(
            {
                **metrics,
                "standard_errors": errors,
                "breakdowns": {"loss_by_position": by_position},
                "n_tokens": clean.n_tokens,
                "n_sequences": n_sequences,
            }
        )
    return figures


def _add_losses(
    pool: LocalPool | RayPool,
    losses: dict[str, lm_pass.Losses],
    start: int,
    stop: int,
    join: int,
    show: bool,
) -> None:
    """Add the losses of sequences [start, stop)."""
    spans = list(_spans(start, stop, lm_pass.PART_SEQUENCES * join))
    calls: list[Call] = [("losses", span) for span in spans]
    label = "evaluating the language model"
    with Progress(label, total=stop - start, unit="sequences", show=show) as progress:
        for span, found in zip(spans, pool.run(calls), strict=True):
            for name, sums in found.items():
                losses.setdefault(name, lm_pass.Losses()).merge(sums)
            progress.advance(span[1] - span[0])


def _spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _sequences_for(
    job: EvalJob, losses: dict[str, lm_pass.Losses], pilot: int, target: float, available: int
) -> int:
    """Sequences for the standard error of ce_recovered_zero to be `target`: errors fall with their root.

    Rounded up to whole eval batches; no fewer than the pilot.
    """
    needed = pilot
    for i, s in enumerate(job.saes):
        clean, zero, spliced = losses["clean"], losses[f"zero:{s.cfg['site']}"], losses[f"spliced:{i}"]
        _, errors = lm_pass.lm_metrics(clean, spliced, zero, zero, zero)
        error = errors.get("ce_recovered_zero")
        if error is not None:
            needed = max(needed, math.ceil(pilot * (error / target) ** 2))
    batch = EVAL_BATCH * job.join
    return min(-(-needed // batch) * batch, available)
