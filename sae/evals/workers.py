"""Who computes the parts of an evaluation: this process, or Ray actors; the figures are the same.

A call is a function of its arguments alone, and results are given in the order of the calls, so sums are
merged in one order however many workers there are. An actor that is lost is replaced and its calls are
made again. Only SAEs, settings and sums pass through Ray; every actor opens the dataset and loads the LM
itself, the LM when it is first needed.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from actcache.errors import ActcacheError, SpecError, WorkerLost
from sae.evals import geometry, logit_lens
from sae.evals import language_model as lm_pass
from sae.evals.row_pass import Reference, RowSums, device_of, measure_rows
from sae.evals.rows import RowParts
from sae.evals.sequences import token_batches

log = logging.getLogger(__name__)

Call = tuple[str, tuple[Any, ...]]
"""Name of a method of `EvalWorker` and its arguments."""

_IN_FLIGHT = 2
_THREADS = 4  # parts of rows in memory at a time
_LOSSES = 3  # of the worker of one call, before it is given up
_GONE = -1  # number of an actor that was replaced


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """What is evaluated on what; all that a worker is told."""

    saes: Sequence[Any]
    """In evaluation mode."""
    ds: Any
    split: str
    n_rows: int
    model: Any
    """A path or hub id, an `actcache.lm.LM`, or None."""
    compat: str | None = None
    join: int = 1
    """Sequences joined into one for the LM."""
    device: str | None = None
    """Where SAEs and LM compute; None: where the SAEs are."""
    tokenizer: Any = None
    """Of the LM, where token sets are asked for."""
    references: dict[str, Reference] = field(default_factory=dict)
    """Of each site of the SAEs."""


class EvalWorker:
    """Computes parts of a job."""

    def __init__(self, job: EvalJob) -> None:
        self._job = job
        self._view = job.ds.split(job.split)
        self._saes = [s if job.device is None else s.to(job.device) for s in job.saes]
        sites = {s.cfg["site"]: int(s.cfg["d_in"]) for s in job.saes}
        block_rows = int(job.ds.spec.get("block_rows", max(1, job.n_rows)))
        self._parts = RowParts(self._view, job.n_rows, block_rows, sum(sites.values()))

    @property
    def n_parts(self) -> int:
        return len(self._parts)

    @property
    def context_size(self) -> int:
        return int(self._job.ds.spec.context_size)

    def rows(self, number: int) -> RowSums:
        """Sums over one part of the rows."""
        return measure_rows(
            self._saes, self._view, self._parts, number, self._job.references, self.context_size
        )

    def losses(self, start: int, stop: int) -> dict[str, lm_pass.Losses]:
        """Losses over sequences [start, stop)."""
        tokens, most = self._job.ds.spec.get("tokens", {}), self.lm.max_context
        if self._job.join > 1 and most is not None and self.context_size * self._job.join > most:
            raise SpecError(
                f"{self._job.join} sequences of {self.context_size} tokens joined are longer than the {most} that "
                f"{self.lm.model_id} takes. Give --join {max(1, most // self.context_size)} at most."
            )
        batches = token_batches(
            self._view,
            start,
            stop,
            lm_pass.batch_size(self.lm, self.context_size * self._job.join),
            self._job.join,
            tokens.get("bos_token_id"),
        )
        return lm_pass.measure_losses(self.lm, batches, self._interventions, self._job.compat)

    def weights(self, i: int) -> dict[str, Any]:
        """Columns of `latents.parquet` that the weights of SAE `i`, and the LM's, give."""
        s = self._saes[i]
        found: dict[str, Any] = {}
        unit_FD = geometry.unit_decoder(s)
        if unit_FD is not None:
            found["nearest"], found["nearest_cosine"] = geometry.nearest(unit_FD)
        cosine_F = geometry.encoder_decoder_cosine(s)
        if cosine_F is not None:
            found["encoder_decoder_cosine"] = cosine_F
        if self._job.model is not None and logit_lens.reads_out(s, self.lm):
            found |= logit_lens.logit_moments(s, self.lm)
            if self._job.tokenizer is not None:
                found |= logit_lens.token_set_columns(s, self.lm, self._job.tokenizer)
        return found

    @cached_property
    def lm(self) -> Any:
        """The LM, in the dtype of the harvest; its weights must be those that the dataset came from."""
        from actcache.lm import check_harvested, load_harvested_lm

        model, harvested = self._job.model, self._job.ds.spec["model"]
        if isinstance(model, str):
            return load_harvested_lm(harvested, model, device=str(device_of(self._saes[0])))
        check_harvested(model, harvested)
        return model

    @cached_property
    def _interventions(self) -> dict[str, lm_pass.Intervention]:
        found: dict[str, lm_pass.Intervention] = {}
        for i, s in enumerate(self._saes):
            site = s.cfg["site"]
            mean_D = torch.as_tensor(self._job.references[site].mean_D, dtype=torch.float32)
            everywhere = self._job.compat == "saelens"
            found[f"zero:{site}"] = lm_pass.Intervention(site, lm_pass.zeros, everywhere)
            found[f"mean:{site}"] = lm_pass.Intervention(site, lm_pass.constant(mean_D))
            found[f"spliced:{i}"] = lm_pass.Intervention(site, lm_pass.reconstruction(s))
            found[f"random:{i}"] = lm_pass.Intervention(site, lm_pass.random_error(s))
        return found


