"""The training loop: one stream of batches, any number of SAEs, a directory that survives a kill.

Owns `Training`, the run directory (`run.json`, `metrics.jsonl`, when to checkpoint) and the
learning-rate schedule. What a step does is sae/learner.py's; where batches come from is the
stream's (`actcache` datasets, or `sae.ArrayStream`).

A run directory holds `run.json`, while unfinished `checkpoint.safetensors`, and for each SAE a
directory `<architecture>-<d_sae>-<k>` with `metrics.jsonl` and, once finished, the SAE itself.

Shapes: N rows, D = d_in.
"""

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from actcache.errors import ActcacheError, Conflict, SpecError
from actcache.progress import Progress

from . import checkpoint
from .architectures import Config, config_to_dict
from .core import SAE, load, read_json
from .learner import Learner, Rules, geometric_median
from .step import Outcome, StepKind

logger = logging.getLogger(__name__)

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
RUN_FORMAT = 1


class NonFiniteLoss(ActcacheError, ArithmeticError):
    """A loss became inf or NaN; the message names the SAE, the step and any bad rows."""


class Batch(Protocol):
    """Rows of each site, aligned."""

    def __getitem__(self, site: str, /) -> np.ndarray: ...
    def __len__(self) -> int: ...


class Stream(Protocol):
    """What the trainer reads from; `ds.stream(...)` and `sae.ArrayStream` are such.

    A stream with `restore(state)` resumes at once; another is read again up to the row reached.
    """

    @property
    def sites(self) -> Sequence[str]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def n_rows(self) -> int: ...
    def stats(self, site: str, /) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """How SAEs are trained, whatever their architecture. Rows are activations of one token."""

    n_rows: int
    """Rows to train on, e.g. 2_000_000; a stream may serve a row in several epochs."""

    lr: float | None = None
    """Peak learning rate of Adam, e.g. 3e-4. None: 2e-4 / sqrt(d_sae / 16384) for each SAE (the
    scaling of Gao et al. 2024, sec. A.3, with dictionary_learning's constant)."""

    seed: int = 0
    """Decides the initial weights. The order of rows is the stream's."""

    lr_warmup_rows: int | None = None
    """Rows over which the learning rate rises linearly from 0. None: a twentieth of the run, at
    most 2,048,000 (1000 steps of 2048, as dictionary_learning)."""

    lr_decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0: the last
    fifth, as in SAELens' tutorials."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moving-average factors."""

    clip_norm: float = 1.0
    """Gradients with a larger norm (of all parameters together) are scaled down to it."""

    dead_after_rows: int | None = None
    """A latent that was not active for this many rows is dead, and AuxK works on it. None: 10
    million (Gao et al. 2024, sec. A.2), but at most a tenth of the run."""

    b_dec_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Initial decoder bias, taken from the first batch (Gao et al. 2024, sec. A.1)."""

    input_scale: Literal["sqrt_d", "none"] = "sqrt_d"
    """`sqrt_d` multiplies activations so that their mean norm is sqrt(d_in), as SAELens; learning
    rates then carry over between models. The saved SAE takes raw activations either way."""

    step: StepKind = "sparse"
    """`sparse` touches only the chosen latents; `dense` is the slow plain formula it must equal."""

    log_every: int = 20
    """Steps between lines of metrics.jsonl."""

    checkpoint_every_rows: int = 1_000_000
    """Rows between checkpoints, when the run has a directory."""

    def __post_init__(self) -> None:
        for name in ("n_rows", "log_every", "checkpoint_every_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 <= self.lr_decay <= 1:
            raise ValueError(f"lr_decay is {self.lr_decay}; it is a share of the run, between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and below 1")
        if self.lr_warmup_rows is not None and self.lr_warmup_rows < 0:
            raise ValueError(f"lr_warmup_rows is {self.lr_warmup_rows}; it must not be negative")
        if self.dead_after_rows is not None and self.dead_after_rows < 1:
            raise ValueError(f"dead_after_rows is {self.dead_after_rows}; it must be at least 1")
        for name, kind in (("b_dec_init", None), ("input_scale", None), ("step", StepKind)):
            choices = get_args(kind or type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def rules(self, d_sae: int) -> Rules:
        """What a step needs, with the defaults filled in for an SAE of this width."""
        dead_after = self.dead_after_rows
        return Rules(
            lr=self.lr if self.lr is not None else 2e-4 / math.sqrt(d_sae / 16384),
            betas=self.betas,
            clip_norm=self.clip_norm,
            dead_after_rows=max(1, min(10_000_000, self.n_rows // 10)) if dead_after is None else dead_after,
            step=self.step,
        )

    def lr_factor(self, rows_before: int, n_rows: int) -> float:
        """Share of the peak learning rate for a step of `n_rows` after `rows_before`."""
        warmup = self.lr_warmup_rows
        if warmup is None:
            warmup = min(2_048_000, self.n_rows // 20)
        rise = min(1.0, (rows_before + n_rows) / warmup) if warmup else 1.0
        decay_rows = self.lr_decay * self.n_rows
        fall = min(1.0, (self.n_rows - rows_before) / decay_rows) if decay_rows else 1.0
        return rise * fall


def train(
    stream: Stream,
    configs: Sequence[Config] | Config,
    training: Training,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
) -> list[SAE]:
    """Trained SAEs, in the order of `configs`; the data are read once for all of them.

    With `out`, everything is kept there: an interrupted run continues where its last checkpoint
    was, to the same bits on the same machine, and a finished one is returned at once.

    Args:
        stream: batches, from `ds.stream(...)` or `sae.ArrayStream`.
        configs: `sae.TopK(...)`, `sae.BatchTopK(...)`; several are trained side by side.
        training: rows, learning rate, seed.
        out: the run directory; None keeps nothing.
        resume: False refuses a directory that already holds a run.

    Raises:
        SpecError: a site that the stream has not, or a stream that ends too soon.
        Conflict: `out` holds a run of other settings; the message names the difference.
        NonFiniteLoss: training diverged, or the data hold inf or NaN. The last checkpoint is intact.
        StoreError: the disk refused. The last checkpoint is intact.
    """
    listed = [configs] if not isinstance(configs, Sequence) else list(configs)
    trainer = Trainer(stream, listed, training, out=out)
    done = trainer.open(resume)
    if done is not None:
        return done
    with torch.enable_grad():
        return trainer.run()


class Trainer:
    """A run: learners, their stream and their directory. `train` is the usual way in."""

    def __init__(
        self,
        stream: Stream,
        configs: Sequence[Config],
        training: Training,
        *,
        out: str | os.PathLike[str] | None = None,
    ) -> None:
        if not configs:
            raise ValueError(
                "there is no SAE to train; give at least one config, e.g. sae.TopK(d_sae=1536, k=32)"
            )
        served = getattr(stream, "epochs", None)
        if served is not None and served * stream.n_rows < training.n_rows:
            raise SpecError(
                f"n_rows is {training.n_rows:,}, but the stream serves {served} x {stream.n_rows:,} rows. "
                f"Open it with epochs={math.ceil(training.n_rows / stream.n_rows)}, or ask for fewer rows."
            )
        self.stream, self.training = stream, training
        self.configs = [replace(c, site=_resolve_site(c.site, stream.sites)) for c in configs]
        self.names = run_names(self.configs)
        self.directory = None if out is None else Path(out)
        self.rows = self.step = 0
        self.stats = {site: stream.stats(site) for site in {str(c.site): None for c in self.configs}}
        self.learners = [self._learner(config) for config in self.configs]
        self._buffers: dict[str, Tensor] = {}
        self._log_rows, self._log_time, self._log_stall = 0, time.perf_counter(), 0.0

    def open(self, resume: bool) -> list[SAE] | None:
        """Take up what the directory holds: a finished run is returned, a checkpoint restored.

        Raises:
            Conflict: it holds a run of other settings, or any run and `resume` is False.
        """
        if self.directory is None:
            return None
        wanted = json.loads(json.dumps(self._description()))
        run_file = self.directory / RUN_FILE
        if run_file.exists():
            found = read_json(run_file)
            finished = found.pop("finished", False)
            _check_same_run(self.directory, found, wanted, resume)
            if finished:
                logger.info("%s already holds this finished run; nothing to train", self.directory)
                return [load(self.directory / name) for name in self.names]
        else:
            self._make_directories()
            self._write_run(finished=False)
        stored = checkpoint.load_checkpoint(self.directory)
        if stored is not None:
            self._restore(*stored)
            logger.info("%s: continuing after %s rows", self.directory, f"{self.rows:,}")
        else:
            for name in self.names:
                (self.directory / name / METRICS_FILE).write_bytes(b"")
        return None

    def run(self) -> list[SAE]:
        """Train to the end, and save."""
        label = f"training {len(self.learners)} SAE{'s' if len(self.learners) > 1 else ''}"
        self._log_rows, self._log_time, self._log_stall = self.rows, time.perf_counter(), 0.0
        if self.rows < self.training.n_rows:
            batches = iter(self.stream)
            try:
                with Progress(label, total=self.training.n_rows, unit="rows", done=self.rows) as progress:
                    self._loop(batches, progress)
            finally:
                close = getattr(batches, "close", None)  # ends the threads of a stream that reads ahead
                if close is not None:
                    close()
        saes = [learner.finished(self._cfg(learner)) for learner in self.learners]
        if self.directory is not None:
            for s, name in zip(saes, self.names, strict=True):
                s.save(self.directory / name)
            self._write_run(finished=True)
            checkpoint.remove_checkpoint(self.directory)
        return saes

    def _loop(self, batches: Iterator[Batch], progress: Progress) -> None:
        while self.rows < self.training.n_rows:
            waiting_since = time.perf_counter()
            batch = next(batches, None)
            self._log_stall += time.perf_counter() - waiting_since
            if batch is None:
                self._save_checkpoint()
                raise SpecError(
                    f"the stream ended after {self.rows:,} rows, but n_rows is {self.training.n_rows:,}. "
                    "Ask for more epochs of the stream, or for fewer rows."
                )
            if len(batch) == 0:
                continue
            n = min(len(batch), self.training.n_rows - self.rows)
            outcomes = self._train_batch(batch, n)
            every = self.training.checkpoint_every_rows
            due = self.rows // every > (self.rows - n) // every
            shown = {}
            if (self.step - 1) % self.training.log_every == 0 or self.rows == self.training.n_rows:
                shown = self._log(outcomes, n)
            progress.advance(n, **shown)
            if due and self.rows < self.training.n_rows:
                self._save_checkpoint()

    def _train_batch(self, batch: Batch, n: int) -> list[Outcome]:
        """One step of every SAE. All losses are checked before any weight changes."""
        scaled = {site: self._scaled(batch, site, n) for site in self.stats}
        if self.rows == 0:
            for learner in self.learners:
                _initialise_b_dec(learner, scaled[str(learner.config.site)], self.training.b_dec_init)
        factor = self.training.lr_factor(self.rows, n)
        outcomes = []
        for learner, name in zip(self.learners, self.names, strict=True):
            outcome = learner.gradients(scaled[str(learner.config.site)])
            if not math.isfinite(outcome.loss):
                self._raise_non_finite(name, outcome, batch[str(learner.config.site)][:n])
            learner.apply(outcome, n, factor)
            outcomes.append(outcome)
        self.rows += n
        self.step += 1
        return outcomes

    def _scaled(self, batch: Batch, site: str, n: int) -> Tensor:
        acts_ND = batch[site]
        d_in = len(self.stats[site]["mean"])
        if acts_ND.ndim != 2 or acts_ND.shape[1] != d_in:
            raise SpecError(
                f"a batch of {site} has shape {acts_ND.shape}; the stream's statistics say d_in {d_in}. "
                "Open the stream of the dataset that the statistics describe."
            )
        if site not in self._buffers or len(self._buffers[site]) < n:
            self._buffers[site] = torch.empty(max(n, self.stream.batch_size), d_in)
        x_ND = self._buffers[site][:n]
        scale = np.float32(_input_scale(self.stats[site], self.training.input_scale))
        np.multiply(acts_ND[:n], scale, out=x_ND.numpy(), casting="same_kind")
        return x_ND

    def _raise_non_finite(self, name: str, outcome: Outcome, acts_ND: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(acts_ND).all(axis=1))
        if len(bad):
            cause = f"{len(bad)} of its {len(acts_ND)} rows hold inf or NaN, first row {bad[0]} of the batch"
            remedy = "Harvest again in a dtype with more range, or leave those rows out."
        else:
            cause = "its rows are finite, so training diverged"
            remedy = "Lower the learning rate or raise lr_warmup_rows, and train into a new directory."
        kept = ""
        if self.directory is not None and (self.directory / checkpoint.CHECKPOINT_FILE).exists():
            kept = f" The last checkpoint in {self.directory} is intact."
        raise NonFiniteLoss(
            f"the loss of {name} is {outcome.loss} at step {self.step + 1} (batch from row {self.rows:,}): "
            f"{cause}. {remedy}{kept}"
        )

    def _log(self, outcomes: list[Outcome], n: int) -> dict[str, str]:
        """Append a line for every SAE; returns what the progress bar shows. Losses are of this batch."""
        now = time.perf_counter()
        elapsed = max(now - self._log_time, 1e-9)
        speed = {
            "rows_per_s": round((self.rows - self._log_rows) / elapsed, 1),
            "stall_share": round(self._log_stall / elapsed, 4),
        }
        self._log_rows, self._log_time, self._log_stall = self.rows, now, 0.0
        lines = [
            self._metrics(learner, outcome, n) | speed
            for learner, outcome in zip(self.learners, outcomes, strict=True)
        ]
        if self.directory is not None:
            for name, line in zip(self.names, lines, strict=True):
                with open(self.directory / name / METRICS_FILE, "a") as file:
                    file.write(json.dumps(line) + "\n")
        return {
            "fvu": "/".join(f"{line['fvu']:.3f}" for line in lines),
            "l0": "/".join(f"{line['l0']:.1f}" for line in lines),
            "dead": "/".join(str(line["dead"]) for line in lines),
        }

    def _metrics(self, learner: Learner, outcome: Outcome, n: int) -> dict[str, Any]:
        variance = float(np.sum(self.stats[str(learner.config.site)]["variance"])) * learner.scale**2
        return {
            "step": self.step,
            "rows": self.rows,
            "loss": outcome.loss,
            "l0": outcome.n_active / n,
            "fvu": outcome.mse / variance if variance > 0 else 0.0,
            "dead": learner.n_dead,
            "lr": learner.rules.lr * self.training.lr_factor(self.rows - n, n),
        }

    def _learner(self, config: Config) -> Learner:
        stats = self.stats[str(config.site)]
        d_in = len(stats["mean"])
        scale = _input_scale(stats, self.training.input_scale)
        return Learner(config, d_in, scale, self.training.rules(config.d_sae), self.training.seed)

    def _save_checkpoint(self) -> None:
        if self.directory is None:
            return
        files = [self.directory / name / METRICS_FILE for name in self.names]
        for file in files:
            _sync(file)
        tensors = {
            f"{i}.{name}": tensor
            for i, learner in enumerate(self.learners)
            for name, tensor in learner.tensors().items()
        }
        state = {
            "rows": self.rows,
            "step": self.step,
            "stream": self.stream.state(),
            "saes": [learner.state() for learner in self.learners],
            "metrics_bytes": [file.stat().st_size for file in files],
        }
        checkpoint.save_checkpoint(self.directory, tensors, state)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        assert self.directory is not None
        for i, learner in enumerate(self.learners):
            prefix = f"{i}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            learner.restore(own, state["saes"][i])
        self.rows, self.step = state["rows"], state["step"]
        for name, size in zip(self.names, state["metrics_bytes"], strict=True):
            os.truncate(self.directory / name / METRICS_FILE, size)
        self.stream = _resumed(self.stream, state["stream"], self.rows)

    def _make_directories(self) -> None:
        assert self.directory is not None
        try:
            for name in self.names:
                (self.directory / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"{self.directory} can not be made: {error.strerror}. Choose a writable directory."
            ) from error

    def _write_run(self, finished: bool) -> None:
        assert self.directory is not None
        text = json.dumps({**self._description(), "finished": finished}, indent=2) + "\n"
        checkpoint.write_atomically(self.directory / RUN_FILE, text.encode())

    def _description(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "format": RUN_FORMAT,
            "training": asdict(self.training),
            "saes": {name: config_to_dict(c) for name, c in zip(self.names, self.configs, strict=True)},
            "data": {
                "dataset": _dataset(self.stream).get("id"),
                "n_rows": self.stream.n_rows,
                "batch_size": self.stream.batch_size,
                "order": {
                    # the position moves, and a manifest version that adds sites changes no row
                    name: value
                    for name, value in self.stream.state().items()
                    if name not in ("epoch", "row", "version")
                },
                "sites": {
                    site: {"d_in": len(stats["mean"]), "mean_norm": float(stats["mean_norm"])}
                    for site, stats in self.stats.items()
                },
            },
        }

    def _cfg(self, learner: Learner) -> dict[str, Any]:
        """`sae.json`: settings, then how it came about."""
        from importlib.metadata import version

        dataset = _dataset(self.stream)
        return {
            **config_to_dict(learner.config),
            "d_in": learner.d_in,
            "dtype": "float32",
            "model": dataset.pop("model", None),
            "context_size": dataset.pop("context_size", None),
            "prepend_bos": dataset.pop("prepend_bos", None),
            "dataset": dataset,
            "rows": self.rows,
            "steps": self.step,
            "batch_size": self.stream.batch_size,
            "lr": learner.rules.lr,
            "input_scale_folded": learner.scale,
            "training": json.loads(json.dumps(asdict(self.training))),
            "actcache_version": version("actcache"),
        }


def run_names(configs: Sequence[Config]) -> list[str]:
    """A directory for each SAE: `<architecture>-<d_sae>-<k>`, with the site where that is not enough.

    Raises:
        ValueError: two configs differ in nothing that names them.
    """
    names = [f"{c.architecture}-{c.d_sae}-{c.k}" for c in configs]
    count = Counter(names)
    names = [
        f"{name}-{str(c.site).replace('/', '_').replace(':', '_')}" if count[name] > 1 else name
        for name, c in zip(names, configs, strict=True)
    ]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"two SAEs would both be called {twice[0]}; train them into separate directories")
    return names


def _resolve_site(site: str | None, sites: Sequence[str]) -> str:
    if site is None and len(sites) == 1:
        return sites[0]
    if site is None:
        raise SpecError(
            f"the stream has {len(sites)} sites and the config names none; set site to one of {', '.join(sites)}"
        )
    if site not in sites:
        raise SpecError(
            f"site {site} is not in the stream, which has {', '.join(sites)}; open the stream with it"
        )
    return site


def _input_scale(stats: Mapping[str, Any], rule: str) -> float:
    if rule == "none":
        return 1.0
    mean_norm = float(stats["mean_norm"])
    if not 0 < mean_norm < math.inf:
        raise SpecError(
            f"the activations' mean norm is {mean_norm}, so they can not be scaled; check the dataset"
        )
    return math.sqrt(len(stats["mean"])) / mean_norm


def _initialise_b_dec(learner: Learner, x_ND: Tensor, rule: str) -> None:
    if rule == "geometric_median":
        learner.parameters.b_dec_D.copy_(geometric_median(x_ND))
    elif rule == "mean":
        learner.parameters.b_dec_D.copy_(x_ND.mean(0))


def _check_same_run(directory: Path, found: dict[str, Any], wanted: dict[str, Any], resume: bool) -> None:
    if not resume:
        raise Conflict(
            f"{directory} already holds a run and resume is off; choose another directory or remove it"
        )
    changes = checkpoint.differences(found, wanted)
    if changes:
        raise Conflict(
            f"{directory} holds a run of other settings ({'; '.join(changes)}). "
            "Choose another directory, or repeat the old settings to continue it."
        )


def _resumed(stream: Stream, state: dict[str, Any], rows: int) -> Stream:
    """The stream continued where `state` was taken."""
    restore = getattr(stream, "restore", None)
    if restore is not None:
        restore(state)
        return stream
    logger.warning("this stream can not restore a position; reading %s rows again to reach it", f"{rows:,}")
    return _Skipping(stream, rows)


class _Skipping:
    """A stream without its first rows."""

    def __init__(self, stream: Stream, rows: int) -> None:
        self._stream, self._rows = stream, rows
        self.sites, self.batch_size, self.n_rows = stream.sites, stream.batch_size, stream.n_rows

    def stats(self, site: str, /) -> Mapping[str, Any]:
        return self._stream.stats(site)

    def state(self) -> dict[str, Any]:
        return self._stream.state()

    def __iter__(self) -> Iterator[Batch]:
        skipped = 0
        for batch in self._stream:
            if skipped >= self._rows:
                yield batch
            skipped += len(batch)


def _dataset(stream: Stream) -> dict[str, Any]:
    """What the stream tells of its dataset, for provenance; empty for arrays."""
    dataset = getattr(stream, "dataset", None)
    spec = getattr(dataset, "spec", None)
    found = {
        "url": getattr(stream, "dataset_url", None),
        "id": getattr(dataset, "id", None) or getattr(stream, "dataset_id", None),
        "model": getattr(spec, "model", None),
        "context_size": getattr(spec, "context_size", None),
        "prepend_bos": getattr(spec, "prepend_bos", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _sync(file: Path) -> None:
    with open(file, "ab") as handle:
        os.fsync(handle.fileno())
