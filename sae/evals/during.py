"""Evaluation while SAEs are trained: the settings, what is refused before training, and the work itself.

`EvalDuring` says how often and on what. `Examiner` evaluates one stored checkpoint after the other; it runs in
another process (sae/evals/elsewhere.py) or on Ray (sae/evals/on_ray.py), and writes nothing. Rank 0 starts it and
keeps what comes back (sae/evals/monitor.py).
"""

import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actcache.errors import SpecError
from sae.evals.definitions import DEFINITIONS

_HEAD = ("eval_version", "split", "n_rows", "n_sequences")
_READ_AT_ONCE = 8 << 30  # bytes of a local LM that are read to know its revision before training begins


@dataclass(frozen=True, kw_only=True)
class EvalDuring:
    """How SAEs are evaluated while they are trained. It changes no number of the training."""

    every_rows: int
    """Rows between evaluations, e.g. 1_000_000: a checkpoint is made after each multiple, and evaluated on other
    devices while training goes on."""

    n_sequences: int = 64
    """Sequences run through the LM, for CE recovered. 0 leaves the LM out: the metrics of stored rows alone."""

    model: str | None = None
    """LM, a path or hub id. None: the one that was harvested."""

    split: str = "validation"
    """Split of the dataset."""

    n_rows: int | None = None
    """Rows of the split that the SAEs see, from the first. None: all."""

    device: str = "cpu"
    """Where a process beside the training evaluates, e.g. cuda:1. A run on Ray takes `gpus` instead."""

    cpus: int = 1
    """Threads of the evaluation. A run on Ray reserves as many CPUs."""

    gpus: float = 0
    """GPUs that a run on Ray reserves while it evaluates; a share, e.g. 0.5, will do. 0: on CPUs."""

    wait_s: float = 600.0
    """Seconds that the end of the run waits for the last evaluation."""

    def __post_init__(self) -> None:
        for name, least in (("every_rows", 1), ("n_sequences", 0), ("cpus", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"eval {name} is {getattr(self, name)}; it must be at least {least}")
        if self.n_rows is not None and self.n_rows < 1:
            raise ValueError(f"eval n_rows is {self.n_rows}; it must be at least 1, or none for all")
        if not 0 <= self.wait_s < math.inf:
            raise ValueError(f"eval wait_s is {self.wait_s}; it must be a number of seconds")

    @classmethod
    def of(cls, given: "EvalDuring | int | None") -> "EvalDuring | None":
        """The settings that `eval_every` of `sae.train` means: rows alone, or all of them."""
        return cls(every_rows=given) if isinstance(given, int) else given


@dataclass(frozen=True, kw_only=True)
class EvalDuringJob:
    """All that another process is told of a run that it evaluates. It pickles, and holds no rows."""

    settings: EvalDuring
    ds: Any
    """The dataset; another process opens it again."""
    run: str
    """The run's directory, an absolute path or a URL."""
    storage_options: Mapping[str, Any] | None = None
    """Passed to fsspec for the run's directory."""


def job_of(
    settings: EvalDuring,
    stream: Any,
    out: str | os.PathLike[str] | None,
    storage_options: Mapping[str, Any] | None = None,
) -> EvalDuringJob:
    """The job of evaluating a run.

    Raises:
        SpecError: the run keeps no checkpoints that others can read, the stream is not that of one dataset, or the
            split is empty.
    """
    from sae.files import is_url, local_path

    if out is None or os.fspath(out).startswith("memory://"):
        raise SpecError(
            f"SAEs are evaluated during training from stored checkpoints, and out is {out}; give a directory or a URL "
            "that other processes see, or leave out eval_every"
        )
    ds = getattr(stream, "dataset", None)
    if ds is None or str(ds.url).startswith("memory://"):
        found = f"a {type(stream).__name__} is" if ds is None else f"{ds.url} is"
        raise SpecError(
            f"{found} not a stored dataset with held-out rows, which evaluation during training reads; take "
            "actcache.open(...).stream(...), or leave out eval_every"
        )
    _check_data(settings, ds)
    run = os.fspath(out) if is_url(out) else str(local_path(out).absolute())
    return EvalDuringJob(settings=settings, ds=ds, run=run, storage_options=storage_options)


def _check_data(settings: EvalDuring, ds: Any) -> None:
    view = ds.split(settings.split)
    if view.n_rows == 0:
        raise SpecError(
            f"the {settings.split} split of {ds.url} has no rows to evaluate on; choose another with --eval-split"
        )
    try:
        pickle.dumps(ds)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise SpecError(
            f"the dataset {ds.url} cannot be sent to another process ({error}); take one of actcache.open(...)"
        ) from error


def check_lm(settings: EvalDuring, ds: Any) -> None:
    """Refuse what the LM would be refused for on this machine, before its weights are loaded.

    Raises:
        SpecError: it is not at hand, or another than the one harvested.
    """
    if not settings.n_sequences:
        return
    from actcache.lm import check_at_hand

    try:
        check_at_hand(ds.spec["model"], settings.model, _READ_AT_ONCE)
    except SpecError as error:
        raise SpecError(
            f"no LM to evaluate in during training: {str(error).rstrip('.')} (--eval-model), or evaluate without "
            "one (--eval-sequences 0)"
        ) from error


class Examiner:
    """Evaluates a run's checkpoints, one after the other. The LM is loaded once, when it is first needed."""

    def __init__(self, job: EvalDuringJob, device: str) -> None:
        import torch

        torch.set_num_threads(job.settings.cpus)
        self._job, self._device = job, device
        self._saes: dict[str, Any] = {}
        self._lm: Any = None

    def load(self, rows: int) -> None:
        """Read the SAEs that train at the checkpoint after `rows` rows; it may go once this returns.

        Raises:
            FileNotFoundError: it has gone already.
        """
        from sae.snapshots import Moment

        job = self._job
        moment = Moment(job.run, rows, ds=job.ds, storage_options=job.storage_options)
        found = {name: moment.load(name) for name in moment.running()}
        for s in found.values():
            s.path = None  # a finished SAE's own eval.json is left alone
        self._saes = {name: s.to(self._device) for name, s in found.items()}

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """The figures of each SAE that was loaded, by its name."""
        from sae.evals.evaluation import evaluate_many

        settings = self._job.settings
        saes, self._saes = self._saes, {}
        results = evaluate_many(
            list(saes.values()),
            self._job.ds,
            self._loaded_lm() if settings.n_sequences else None,
            settings.split,
            n_sequences=settings.n_sequences,
            n_rows=settings.n_rows,
            reuse=False,
            progress=False,
        )
        return {name: figures_of(result) for name, result in zip(saes, results, strict=True)}

    def _loaded_lm(self) -> Any:
        if self._lm is None:
            from actcache.lm import load_harvested_lm

            harvested = self._job.ds.spec["model"]
            self._lm = load_harvested_lm(harvested, self._job.settings.model, device=self._device)
        return self._lm


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of evals.jsonl has of a result: all that is one number, without errors and breakdowns."""
    return {name: result[name] for name in (*_HEAD, *DEFINITIONS) if name in result}
