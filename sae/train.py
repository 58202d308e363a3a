"""The training loop: one stream of batches, any number of SAEs, a directory that survives a kill.

Settings are sae/training.py's, files sae/rundir.py's, a step sae/learner.py's. Rows come scaled from
sae/inputs.py; what SAEs say of themselves is sae/provenance.py's; where batches come from is the stream's
(`actcache` datasets, or `sae.ArrayStream`). Every rank of a distributed run runs this loop (sae/spread.py
says who trains what, sae/keeper.py what they decide together); sae/distributed.py starts the ranks.

Shapes: N rows, D = d_in.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.errors import ActcacheError, SpecError
from actcache.progress import Progress

from .architectures import Architecture
from .checkpoint import StoredCheckpoint
from .checkpoint_writer import Piece
from .core import SAE
from .group import Share
from .inputs import Inputs, centre, checked_device, resolve_site
from .keeper import Keeper, Stop
from .learner import Learner
from .provenance import run_description, sae_settings
from .rotation import turned
from .rundir import METRICS_FILE, RunDirectory, run_names
from .spread import Layout
from .step import Outcome
from .streams import Batch, Stream, resumed
from .trackers import make_trackers
from .training import CheckpointSchedule, Training, total_variance

logger = logging.getLogger(__name__)

__all__ = ["METRICS_FILE", "NonFiniteLoss", "Trainer", "Training", "run_names", "train"]


class NonFiniteLoss(ActcacheError, ArithmeticError):
    """A loss became inf or NaN; the message names the SAE, the step and any bad rows."""


def train(
    stream: Stream,
    configs: Sequence[Architecture] | Architecture,
    training: Training,
    *,
    start: Sequence[SAE | None] | SAE | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    log: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    workers: int | tuple[int, int] | str | None = None,
    spread: str | None = None,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 1,
) -> list[SAE]:
    """Trained SAEs, in the order of `configs`; the data are read once for all of them.

    With `out`, everything is kept there: an interrupted run continues where its last checkpoint
    was, to the same bits on the same machine, and a finished one is returned at once.

    Several processes train together, to the same result but for rounding, with `workers`, on a Ray cluster,
    or where torchrun started this one; then the SAEs come back on rank 0, and the others get an empty list.

    Args:
        stream: batches, from `ds.stream(...)` or `sae.ArrayStream`. Of rows in rotated coordinates
            (`ds.stream(..., rotated=True)`) the SAEs are turned back at the end: sae/rotation.py.
        configs: `sae.TopK(...)`, `sae.JumpReLU(...)`, ...; several are trained side by side.
        training: rows, learning rate, seed.
        start: finished SAEs (`sae.load(...)`) to take the first weights from, one for each config
            or None; fine-tuning is this with a small learning rate. Adam starts afresh.
        out: the run directory, local or at an fsspec URL; None keeps nothing.
        resume: False refuses a directory that already holds a run.
        log: beside metrics.jsonl: "tensorboard", "wandb" (sae/trackers.py); changes no number.
        storage_options: what fsspec needs for `out`; never stored.
        device: where to train, e.g. "cuda"; SAEs come back on the CPU. A run may go on elsewhere, then
            equal but for rounding.
        workers: processes on the Ray cluster that is connected or named by RAY_ADDRESS, else on this machine:
            4, or at least 2 and at most 8 as (2, 8) or "2..8". None trains in this process, without Ray.
        spread: what the processes divide: "latents", "rows", whole "saes", or "rows=2,latents=4". None: whole
            SAEs where there are as many as processes, else latents.
        gpus_per_worker: 1 trains each worker on a GPU, 0 on the CPU.
        cpus_per_worker: CPUs that each worker reserves, and its threads.

    Raises:
        SpecError: a site that the stream has not, a stream that ends too soon, or a `start` of
            another shape.
        Conflict: `out` holds a run of other settings; the message names the difference.
        NonFiniteLoss: training diverged, or the data hold inf or NaN. The last checkpoint is intact.
        StoreError: the disk refused. The last checkpoint is intact.
        Drained: SIGTERM or Ctrl-C; the run is saved.
        WorkerLost: workers crashed three times at one row. The last checkpoint is intact.
    """
    from .distributed import started_by_torchrun, train_by_ranks

    listed = [configs] if isinstance(configs, Architecture) else list(configs)
    starts = list(start) if isinstance(start, Sequence) else [start] * len(listed)
    of_ranks = workers is not None or spread is not None or bool(gpus_per_worker) or cpus_per_worker != 1
    if of_ranks or started_by_torchrun():
        return train_by_ranks(
            stream,
            listed,
            training,
            start=starts,
            out=out,
            resume=resume,
            log=log,
            storage_options=storage_options,
            device=device,
            workers=workers,
            spread=spread,
            gpus_per_worker=gpus_per_worker,
            cpus_per_worker=cpus_per_worker,
        )
    trainer = Trainer(
        stream,
        listed,
        training,
        start=starts,
        out=out,
        log=log,
        storage_options=storage_options,
        device=device,
    )
    done = trainer.open(resume)
    if done is not None:
        return done
    with torch.enable_grad():
        return trainer.run()


Told = Callable[[dict[str, Any]], None]
"""Called on rank 0 with the figures of each logged step, for whoever shows them."""


class Trainer:
    """A run, or a rank's part of it: learners, their stream and their directory. `train` is the usual way in."""

    def __init__(
        self,
        stream: Stream,
        configs: Sequence[Architecture],
        training: Training,
        *,
        start: Sequence[SAE | None],
        out: str | os.PathLike[str] | None = None,
        log: Sequence[str] = (),
        storage_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
        tell: Told | None = None,
        asked: Callable[[], bool] | None = None,
        returned: bool = True,
    ) -> None:
        """`asked`: True once somebody asked this rank to stop; `tell` replaces the progress bar.

        `returned`: False leaves the SAEs in `out`; `open` and `run` then give empty lists.
        """
        self.device, self.layout = checked_device(device), layout or Layout()
        self._returned = returned and self.layout.rank == 0
        if not configs:
            raise ValueError(
                "there is no SAE to train; give at least one config, e.g. sae.TopK(d_sae=1536, k=32)"
            )
        if len(start) != len(configs):
            raise ValueError(f"{len(start)} SAEs to start from for {len(configs)} configs; give one for each")
        served = getattr(stream, "epochs", None)
        if served is not None and served * stream.n_rows < training.n_rows:
            raise SpecError(
                f"n_rows is {training.n_rows:,}, but the stream serves {served} x {stream.n_rows:,} rows. "
                f"Open it with epochs={math.ceil(training.n_rows / stream.n_rows)}, or ask for fewer rows."
            )
        self.stream, self.training, self.start = self.layout.stream(stream), training, list(start)
        self.configs = [replace(c, site=resolve_site(c.site, stream.sites)) for c in configs]
        self.rows = self.step = 0
        self.inputs = Inputs(stream, [str(c.site) for c in self.configs], training.input_scale, self.device)
        self.names = run_names(self.configs)
        self.learners = {
            i: self._learner(*both)
            for i, both in enumerate(zip(self.configs, start, strict=True))
            if self.layout.trains(i)
        }
        """By the number of their config: those that this rank trains, or a part of."""
        started = {name: s.digest() for name, s in zip(self.names, start, strict=True) if s is not None}
        saes = dict(zip(self.names, self.configs, strict=True))
        self.description = run_description(saes, started, self.stream, self.inputs, training)
        """What makes two runs the same run."""
        self.directory = (
            None if out is None else RunDirectory(out, self.names, self.description, storage_options)
        )
        first = self.layout.rank == 0
        self.trackers = make_trackers(log, out) if first else []
        self._stop = Stop()
        self._tell = tell
        schedule = CheckpointSchedule(training.checkpoint_every_rows, training.checkpoint_every_s)
        self.keeper = Keeper(
            self.layout.group,
            self.directory,
            schedule,
            self._pieces,
            self._state,
            asked or (lambda: self._stop.asked is not None),
            training.log_every,
        )
        self._log_rows, self._log_time, self._log_stall = 0, time.perf_counter(), 0.0
        self._met_time, self._met_stall = time.perf_counter(), 0.0

    def open(self, resume: bool) -> list[SAE] | None:
        """Take up what the directory holds: a finished run is returned (on rank 0), a checkpoint restored.

        Raises:
            Conflict: it holds a run of other settings, or any run and `resume` is False.
        """
        if self.directory is None:
            return None
        found = self._opened(self.directory, resume)
        if isinstance(found, list):
            logger.info("%s already holds this finished run; nothing to train", self.directory.path)
            return found
        if found is not None:
            self._restore(found)
            logger.info("%s: continuing after %s rows", self.directory.path, f"{self.rows:,}")
        return None

    def _opened(self, directory: RunDirectory, resume: bool) -> StoredCheckpoint | list[SAE] | None:
        """Rank 0 makes the directory ready, then the others look at what is there."""
        group, found, error = self.layout.group, None, None
        if group.rank == 0:
            try:
                found = directory.open(resume, load=self._returned)
            except ActcacheError as refused:
                error = self.keeper.failure = refused
        if group.numbers(error is not None).any():
            self.keeper.raise_failure()
        return found if group.rank == 0 else directory.open(resume, writer=False, load=False)

    def run(self) -> list[SAE]:
        """Train to the end, and save; the SAEs come back on rank 0."""
        label = f"training {len(self.names)} SAE{'s' if len(self.names) > 1 else ''}"
        self._log_rows, self._log_time, self._log_stall = self.rows, time.perf_counter(), 0.0
        self._met_time, self._met_stall = time.perf_counter(), 0.0
        self.keeper.start(self.rows)
        if self.rows < self.training.n_rows:
            for tracker in self.trackers:
                tracker.start(self.description, self.step)
            batches = iter(self.stream)
            shown = self._tell is None and self.layout.rank == 0
            total = self.training.n_rows
            try:
                with (
                    self._stop,
                    Progress(label, total=total, unit="rows", done=self.rows, show=shown) as progress,
                ):
                    self._loop(batches, progress)
            except BaseException:
                self.keeper.keep()
                raise
            finally:
                close = getattr(batches, "close", None)  # ends the threads of a stream that reads ahead
                if close is not None:
                    close()
                for tracker in self.trackers:
                    tracker.close()
        return self._finish()

    def _loop(self, batches: Iterator[Batch], progress: Progress) -> None:
        while self.rows < self.training.n_rows:
            waiting_since = time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter() - waiting_since
            self._log_stall, self._met_stall = self._log_stall + waited, self._met_stall + waited
            if batch is None:
                self.keeper.save(self.rows)
                raise SpecError(
                    f"the stream ended after {self.rows:,} rows, but n_rows is {self.training.n_rows:,}. "
                    "Ask for more epochs of the stream, or for fewer rows."
                )
            share, n = self.layout.share(batch, self.training.n_rows - self.rows)
            if share.n_rows == 0:
                continue
            outcomes = self._train_batch(batch, share, n)
            last = self.rows == self.training.n_rows
            shown = {}
            if (self.step - 1) % self.training.log_every == 0 or last:
                shown = self._log(outcomes, share.n_rows)
            progress.advance(share.n_rows, **shown)
            if self.keeper.due(self.step) or last:
                self._meet()
        self.keeper.close()

    def _meet(self) -> None:
        now = time.perf_counter()
        stall = self._met_stall / max(now - self._met_time, 1e-9)
        self._met_time, self._met_stall = now, 0.0
        if self.rows < self.training.n_rows:
            self.keeper.meet(self.rows, stall)
        elif self.layout.spread.dealt:
            self.keeper.meet_last()

    def _train_batch(self, batch: Batch, share: Share, n: int) -> dict[int, Outcome]:
        """One step of every SAE of this rank; each loss is checked before it changes that SAE's weights."""
        scaled = self.inputs.scaled(batch, n)
        if self.rows == 0:
            self._set_b_dec(scaled, share)
        outcomes = {}
        for i, learner in self.learners.items():
            site = str(learner.config.site)
            outcome = learner.gradients(scaled[site], share)
            if math.isfinite(outcome.loss) and self.keeper.failure is None:
                learner.apply(outcome, scaled[site])
            elif self.keeper.failure is None:
                self._refuse_non_finite(self.names[i], outcome, batch[site][:n])
            outcomes[i] = outcome
        self.rows += share.n_rows
        self.step += 1
        return outcomes

    def _set_b_dec(self, scaled: Mapping[str, Tensor], share: Share) -> None:
        """First decoder biases, from the whole first batch."""
        centres: dict[str, Tensor] = {}
        for i, learner in self.learners.items():
            site = str(learner.config.site)
            if self.start[i] is None:
                if site not in centres:
                    centres[site] = centre(share.whole(scaled[site]), self.training.b_dec_init)
                learner.set_b_dec(centres[site])

    def _refuse_non_finite(self, name: str, outcome: Outcome, acts: Any) -> None:
        """Raise; where whole SAEs are dealt, other ranks do not know the loss, and are told when they meet."""
        acts_ND: np.ndarray = np.asarray(torch.as_tensor(acts).float().cpu())
        bad = np.flatnonzero(~np.isfinite(acts_ND).all(axis=1))
        if len(bad):
            cause = f"{len(bad)} of its {len(acts_ND)} rows hold inf or NaN, first row {bad[0]} of the batch"
            remedy = "Harvest again in a dtype with more range, or leave those rows out."
        else:
            cause = "its rows are finite, so training diverged"
            remedy = "Lower the learning rate or raise lr_warmup_rows, and train into a new directory."
        kept = ""
        if self.directory is not None and self.keeper.saved_rows is not None:
            kept = f" The last checkpoint in {self.directory.path} is intact."
        failure = NonFiniteLoss(
            f"the loss of {name} is {outcome.loss} at step {self.step + 1} (batch {self.step}, rows {self.rows:,} "
            f"to {self.rows + len(acts_ND):,}): {cause}. {remedy}{kept}"
        )
        if not self.layout.spread.dealt:
            raise failure
        self.keeper.failure = failure

    def _log(self, outcomes: Mapping[int, Outcome], n: int) -> dict[str, str]:
        """Append a line for every SAE; returns what the progress bar shows. Losses are of this batch."""
        now = time.perf_counter()
        elapsed = max(now - self._log_time, 1e-9)
        speed: dict[str, Any] = {
            "rows_per_s": round((self.rows - self._log_rows) / elapsed, 1),
            "stall_share": round(self._log_stall / elapsed, 4),
        }
        self._log_rows, self._log_time, self._log_stall = self.rows, now, 0.0
        if self.layout.world > 1:
            stalls = [round(stall, 4) for stall in self.keeper.stalls]
            speed |= {"world_size": self.layout.world, "spread": str(self.layout.spread)}
            speed["stall_by_rank"] = stalls
            speed["stall_share"] = max(stalls, default=speed["stall_share"])
        own = {i: self._metrics(self.learners[i], outcome, n) | speed for i, outcome in outcomes.items()}
        lines = self._all_lines(own)
        if self.layout.rank or not lines:
            return {}
        if self.directory is not None:
            self.directory.append_metrics(lines)
        for tracker in self.trackers:
            tracker.log(
                {name: _numbers(line) for name, line in zip(self.names, lines, strict=True)}, self.step
            )
        shown = self._shown(lines, speed)
        if self._tell is not None:
            self._tell({"rows": self.rows, "shown": shown, **speed})
        return shown

    def _all_lines(self, own: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """Metrics of every SAE, in order; whole SAEs are told by their ranks. None once one of them failed."""
        if not self.layout.spread.dealt:
            return list(own.values())
        failed = self.keeper.failure is not None
        told = self.layout.group.objects(None if failed else {str(i): line for i, line in own.items()})
        if None in told:
            return []
        joined = {int(i): line for part in told for i, line in part.items()}
        return [joined[i] for i in range(len(self.names))]

    def _shown(self, lines: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> dict[str, str]:
        """What the progress bar shows beside rows and rate."""
        return {
            "loss": "/".join(f"{line['loss']:.4g}" for line in lines),
            "fvu": "/".join(f"{line['fvu']:.3f}" for line in lines),
            "l0": "/".join(f"{line['l0']:.1f}" for line in lines),
            "dead": "/".join(str(line["dead"]) for line in lines),
            "stall": f"{speed['stall_share']:.1%}",
        }

    def _metrics(self, learner: Learner, outcome: Outcome, n: int) -> dict[str, Any]:
        variance = total_variance(self.inputs.stats[str(learner.config.site)]) * learner.scale**2
        return {
            "step": self.step,
            "rows": self.rows,
            "loss": outcome.loss,
            "l0": outcome.n_active / n,
            "fvu": outcome.mse / variance if variance > 0 else 0.0,
            "dead": learner.n_dead,
            "lr": learner.rules.lr * learner.rules.lr_factor(self.rows - n, n),
        }

    def _learner(self, config: Architecture, start: SAE | None) -> Learner:
        site = str(config.site)
        learner = Learner(
            config,
            self.inputs.d_in(site),
            self.inputs.factors[site],
            self.training.rules(config),
            self.training.seed,
            device=self.device,
            group=self.layout.learner_group,
        )
        if start is not None:
            rotation_DD = self.inputs.rotations[site]
            learner.start_from(start if rotation_DD is None else turned(start, rotation_DD.T))
        return learner

    def _finish(self) -> list[SAE]:
        """Save what was trained; rank 0 marks the run as finished when all of it is there."""
        saes = {i: self._finished(learner) for i, learner in self.learners.items()}
        own = {i: s for i, s in saes.items() if s is not None}
        group, directory = self.layout.group, self.directory
        if directory is None:
            return list(own.values())
        for i, s in own.items():
            directory.save(i, s)
        group.numbers(0)  # every rank has saved its own
        if group.rank == 0:
            directory.finish()
        if not self._returned:
            return []
        return [own[i] if i in own else directory.load(i) for i in range(len(self.names))]

    def _finished(self, learner: Learner) -> SAE | None:
        """The SAE for the model's activations; None on a rank that holds only a part of it."""
        cfg = sae_settings(learner, self.stream, self.inputs, self.training, self.rows, self.step)
        s, rotation_DD = learner.finished(cfg), self.inputs.rotations[str(learner.config.site)]
        return s if s is None or rotation_DD is None else turned(s, rotation_DD)

    def _pieces(self) -> dict[str, Piece]:
        return {
            f"{i}.{name}": piece
            for i, learner in self.learners.items()
            for name, piece in learner.pieces().items()
        }

    def _state(self) -> dict[str, Any]:
        own = {str(i): learner.state() for i, learner in self.learners.items()}
        if self.layout.spread.dealt:
            own = {i: state for part in self.layout.group.objects(own) for i, state in part.items()}
        return {
            "step": self.step,
            "stream": self.stream.state(),
            "saes": [own[str(i)] for i in range(len(self.names))],
        }

    def _restore(self, stored: StoredCheckpoint) -> None:
        for i, learner in self.learners.items():
            learner.restore(partial(_read, stored, f"{i}."), stored.state["saes"][i])
        self.rows, self.step = stored.rows, stored.state["step"]
        self.keeper.saved_rows = self.rows
        self.stream = resumed(self.stream, stored.state["stream"], self.rows)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What a curve can be drawn of."""
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def _read(
    stored: StoredCheckpoint, prefix: str, name: str, first: int = 0, stop: int | None = None
) -> Tensor:
    return stored.read(prefix + name, first, stop)
