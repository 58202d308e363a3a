"""Harvests that replay recorded forward passes: everything but the LM is real, in milliseconds.

`Recorded` runs the LM once over every sequence; its harvests plan, encode, store, commit and extend
through the driver and a Harvester whose `_forward` returns what was recorded.
"""

import copy
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny_harvest import tiny_spec

from actcache.corpus import open_tokens, tokenise
from actcache.driver import Resolved, _claim, harvest_missing, resolve
from actcache.engines import LocalEngine, Unit
from actcache.harvester import Harvester, Job
from actcache.store import Store, open_store


class Recorded:
    """A resolved tiny Spec with its token store and the LM's activations of all its sequences."""

    def __init__(self, directory: Path, **overrides: Any) -> None:
        self.spec = tiny_spec(directory, **overrides)
        self.resolved = resolve(self.spec)
        base = open_store(str(directory / "tokens-root"))
        self.tokens = tokenise(self.spec, self.resolved.corpus, self.resolved.tokenizer, base, progress=False)
        self.harvester = Harvester(self.job("memory://unused"))
        self.acts: dict[bytes, dict[str, np.ndarray]] = {}
        for split in ("train", "validation", "test"):
            input_ids_ST, length_S = self.tokens.sequences(split, 0, self.tokens.n_sequences(split))
            for start, acts in self.harvester._forward(input_ids_ST, self.resolved.sites, length_S):
                for i in range(len(next(iter(acts.values())))):
                    row = input_ids_ST[start + i].tobytes()
                    self.acts[row] = {site: acts[site][i] for site in acts}

    def __getstate__(self) -> dict[str, Any]:
        """What replays need, without the LM, its tokenizer and open files: for processes that import no torch."""
        kept = {"precision": self.harvester.precision, "d_in": self.harvester.d_in}
        resolved = replace(self.resolved, tokenizer=None)
        return {"spec": self.spec, "resolved": resolved, "acts": self.acts, "harvester": kept} | {
            "tokens": self.tokens.store.url
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        tokens = open_tokens(open_store(state["tokens"]))
        assert tokens is not None
        self.tokens = tokens
        self.harvester = object.__new__(Harvester)
        self.harvester.__dict__ |= state["harvester"] | {"tokens": tokens}

    def job(self, url: str) -> Job:
        return self.resolved.job(url, self.tokens.store.url, lm_batch=8, uploads=1)

    def with_acts(self, change: Callable[[str, np.ndarray], np.ndarray]) -> "Recorded":
        """The same with other activations: `change(site, acts [T, D])` of each sequence. Another kernel."""
        other = copy.copy(self)
        other.acts = {
            row: {site: change(site, acts_TD) for site, acts_TD in acts.items()}
            for row, acts in self.acts.items()
        }
        return other

    def asking(self, **extent: Any) -> Resolved:
        """The same identity with another extent: `n_tokens`, `sites`, `validation_blocks`, `test_blocks`."""
        spec = replace(self.spec, **extent)
        widths = {site: self.resolved.widths[site] for site in spec.sites}
        return replace(self.resolved, spec=spec, widths=widths)

    def harvester_on(self, store: Store, resolved: Resolved) -> Harvester:
        """A Harvester of `store` whose forward pass replays."""
        harvester = object.__new__(_Replaying)
        harvester.__dict__ |= self.harvester.__dict__ | {
            "recorded": self,
            "store": store,
            "job": replace(self.job(store.url), sites=resolved.sites),
        }
        harvester._start()
        return harvester

    def harvest(self, store: Store, resolved: Resolved | None = None, *, threads: bool = True) -> None:
        """What `actcache.harvest` does once the Spec is resolved and tokenised, into `store`.

        Without `threads` each block is done before the next begins: always the same operations in order.
        """
        resolved = resolved or self.resolved
        _claim(store, resolved)

        harvester = self.harvester_on(store, resolved)

        class Engine(LocalEngine):
            def submit(self, unit: Unit) -> None:
                super().submit(unit)
                if not threads:
                    wait(self._running)

            def prepare(self) -> str:
                self._harvester = harvester
                self._harvester.calibrate()
                return "replayed"

            def fidelity(self, sites: Any) -> dict[str, dict[str, float]]:
                numbers = {"ce_clean": 1.0, "ce_stored": 1.0, "ce_change": 0.0, "n_tokens": 1.0}
                return {site: dict(numbers) for site in sites}

        harvest_missing(
            store, resolved, self.tokens, harvester.job, Engine, start=time.monotonic(), progress=False
        )


class _Replaying(Harvester):
    recorded: Recorded

    def _forward(
        self, input_ids_ST: np.ndarray, sites: Any, length_S: np.ndarray, position_ids_ST: Any = None
    ) -> Any:
        for start in range(0, len(input_ids_ST), self.job.lm_batch):
            rows = [self.recorded.acts[r.tobytes()] for r in input_ids_ST[start : start + self.job.lm_batch]]
            yield start, {site: np.stack([row[site] for row in rows]) for site in sites}