class LocalPool:
    """Calls made in this process: parts of rows in threads, all else one after the other.

    Reading, sorting and counting keep to one core, and so would leave the others idle.
    """

    def __init__(self, job: EvalJob) -> None:
        self.worker = EvalWorker(job)

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results in the order of the calls."""
        if all(method == "rows" for method, _ in calls):
            yield from self._run_rows([number for _, (number,) in calls])
            return
        for method, arguments in calls:
            yield getattr(self.worker, method)(*arguments)

    def _run_rows(self, numbers: Sequence[int]) -> Iterator[RowSums]:
        """By at least two threads, so that one part is read while another is encoded; they share torch's."""
        torch_threads = torch.get_num_threads()
        threads = min(_THREADS, max(2, torch_threads))
        running: deque[Future[RowSums]] = deque()
        torch.set_num_threads(max(1, torch_threads // threads))  # new threads begin with this
        try:
            with ThreadPoolExecutor(threads, "eval-rows") as pool:
                try:
                    for number in numbers:
                        if len(running) > threads:
                            yield running.popleft().result()
                        running.append(pool.submit(self.worker.rows, number))
                    while running:
                        yield running.popleft().result()
                finally:
                    for future in running:
                        future.cancel()
        finally:
            torch.set_num_threads(torch_threads)


class RayPool:
    """Calls made by Ray actors, two in flight on each; results in the order of the calls."""

    def __init__(self, job: EvalJob, workers: int, gpus_per_worker: float = 0) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        self._start_losses = 0
        if self._started:
            from actcache.ray_engine import start_ray

            start_ray(workers)
        self._class = ray.remote(_Actor).options(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0)
        device = "cuda" if gpus_per_worker else "cpu"
        saes = [deepcopy(s).cpu() for s in job.saes]  # a worker may have no GPU to unpickle them on
        self._job = ray.put(replace(job, saes=saes, device=device))
        self._actors: list[Any] = [None] * workers
        self._starting: dict[Any, int] = {}  # reference -> actor; a call waits for none that is not placed
        for number in range(workers):
            self._start(number)

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results in the order of the calls; those of a lost worker are made again.

        Raises:
            WorkerLost: the worker of one call was lost three times.
        """
        waiting = list(range(len(calls)))[::-1]
        running: dict[Any, tuple[int, int]] = {}  # reference -> actor, call
        done: dict[int, Any] = {}
        losses = [0] * len(calls)
        ahead = 4 * len(self._actors)  # results that wait for an earlier one stay few
        for wanted in range(len(calls)):
            while wanted not in done:
                self._submit(calls, waiting, running, wanted + ahead)
                ready, _ = self._ray.wait([*running, *self._starting], num_returns=1)
                for reference in ready:
                    number, call = running.pop(reference, (self._starting.pop(reference, _GONE), None))
                    try:
                        value = self._ray.get(reference)
                    except self._ray.exceptions.RayActorError as err:
                        self._replace(number, running)
                        if call is None:
                            self._start_losses += 1
                        else:
                            losses[call] += 1
                            waiting.append(call)
                        if max(losses, default=0) >= _LOSSES or self._start_losses >= _LOSSES:
                            raise WorkerLost(
                                f"workers were lost {_LOSSES} times in a row of one call ({err}); "
                                "have they memory enough?"
                            ) from err
                    except self._ray.exceptions.RayTaskError as err:
                        raise (err.cause if isinstance(err.cause, ActcacheError) else err) from None
                    else:
                        if call is not None:
                            done[call] = value
            yield done.pop(wanted)

    def _start(self, number: int) -> None:
        self._actors[number] = self._class.remote(self._job)
        self._starting[self._actors[number].pid.remote()] = number

    def _submit(
        self, calls: Sequence[Call], waiting: list[int], running: dict[Any, tuple[int, int]], limit: int
    ) -> None:
        """Calls below `limit` go to the placed actors that have the least to do."""
        placed = [n for n in range(len(self._actors)) if n not in self._starting.values()]
        load = {number: sum(n == number for n, _ in running.values()) for number in placed}
        waiting.sort(reverse=True)
        while load and waiting and waiting[-1] < limit and min(load.values()) < _IN_FLIGHT:
            number = min(load, key=lambda n: load[n])
            call = waiting.pop()
            method, arguments = calls[call]
            running[getattr(self._actors[number], method).remote(*arguments)] = (number, call)
            load[number] += 1

    def _replace(self, number: int, running: dict[Any, tuple[int, int]]) -> None:
        """A fresh actor, once: the other calls of the lost one fail by themselves."""
        if number == _GONE:
            return
        log.warning("eval worker %d was lost; starting another", number)
        self._ray.kill(self._actors[number])
        for reference, (other, call) in list(running.items()):
            if other == number:
                running[reference] = (_GONE, call)
        self._start(number)


class _Actor:
    """An `EvalWorker` in a process of its own."""

    def __init__(self, job: EvalJob) -> None:
        self._worker = EvalWorker(job)

    def rows(self, number: int) -> RowSums:
        return self._worker.rows(number)

    def losses(self, start: int, stop: int) -> dict[str, lm_pass.Losses]:
        return self._worker.losses(start, stop)

    def weights(self, i: int) -> dict[str, Any]:
        return self._worker.weights(i)

    def pid(self) -> int:
        """Of its process; answered once it has started."""
        import os

        return os.getpid()


def open_pool(job: EvalJob, workers: int, gpus_per_worker: float) -> LocalPool | RayPool:
    """In this process for 0 workers, else Ray actors (one is an actor too)."""
    return RayPool(job, workers, gpus_per_worker) if workers else LocalPool(job)
