"""The commit protocol as a state machine: writers that die, come back, extend and race, against a dict.

The model is `{version: {split: {site: rows}}}` and the rows of every split, made without the store. Writers
are real: Harvesters with recorded forward passes, and drivers' states that may be versions behind.
"""

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from replayed import Recorded
from tiny_harvest import SITES
from watched import DictStore, Died, DiesAt

from actcache.codec import Precision, decode, encode
from actcache.committed import Committed
from actcache.corpus import kept_tokens
from actcache.driver import _claim, blocks_wanted
from actcache.layout import read_calibration
from actcache.manifest import BlockRecord, latest_version, read_manifest, record_key
from actcache.metadata import write_metadata
from actcache.opened import Opened
from actcache.order import permutation
from actcache.reader import Dataset
from actcache.segments import RecordRows

ROWS = 1024
EXTENTS = st.fixed_dictionaries(
    {
        "n_tokens": st.sampled_from([1, 1024, 2000, 5000]),
        "sites": st.sampled_from([SITES, SITES[:1], SITES[1:]]),
        "validation_blocks": st.sampled_from([0, 1]),
        "test_blocks": st.just(0),
    }
)
DEATHS = st.one_of(st.none(), st.tuples(st.integers(0, 60), st.booleans()))


def reference(recorded):
    """Every row of every split and what it decodes to, from tokens, activations and calibrations alone."""
    store, tokens = DictStore(), recorded.tokens
    recorded.harvester_on(store, recorded.resolved).calibrate()
    calibrations = {site: read_calibration(store, site) for site in SITES}
    identity, out = recorded.resolved.identity, {}
    precision = Precision.parse(identity["precision"])
    for split in ("train", "validation"):
        n = tokens.n_sequences(split)
        input_ids_ST, length_S = tokens.sequences(split, 0, n)
        kept_ST = kept_tokens(input_ids_ST, length_S, tokens.identity["special_token_ids"])
        sequence_N, position_N = np.nonzero(kept_ST)
        order_N = np.concatenate(
            [
                first
                + permutation(
                    min(ROWS, len(sequence_N) - first), "rows", identity["seed"], split, first // ROWS
                )
                for first in range(0, len(sequence_N), ROWS)
            ]
        )
        out[split] = {"sequence": sequence_N[order_N], "position": position_N[order_N]}
        for site in SITES:
            acts_STD = np.stack([recorded.acts[row.tobytes()][site] for row in input_ids_ST])
            acts_ND = acts_STD[out[split]["sequence"], out[split]["position"]]
            codes_ND, scale_N = encode(acts_ND, calibrations[site], precision)
            out[split][site] = decode(codes_ND, scale_N, calibrations[site], precision)
    return out


