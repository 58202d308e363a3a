"""Schedules on a store in memory whose operations fail before or after they work; no retries, no network."""

import random
from collections import Counter

import pytest
from hooked_store import HookedStore
from schedules import Reference, Schedule

import actcache
from actcache.errors import StoreError
from actcache.store import open_store


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return Reference.make(tmp_path_factory.mktemp("reference"))


def test_schedules_in_memory_end_in_the_exact_rows_or_a_clear_error(reference):
    outcomes, faults = Counter(), Counter()
    for seed in range(40):
        schedule = Schedule(seed)
        url = f"memory://schedules/{seed}"
        failing = ("create", "swap", "read")[seed % 3]
        met = Counter()

        def hook(when, seed=seed, rate=schedule.rate, failing=failing, met=met):
            def fail(verb, key):
                met[when, verb, key] += 1  # chances hang on the operation, not on how threads take turns
                chance = random.Random(f"{seed}/{when}/{verb}/{key}/{met[when, verb, key]}").random()
                rarity = {"create": 10, "swap": 0.5, "read": 5}[verb] if verb == failing else 100
                if chance < rate / rarity:
                    faults[when, verb] += 1
                    raise StoreError(f"{key}: no reply")

            return fail

        outcomes[
            schedule.run(
                reference,
                faulty=lambda url=url, hook=hook: HookedStore(open_store(url), hook("before"), hook("after")),
                clean=open_store(url),
                read_from=lambda url=url: actcache.open(url),
                retried=False,
            )
        ] += 1
    assert set(outcomes) == {"survived", "raised", "died"}
    for when in ("before", "after"):
        for verb in ("create", "swap", "read"):
            assert faults[when, verb], (when, verb)
