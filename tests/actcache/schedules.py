"""Seeded schedules of writers, deaths, extensions and readers on a store with faults, each held to the rows.

A schedule ends in one of three ways, and in each what was committed is readable and exact:
"survived" (every driver got all it asked for), "raised" (a clear ActcacheError) or "died" (killed in a store
operation). Then a harvest without faults must converge to the dataset that an undisturbed one stores.
"""

import contextlib
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hooked_store import HookedStore
from replayed import Recorded
from tiny_harvest import SITES

import actcache
from actcache.errors import ActcacheError, NotADataset
from actcache.manifest import latest_version, read_manifest
from actcache.store import Store, open_store
from actcache.verify import verify

SMALL: dict[str, Any] = {"n_tokens": 1024, "sites": SITES[:1], "validation_blocks": 0}
MORE_TOKENS: dict[str, Any] = {"n_tokens": 2048, "sites": SITES[:1], "validation_blocks": 0}
MORE_SITES: dict[str, Any] = {"n_tokens": 2048, "sites": SITES, "validation_blocks": 1}


class Died(Exception):
    """The driver was killed in a store operation; all its later ones fail too."""


@dataclass
class Reference:
    """A recorded LM and what an undisturbed harvest stores of it."""

    recorded: Recorded
    dataset: Any

    @classmethod
    def make(cls, directory: Path) -> "Reference":
        recorded = Recorded(directory, chunk_rows=1024, test_blocks=0, **MORE_SITES)
        store = open_store(str(directory / "reference"))
        recorded.harvest(store)
        return cls(recorded, actcache.open(store.url))

    def check(self, dataset: Any) -> dict[str, int]:
        """All rows of `dataset` against the same rows here; returns the rows it has of each site."""
        rows = {}
        for split in dataset.splits:
            found, wanted = dataset.split(split), self.dataset.split(split)
            for site in found.sites:
                got = found.read(site, slice(0, found._site_rows(site)))
                assert np.array_equal(got, wanted.read(site, slice(0, len(got)))), (split, site)
                if split == "train":
                    rows[site] = len(got)
            n = found.n_rows
            got, want = found.rows(slice(0, n)), wanted.rows(slice(0, n))
            for name in ("token_id", "sequence", "position"):
                assert np.array_equal(getattr(got, name), getattr(want, name)), (split, name)
            n = found.n_sequences
            got, want = found.sequences(slice(0, n)), wanted.sequences(slice(0, n))
            assert np.array_equal(got.input_ids, want.input_ids), split
            assert np.array_equal(got.length, want.length), split
        return rows


