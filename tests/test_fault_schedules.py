"""500 seeded schedules through a faulty network to a real S3 server: exact rows, or a clear error."""

import itertools
import multiprocessing
import random
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fault_proxy import KINDS, FaultProxy

import actcache
from actcache.store import open_store

sys.path.insert(0, str(Path(__file__).parent / "actcache"))

pytestmark = pytest.mark.slow

N_SCHEDULES = 500
PROCESSES = 2
AT_ONCE = 4
"""Schedules in flight in a process: each spends much of its time waiting for stalls and backoff."""


def run_schedules(seeds, s3, directory):
    """Run schedules behind one proxy; returns how often each outcome and each (fault, method) was seen."""
    from schedules import Reference, Schedule

    reference = Reference.make(directory)
    schedules = {seed: Schedule(seed) for seed in seeds}
    requests = {seed: itertools.count() for seed in seeds}

    def choose(method, target, nth):
        seed = int(re.search(r"run-(\d+)", target)[1])
        schedule = schedules[seed]
        if schedule.outage_at is not None and next(requests[seed]) >= schedule.outage_at:
            return "unavailable"
        chance = random.Random(f"{seed}/{method}/{target}/{nth}")
        return chance.choice(KINDS) if chance.random() < schedule.rate else None

    def run(seed):
        url = f"s3://bucket/run-{seed:03d}"
        # only an outage outlasts the deadline, on a busy machine too
        deadline_s = 60 if schedules[seed].outage_at is None else 0.2
        retry = {"deadline_s": deadline_s, "first_delay_s": 0.005, "longest_delay_s": 0.1}
        options = behind | {"actcache_retry": retry}
        try:
            return schedules[seed].run(
                reference,
                faulty=lambda: open_store(url, options),
                clean=open_store(url, s3),
                read_from=lambda: actcache.open(url, storage_options=options),
                retried=True,
            )
        except Exception as err:
            raise AssertionError(f"{schedules[seed]}: {err!r}") from err

    with FaultProxy(urlsplit(s3["endpoint_url"]).port, choose, stall_s=2) as proxy:
        behind = s3 | {
            "endpoint_url": f"http://127.0.0.1:{proxy.port}",
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 0.5},
        }
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = Counter(pool.map(run, seeds))
    injected = Counter()
    for (fault, method, _), n in proxy.injected.items():
        injected[fault, method] += n
    return outcomes, injected


def test_schedules_end_in_the_exact_rows_or_a_clear_error(s3, tmp_path):
    outcomes, injected = Counter(), Counter()
    shares = [range(i, N_SCHEDULES, PROCESSES) for i in range(PROCESSES)]
    directories = [tmp_path / str(i) for i in range(PROCESSES)]
    for directory in directories:
        directory.mkdir()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        for ends, faults in pool.map(run_schedules, shares, [s3] * PROCESSES, directories):
            outcomes += ends
            injected += faults
    print(f"\noutcomes {dict(outcomes)}; faults {dict(sorted(injected.items()))}")
    assert outcomes.total() == N_SCHEDULES
    assert set(outcomes) == {"survived", "raised", "died"}
    assert outcomes["survived"] > N_SCHEDULES // 4
    for fault in KINDS:
        for method in ("GET", "PUT"):
            assert injected[fault, method] > N_SCHEDULES // 4, (fault, method)
