"""How far a harvest is, from the store alone: before, in the middle, with blocks set aside, and at its end."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import actcache_here, harvest_arguments
from hooked_store import HookedStore
from tiny_harvest import SITES, tiny_spec

import actcache
from actcache import probe
from actcache.errors import HarvestError
from actcache.lease import Lease
from actcache.probe import run_checks
from actcache.standing import standing
from actcache.store import open_store


def test_of_a_finished_harvest_nothing_is_missing_and_of_a_longer_one_the_rest_is(tiny):
    dataset, spec, root = tiny
    found = standing(spec, root)
    assert (found["url"], found["complete"], found["running"]) == (dataset.url, True, False)
    assert (found["blocks_done"], found["blocks_missing"], found["quarantined"]) == (
        found["blocks_wanted"],
        0,
        [],
    )
    rows = {split: dataset.split(split).n_rows for split in dataset.splits}
    assert found["rows_done"] == found["rows_wanted"] == sum(rows.values())
    longer = standing(replace(spec, n_tokens=5_000), root)
    assert (longer["complete"], longer["blocks_missing"], longer["rows_done"]) == (
        False,
        2,
        found["rows_done"],
    )
    other_site = standing(replace(spec, sites=("blocks.0.hook_resid_post",)), root)
    assert (other_site["complete"], other_site["blocks_done"]) == (False, 0)


def test_before_the_corpus_is_tokenised_only_the_url_is_known(tmp_path):
    found = standing(tiny_spec(tmp_path), str(tmp_path / "root"))
    assert (found["blocks_wanted"], found["blocks_done"], found["complete"]) == (None, 0, False)
    assert not (tmp_path / "root").exists()
    assert actcache.harvest(tiny_spec(tmp_path), str(tmp_path / "root"), progress=False).url == found["url"]


def test_blocks_set_aside_are_listed_until_they_are_there(tmp_path):
    spec, root = tiny_spec(tmp_path, n_tokens=3000), tmp_path / "root"
    first = actcache.harvest(replace(spec, n_tokens=1024), str(root), progress=False)
    blocker = Path(first.url) / "train" / SITES[0] / "codes" / "c" / "1" / "0"
    blocker.mkdir(parents=True)
    with pytest.raises(HarvestError):
        actcache.harvest(spec, str(root), progress=False)
    found = standing(spec, str(root))
    assert [(b["split"], b["block"]) for b in found["quarantined"]] == [("train", 1)]
    assert (found["blocks_missing"], found["complete"]) == (1, False)
    blocker.rmdir()
    actcache.harvest(spec, str(root), progress=False)
    assert standing(spec, str(root))["quarantined"] == []


def test_records_that_no_version_holds_yet_count_and_give_the_rate_of_the_run(tmp_path):
    """As in the minute between two versions: the manifest is gone, the records are there, 2 s apart."""
    spec, root = tiny_spec(tmp_path), str(tmp_path / "root")
    dataset = actcache.harvest(spec, root, progress=False)
    place = Path(dataset.url)
    for path in (*place.glob("_manifest/*"), *place.glob("_segments/*")):
        path.unlink()
    records = sorted(place.glob("_records/*/*.json"))
    now = time.time()
    with Lease(open_store(root), place.name):
        for i, path in enumerate(records):
            os.utime(path, (now + 10 + 2 * i, now + 10 + 2 * i))
        found = standing(replace(spec, n_tokens=5_000), root)
    assert (found["blocks_done"], found["blocks_missing"]) == (len(records), 2)
    assert found["running"]
    order = [(path.parent.name, int(path.name[:8])) for path in records]
    rows = {b: min(1024, dataset.split(b[0]).n_rows - 1024 * b[1]) for b in order}
    assert found["rate_rows_per_s"] == round(sum(rows[b] for b in order[1:]) / (2 * (len(records) - 1)), 1)
    assert found["eta_s"] == pytest.approx(
        (found["rows_wanted"] - found["rows_done"]) / found["rate_rows_per_s"], rel=1e-3
    )


def test_the_command_line_gives_progress_and_plan_and_computes_nothing(tmp_path):
    arguments = harvest_arguments(tiny_spec(tmp_path), tmp_path / "root")
    done = actcache_here(*arguments, "--progress", "--json")
    assert json.loads(done.stdout)["complete"] is False
    planned = actcache_here(*arguments, "--dry-run", "--json")
    assert json.loads(planned.stdout)["extent"]["train"]["blocks_to_do"] == 1
    assert not (tmp_path / "root").exists()


def test_checks_pass_where_a_harvest_would_and_leave_nothing(tmp_path):
    checks = run_checks(str(tmp_path), model="bundled:stdlib-gpt2")
    assert [c for c in checks if not c["ok"]] == []
    names = {c["check"] for c in checks}
    assert {"put", "conditional put", "ranged get", "list and clock", "delete", "GPUs", "model"} <= names
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("check", "options"),
    [("GPUs", {"gpus": 4096}), ("model", {"model": "/nowhere/gpt2"}), ("put", {"root": "/proc/nowhere"})],
)
def test_a_check_that_fails_says_what_helps(tmp_path, check, options):
    options = {"root": str(tmp_path)} | options
    [failed] = [c for c in run_checks(options.pop("root"), **options) if not c["ok"]]
    assert failed["check"] == check
    assert failed["found"]
    assert failed["fix"]
    done = actcache_here("check", tmp_path, "--gpus", 4096)
    assert done.returncode == 1
    assert done.stderr == "error: 1 of 7 checks failed: GPUs\n"


@pytest.mark.parametrize(
    ("check", "verb", "fix"),
    [
        ("put", "create", "s3:PutObject"),
        ("ranged get", "read", "s3:GetObject"),
        ("conditional put", "swap", "honours If-None-Match"),
        ("list and clock", "listing", "s3:ListBucket"),
        ("delete", "delete", "s3:DeleteObject"),
    ],
)
def test_a_store_that_refuses_something_is_found_and_the_fix_names_it(
    tmp_path, monkeypatch, check, verb, fix
):
    def refuse(done, key):
        if done == verb:
            raise PermissionError("AccessDenied")

    real = probe.open_store
    monkeypatch.setattr(probe, "open_store", lambda *a: HookedSub(real(*a), refuse))
    failed = next(c for c in run_checks(str(tmp_path)) if not c["ok"])
    assert (failed["check"], failed["found"]) == (check, "AccessDenied")
    assert fix in failed["fix"]


class HookedSub(HookedStore):
    def sub(self, prefix):
        return HookedStore(self._store.sub(prefix), self._before)


@pytest.mark.parametrize("off_s", [300, -300])
def test_a_clock_that_is_off_is_found(tmp_path, monkeypatch, off_s):
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + off_s)
    [failed] = [c for c in run_checks(str(tmp_path)) if not c["ok"]]
    assert failed["check"] == "list and clock"
    assert failed["found"] == "this machine's clock and the store's are 300 s apart"
    assert failed["fix"].startswith("let NTP set this machine's clock")


@pytest.mark.slow
def test_a_store_that_ignores_conditions_is_found(signed_s3):
    """rclone overwrites whatever If-None-Match says."""
    failed = [c["check"] for c in run_checks("s3://bucket/checked", storage_options=signed_s3) if not c["ok"]]
    assert failed == ["conditional put"]
