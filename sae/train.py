"""The training loop: one stream of batches, any number of SAEs, a directory that survives a kill.

Settings are sae/training.py's, files sae/rundir.py's, a step sae/learner.py's. Rows come scaled from
sae/inputs.py; what SAEs say of themselves is sae/provenance.py's; where batches come from is the stream's
(`actcache` datasets, or `sae.ArrayStream`). Every rank of a distributed run runs this loop (sae/spread.py
says who trains what, sae/keeper.py what they decide together); sae/distributed.py starts the ranks.

Shapes: N rows, D = d_in.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actcache.errors import ActcacheError, SpecError
from actcache.progress import Progress

from .architectures import Architecture
from .checkpoint import StoredCheckpoint
from .core import SAE
from .curves import bar_figures, metrics_line, numbers
from .divergence import NonFiniteLoss, non_finite
from .evals.during import EvalDuring
from .evals.monitor import BackgroundProcess, EvalBy, Monitor, monitor_of
from .group import Share
from .inputs import Inputs, centre, checked_device, resolve_site
from .keeper import Keeper, Stop
from .learner import Learner
from .learners import Learners
from .naming import check_distinct, run_names
from .pace import Pace
from .provenance import run_description, sae_settings
from .rundir import METRICS_FILE, RunDirectory
from .rungs import Rungs
from .spread import Layout
from .step import Outcome
from .streams import Batch, Stream, resumed
from .trackers import make_trackers
from .training import CheckpointSchedule, Training, total_variance

logger = logging.getLogger(__name__)

__all__ = ["METRICS_FILE", "NonFiniteLoss", "Trainer", "Training", "run_names", "train"]


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
    eval_every: EvalDuring | int | None = None,
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
        eval_every: rows between evaluations of the SAEs on held-out rows and in the LM while they are trained,
            or `sae.EvalDuring(every_rows=..., ...)` with more settings. The figures are in each SAE's evals.jsonl.

    Raises:
        SpecError: a site that the stream has not, a stream that ends too soon, a `start` of
            another shape, or an evaluation that cannot be done.
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
            eval_every=eval_every,
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
        evals=EvalDuring.of(eval_every),
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
        evals: EvalDuring | None = None,
        eval_by: EvalBy = BackgroundProcess,
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
        self.rules = [training.rules(c) for c in self.configs]
        check_distinct(self.names, self.configs, self.rules, start)
        self.rungs = Rungs(training.rungs, training.rung_keep, self.configs, self.rules)
        self.learners = Learners(self.configs, self.rules, start, self.inputs, self.layout, self.device)
        self.learners.deal(self.rungs.running)
        self._stopped: dict[int, SAE] = {}
        """SAEs that stopped at a rung, where there is no directory."""
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
        self._evals, self._eval_by = evals, eval_by
        self.monitor: Monitor | None = None
        schedule = CheckpointSchedule(
            training.checkpoint_every_rows,
            training.checkpoint_every_s,
            None if evals is None else evals.every_rows,
        )
        self.keeper = Keeper(
            self.layout.group,
            self.directory,
            schedule,
            self.learners.pieces,
            self._state,
            asked or (lambda: self._stop.asked is not None),
            training.log_every,
            lambda rows, step: self.monitor.completed(rows, step) if self.monitor else None,
        )
        self._pace = Pace()

    def open(self, resume: bool) -> list[SAE] | None:
        """Take up what the directory holds: a finished run is returned (on rank 0), a checkpoint restored.

        Raises:
            Conflict: it holds a run of other settings, or any run and `resume` is False.
            SpecError: the run asks for evaluations that cannot be done.
        """
        if self.directory is None:
            monitor_of(self._evals, self._eval_by, self.stream, None, ())
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
                self.monitor = monitor_of(self._evals, self._eval_by, self.stream, directory, self.trackers)
                found = directory.open(resume, load=self._returned)
            except ActcacheError as refused:
                error = self.keeper.failure = refused
        if group.numbers(error is not None).any():
            self.keeper.raise_failure()
        return found if group.rank == 0 else directory.open(resume, writer=False, load=False)

    def run(self) -> list[SAE]:
        """Train to the end, and save; the SAEs come back on rank 0."""
        with contextlib.ExitStack() as ends:
            if self.monitor is not None:
                ends.callback(self.monitor.close)
            if self.rows < self.training.n_rows:
                self._train(ends)
            return self._finish()

    def _train(self, ends: contextlib.ExitStack) -> None:
        """Train to the end; what must be closed after the last evaluation is left to `ends`."""
        label = f"training {len(self.names)} SAE{'s' if len(self.names) > 1 else ''}"
        self._pace.start(self.rows)
        self.keeper.start(self.rows)
        for tracker in self.trackers:
            tracker.start(self.description, self.step)
            ends.callback(tracker.close)
        if self.monitor is not None:
            running = [self.names[i] for i in self.rungs.running]
            self.monitor.start(self.keeper.saved_rows, self.step, running)
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

    def _loop(self, batches: Iterator[Batch], progress: Progress) -> None:
        while self.rows < self.training.n_rows:
            waiting_since = time.perf_counter()
            batch = next(batches, None)
            self._pace.waited(time.perf_counter() - waiting_since)
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
            rung = None if last else self.rungs.reached(self.rows - share.n_rows, self.rows)
            figures = {}
            if (self.step - 1) % self.training.log_every == 0 or last or rung is not None:
                figures = self._log(outcomes)
            progress.advance(share.n_rows, **figures)
            if rung is not None and self._stop_worst(rung):
                continue  # the ranks have met, and saved
            if self.keeper.due(self.step) or last:
                self._meet()
        self.keeper.close()

    def _meet(self) -> None:
        stall = self._pace.meeting()
        if self.monitor is not None:
            self.monitor.look()
        if self.rows < self.training.n_rows:
            self.keeper.meet(self.rows, stall)
        elif self.layout.spread.dealt:
            self.keeper.meet_last()

    def _stop_worst(self, rung: int) -> bool:
        """The worst of each group of rivals stop, saved as they are; True if there are any. All ranks call this.

        The survivors of whole SAEs that are dealt to ranks are dealt anew, through the stored checkpoint.
        """
        self.keeper.meet_last()
        worst = self.layout.group.objects(self.rungs.worst())[0]
        self.rungs.stop(worst, rung)
        if not worst:
            return False
        saved = self.keeper.together(lambda: self._save(worst))
        self.learners.drop(worst)
        self.keeper.save(self.rows)
        if self.directory is None:
            self._stopped |= saved
        elif self.layout.spread.dealt:
            self.keeper.together(self._deal_anew)
        if self.layout.rank == 0:
            names = ", ".join(self.names[i] for i in worst)
            logger.info("rung of %s rows: %s stopped, %d go on", f"{rung:,}", names, len(self.rungs.running))
        return True

    def _deal_anew(self) -> None:
        """Deal the survivors evenly; what another rank had is read from the checkpoint of this moment."""
        assert self.directory is not None, "its caller has looked"
        new = self.learners.deal(self.rungs.running)
        if new:
            self.learners.restore(self.directory.checkpoint(self.rows), new)

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
        kept = ""
        if self.directory is not None and self.keeper.saved_rows is not None:
            kept = f" The last checkpoint in {self.directory.path} is intact."
        failure = non_finite(name, outcome.loss, acts, self.step, self.rows, kept)
        if not self.layout.spread.dealt:
            raise failure
        self.keeper.failure = failure

    def _log(self, outcomes: Mapping[int, Outcome]) -> dict[str, str]:
        """Append a line for every SAE; returns what the progress bar shows. Losses are of this batch."""
        rate, stall_share = self._pace.line(self.rows)
        speed: dict[str, Any] = {"rows_per_s": rate, "stall_share": stall_share}
        if self.layout.world > 1:
            stalls = [round(stall, 4) for stall in self.keeper.stalls]
            speed |= {"world_size": self.layout.world, "spread": str(self.layout.spread)}
            speed["stall_by_rank"] = stalls
            speed["stall_share"] = max(stalls, default=speed["stall_share"])
        own = {i: self._metrics(self.learners[i], outcome) | speed for i, outcome in outcomes.items()}
        by_number = self.learners.told(None if self.keeper.failure is not None else own)
        self.rungs.add(by_number)
        if self.layout.rank or not by_number:
            return {}
        lines = {self.names[i]: line for i, line in by_number.items()}
        if self.directory is not None:
            self.directory.append_metrics(lines)
        for tracker in self.trackers:
            tracker.log({name: numbers(line) for name, line in lines.items()}, self.step)
        figures = bar_figures(list(lines.values()), speed)
        if self.monitor is not None:
            figures |= self.monitor.shown
        if self._tell is not None:
            self._tell({"rows": self.rows, "shown": figures, **speed})
        return figures

    def _metrics(self, learner: Learner, outcome: Outcome) -> dict[str, Any]:
        variance = total_variance(self.inputs.stats[str(learner.config.site)])
        return metrics_line(learner, outcome, variance, self.rows, self.step, scored=bool(self.rungs))

    def _finish(self) -> list[SAE]:
        """Save what was trained; rank 0 marks the run as finished when all of it is there."""
        own = self.keeper.together(lambda: self._save(list(self.learners)))
        if self.directory is None:
            return [s for _, s in sorted((self._stopped | own).items())]
        if self.layout.rank == 0:
            self.directory.finish()
            if self.monitor is not None:
                self.monitor.finish(self.rows, self.step)
        if not self._returned:
            return []
        return [own[i] if i in own else self.directory.load(i) for i in range(len(self.names))]

    def _save(self, numbers: Sequence[int]) -> dict[int, SAE]:
        """Save those of these SAEs that this rank trains, as they are; returns the whole ones."""
        found = {i: self._finished(i) for i in numbers if i in self.learners}
        whole = {i: s for i, s in found.items() if s is not None}
        if self.directory is not None:
            for i, s in whole.items():
                self.directory.save(i, s)
        return whole

    def _finished(self, i: int) -> SAE | None:
        cfg = self._cfg(i)
        if i in self.rungs.stopped:
            cfg["stopped_at_rung"] = self.rungs.stopped[i]
        return self.learners.finished(i, cfg)

    def _cfg(self, i: int) -> dict[str, Any]:
        """Settings of the i-th SAE, and how it came about so far."""
        return sae_settings(self.learners[i], self.stream, self.inputs, self.training, self.rows, self.step)

    def _state(self) -> dict[str, Any]:
        states = {i: learner.state() | {"cfg": self._cfg(i)} for i, learner in self.learners.items()}
        saes = self.learners.told(states)
        saes |= {i: {"stopped_at_rung": rung} for i, rung in self.rungs.stopped.items()}
        return {
            "step": self.step,
            "stream": self.stream.state(),
            "saes": [saes[i] for i in range(len(self.names))],
            **self.rungs.state(),
        }

    def _restore(self, stored: StoredCheckpoint) -> None:
        rungs = [state.get("stopped_at_rung") for state in stored.state["saes"]]
        self.rungs.restore(stored.state, {i: rung for i, rung in enumerate(rungs) if rung is not None})
        self.learners.deal(self.rungs.running)
        self.learners.restore(stored, list(self.learners))
        self.rows, self.step = stored.rows, stored.state["step"]
        self.keeper.saved_rows = self.rows
        self.stream = resumed(self.stream, stored.state["stream"], self.rows)