@dataclass
class Schedule:
    """What one seed does."""

    seed: int
    drivers: list[list[dict[str, Any]]] = field(init=False)
    """For each driver, the extents that it harvests one after the other."""
    dies_at: int | None = field(init=False)
    """The store operation in which the first driver is killed."""
    reads: bool = field(init=False)
    """Whether a reader reads all the while."""
    rate: float = field(init=False)
    """Share of requests that meet a fault."""
    outage_at: int | None = field(init=False)
    """The request from which on the store answers nobody, until all drivers have ended."""

    def __post_init__(self) -> None:
        chance = random.Random(f"schedule {self.seed}")
        steps = [[SMALL], [SMALL, MORE_TOKENS], [SMALL, MORE_SITES], [MORE_TOKENS], [MORE_SITES]]
        weights = (5, 2, 1, 2, 1)
        self.drivers = chance.choices(steps, weights, k=chance.choice((1, 1, 1, 2)))
        self.dies_at = chance.randrange(100) if chance.random() < 0.3 else None
        self.outage_at = chance.randrange(200) if chance.random() < 0.2 else None
        self.reads = chance.random() < 0.2
        self.rate = chance.choice((0.01, 0.03, 0.1, 0.3))

    def run(
        self,
        reference: Reference,
        *,
        faulty: Callable[[], Store],
        clean: Store,
        read_from: Callable[[], Any],
        retried: bool,
    ) -> str:
        """Run it; returns the outcome.

        Args:
            faulty: a new store with the schedule's faults.
            clean: the same objects without faults.
            read_from: opens the dataset as a reader does that meets the same faults.
            retried: whether `faulty` answers faults by trying again.
        """
        over = threading.Event()
        with ThreadPoolExecutor(len(self.drivers) + 1) as pool:
            reader = pool.submit(self._read, reference, read_from, over) if self.reads else None
            dies = [self.dies_at] + [None] * len(self.drivers)
            running = [
                pool.submit(self._drive, reference, faulty(), steps, at)
                for steps, at in zip(self.drivers, dies, strict=False)
            ]
            wait(running)
            over.set()
            outcomes = [future.result() for future in running]
            if reader:
                reader.result()
        held = self._check_committed(reference, clean)
        for done, _ in outcomes:
            for step in done:
                for site in step["sites"]:
                    assert held.get(site, 0) >= step["n_tokens"], "a finished harvest is not all there"
        for steps in self.drivers:
            reference.recorded.harvest(clean, reference.recorded.asking(**steps[-1]))
        dataset = actcache.open(clean.url, storage_options=_options(clean))
        rows = reference.check(dataset)
        for steps in self.drivers:
            for site in steps[-1]["sites"]:
                assert rows[site] >= steps[-1]["n_tokens"]
        check_leftovers(clean, verify(dataset, progress=False)["unreferenced objects"])
        ends = {end for _, end in outcomes}
        if retried and self.dies_at is None and self.outage_at is None:
            assert ends == {"survived"}, "faults that end before the deadline must not fail a harvest"
        return next(end for end in ("raised without a word", "died", "raised", "survived") if end in ends)

    def _drive(
        self, reference: Reference, store: Store, steps: list[dict[str, Any]], dies_at: int | None
    ) -> tuple[list[dict[str, Any]], str]:
        """(extents that were harvested, how it ended)."""
        count = iter(range(10**9))

        def before(verb: str, key: str) -> None:
            if dies_at is not None and next(count) >= dies_at:
                raise Died

        done: list[dict[str, Any]] = []
        try:
            for step in steps:
                reference.recorded.harvest(HookedStore(store, before), reference.recorded.asking(**step))
                done.append(step)
        except Died:
            return done, "died"
        except ActcacheError as err:
            return done, "raised" if str(err).strip() else "raised without a word"
        return done, "survived"

    def _read(self, reference: Reference, read_from: Any, over: threading.Event) -> None:
        """Everything read is exact, or a clear error."""
        while not over.wait(0.2):
            with contextlib.suppress(ActcacheError):
                reference.check(read_from())

    def _check_committed(self, reference: Reference, clean: Store) -> dict[str, int]:
        """What is committed is readable and exact, and plain Zarr is shown no row more; rows of each site."""
        try:
            manifest = read_manifest(clean)
        except NotADataset:
            return {}
        rows = reference.check(actcache.open(clean.url, storage_options=_options(clean)))
        try:
            shown = json.loads(clean.read("zarr.json"))["consolidated_metadata"]["metadata"]
        except FileNotFoundError:
            return rows
        for site, extent in manifest.sites.items():
            codes = shown.get(f"train/{site}/codes")
            limit = min(extent.n_blocks["train"] * 1024, manifest.splits["train"]["n_rows"])
            assert codes is None or codes["shape"][0] <= limit, "zarr.json shows uncommitted rows"
        return rows


def check_leftovers(store: Store, unreferenced: int) -> None:
    """Whoever loses the race for a version leaves the segments that it wrote for it, and nothing else."""
    named = {
        key
        for version in range(1, latest_version(store) + 1)
        for s in read_manifest(store, version).segments
        for key in [file.key for file in s.files]
    }
    assert unreferenced == len({o.key for o in store.listing("_segments")} - named)


def _options(store: Store) -> dict[str, Any]:
    return getattr(store, "_options", {})