class Protocol(RuleBasedStateMachine):
    """One dataset; its writers live in this process and die by an exception that nothing catches."""

    recorded: Recorded
    whole: dict

    def __init__(self):
        super().__init__()
        self.store = DictStore()
        self.versions = {}
        self.rows_seen = 0
        self.stale = []

    @initialize()
    def claim(self):
        _claim(self.store, self.recorded.resolved)

    def dying(self, death):
        return self.store if death is None else DiesAt(self.store, death[0], after=death[1])

    @rule(extent=EXTENTS, death=DEATHS)
    def harvest(self, extent, death):
        """A whole run; if nothing kills it, all that it asked for is there and covered."""
        resolved = self.recorded.asking(**extent)
        try:
            self.recorded.harvest(self.dying(death), resolved, threads=False)
        except Died:
            return
        wanted = blocks_wanted(resolved, self.recorded.tokens)
        manifest = read_manifest(self.store)
        for site in resolved.sites:
            for split, n in wanted.items():
                assert manifest.sites[site].n_blocks[split] >= n
            assert "ce_change" in manifest.fidelity[site]

    @rule(
        split=st.sampled_from(["train", "validation"]),
        block=st.integers(0, 3),
        sites=st.sampled_from([SITES, SITES[:1]]),
        death=DEATHS,
    )
    def write_block(self, split, block, sites, death):
        """A Harvester alone, without a driver: what it commits is loose until a driver comes."""
        block = min(block, -(-self.recorded.tokens.n_rows(split) // ROWS) - 1)
        harvester = self.recorded.harvester_on(self.dying(death), self.recorded.asking(sites=sites))
        try:
            harvester.calibrate()
            record = harvester.run_block(split, block, sites)
        except Died:
            return
        data = self.store.objects[record.key]
        assert BlockRecord.from_json(data, record_key(split, block, sites)).to_json() == record.to_json()

    @rule(extent=EXTENTS)
    def second_driver(self, extent):
        """Opens now and commits later, when it may be versions behind."""
        resolved = self.recorded.asking(**extent)
        self.recorded.harvester_on(self.store, resolved).calibrate()
        wanted = blocks_wanted(resolved, self.recorded.tokens)
        self.stale.append(Committed(self.store, resolved.identity, "s", resolved.widths, wanted))

    @precondition(lambda self: self.stale)
    @rule(blocks=st.integers(0, 2), death=DEATHS, data=st.data())
    def second_driver_goes_on(self, blocks, death, data):
        """It does some of the blocks that it believes missing, then commits."""
        at = data.draw(st.integers(0, len(self.stale) - 1))
        state = self.stale[at]
        state.store = store = self.dying(death)
        try:
            for split, block, sites in state.missing()[:blocks]:
                harvester = self.recorded.harvester_on(store, self.recorded.asking(sites=sites))
                state.add(RecordRows.of(harvester.run_block(split, block, sites)))
            state.commit({}, {})
            write_metadata(store, set())
        except Died:
            self.stale.pop(at)
        else:
            state.store = self.store

    @rule(data=st.data())
    def damage_a_loose_record(self, data):
        """As a bad disk would, where no version has taken the record in."""
        version = latest_version(self.store)
        known = Committed(
            self.store,
            self.recorded.resolved.identity,
            "s",
            {},
            dict.fromkeys(("train", "validation", "test"), 0),
        )
        loose = {record.key for record in known.loose} if version else set()
        for state in self.stale:  # a driver that read it whole may commit it
            loose -= {record.key for record in state.loose}
        if loose:
            key = data.draw(st.sampled_from(sorted(loose)))
            self.store.objects[key] = self.store.objects[key][:-7]

    # the lead adds the rule `gc` here: after it, every invariant below must hold as before

    @invariant()
    def versions_follow_each_other_and_never_change(self):
        newest = latest_version(self.store)
        assert sorted(self.versions) == list(range(1, len(self.versions) + 1))
        assert newest >= len(self.versions)
        for version, manifest in self.versions.items():
            assert read_manifest(self.store, version) == manifest
        for version in range(len(self.versions) + 1, newest + 1):
            manifest = read_manifest(self.store, version)
            before = self.versions.get(version - 1)
            if before:
                for split, size in before.splits.items():
                    assert manifest.splits[split]["n_rows"] >= size["n_rows"]
                for site, extent in before.sites.items():
                    for split, n in extent.n_blocks.items():
                        assert manifest.sites[site].n_blocks[split] >= n
                        assert manifest.wanted.get(site, {}).get(split, 0) >= before.wanted.get(site, {}).get(
                            split, 0
                        )
            lacking = [
                site
                for site, blocks in manifest.wanted.items()
                if "ce_change" not in manifest.fidelity.get(site, {})
                or any(manifest.sites[site].n_blocks[split] < n for split, n in blocks.items())
            ]
            assert manifest.complete == (not lacking)
            self.check_rows(manifest)
            self.versions[version] = copy.deepcopy(manifest)

    @rule(data=st.data())
    def read_a_pinned_version(self, data):
        if self.versions:
            self.check_rows(self.versions[data.draw(st.sampled_from(sorted(self.versions)))])

    @invariant()
    def the_newest_version_reads_exactly_its_rows(self):
        if self.versions:
            self.check_rows(self.versions[len(self.versions)])

    @invariant()
    def zarr_metadata_shows_no_row_that_is_not_committed(self):
        for key in [k for k in self.store.objects if k.endswith("zarr.json") and k != "zarr.json"]:
            metadata = json.loads(self.store.objects[key])
            if metadata["node_type"] != "array":
                continue
            split, *array, _ = key.split("/")
            size, sites = (
                self.versions[len(self.versions)].splits[split],
                self.versions[len(self.versions)].sites,
            )
            limit = {
                "input_ids": size["n_sequences"],
                "length": size["n_sequences"],
                "offset": 32,
                "channel": 32,
            }.get(array[-1], size["n_rows"])
            if len(array) == 2 and array[1] not in ("offset", "channel"):
                limit = min(limit, ROWS * sites[array[0]].n_blocks[split])
            assert metadata["shape"][0] <= limit

    def check_rows(self, manifest):
        """Each row once, in its place, with its values; what the manifest says of it is right."""
        for split, whole in self.whole.items():
            dataset = Dataset(Opened(self.store, manifest), split)
            assert dataset.size_bytes() == manifest.splits[split]["size_bytes"]
            if not dataset.n_rows:
                continue
            rows = dataset.rows(slice(None))
            assert np.array_equal(rows.sequence, whole["sequence"][: dataset.n_rows])
            assert np.array_equal(rows.position, whole["position"][: dataset.n_rows])
            for site, extent in manifest.sites.items():
                n = min(ROWS * extent.n_blocks[split], dataset.n_rows)
                if n:
                    assert np.array_equal(dataset.read(site, slice(None)), whole[site][:n])
                    assert dataset.stats(site)["n_rows"] == n
                    if split == "train":
                        assert manifest.fidelity[site]["n_rows"] == n


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_no_schedule_of_writers_loses_doubles_or_changes_a_committed_row(recorded, examples):
    machine = type("Machine", (Protocol,), {"recorded": recorded, "whole": reference(recorded)})
    machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()
