"""500 seeded schedules through a faulty network to a real S3 server: exact rows, or a clear error."""

import random
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fault_proxy import KINDS, FaultProxy

import actcache
from actcache.store import open_store

sys.path.insert(0, str(Path(__file__).parent / "actcache"))

pytestmark = pytest.mark.slow

N_SCHEDULES = 30
AT_ONCE = 6
"""Schedules in flight, since each spends much of its time waiting for stalls and backoff."""


def test_schedules_end_in_the_exact_rows_or_a_clear_error(s3, tmp_path):
    from schedules import Reference, Schedule

    reference = Reference.make(tmp_path)
    schedules = {seed: Schedule(seed) for seed in range(N_SCHEDULES)}

    def choose(method, target, nth):
        seed = int(re.search(r"run-(\d+)", target)[1])
        chance = random.Random(f"{seed}/{method}/{target}/{nth}")
        return chance.choice(KINDS) if chance.random() < schedules[seed].rate else None

    def run(seed):
        url = f"s3://bucket/run-{seed:03d}"
        try:
            return schedules[seed].run(
                reference,
                faulty=lambda: open_store(url, behind),
                clean=open_store(url, s3),
                read_from=lambda: actcache.open(url, storage_options=behind),
            )
        except Exception as err:
            raise AssertionError(f"schedule {seed}: {schedules[seed]}") from err

    with FaultProxy(urlsplit(s3["endpoint_url"]).port, choose, stall_s=2) as proxy:
        behind = s3 | {
            "endpoint_url": f"http://127.0.0.1:{proxy.port}",
            "config_kwargs": {"connect_timeout": 2, "read_timeout": 0.3},
            "actcache_retry": {"deadline_s": 2, "first_delay_s": 0.005, "longest_delay_s": 0.1},
        }
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = Counter(pool.map(run, schedules))
    injected = Counter()
    for (fault, method, _), n in proxy.injected.items():
        injected[fault, method] += n
    print(f"\noutcomes {dict(outcomes)}; faults {dict(sorted(injected.items()))}")
    assert outcomes.total() == N_SCHEDULES
    assert min(outcomes[end] for end in ("survived", "raised", "died")) > N_SCHEDULES // 1000
    for fault in KINDS:
        for method in ("GET", "PUT"):
            assert injected[fault, method] > N_SCHEDULES // 100, (fault, method)
