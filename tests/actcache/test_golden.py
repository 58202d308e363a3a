"""What earlier versions of the code wrote is read as it was: tests/golden/<format of manifests>/."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

import actcache
from actcache.manifest import MANIFEST_FORMAT
from actcache.verify import verify

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from make_golden import expected, sha256  # noqa: E402

CASES = sorted(p for p in (ROOT / "tests" / "golden").glob("*/*") if p.is_dir())


def wanted(path):
    return json.loads((path.parent / "expected.json").read_text())[path.name]


def test_every_format_has_its_golden_data():
    assert {p.parent.name for p in CASES} == {str(n) for n in range(1, MANIFEST_FORMAT + 1)}


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_data_reads_as_it_was_written(path):
    found, then = expected(actcache.open(str(path))), wanted(path)
    for split in ("train", "validation"):
        for name, value in then[split].items():
            if name.endswith("/mean of rows"):  # products with a rotation round by the BLAS that is there
                assert found[split].pop(name) == pytest.approx(value, rel=1e-5)
            else:
                assert found[split].pop(name) == value, name
        assert found.pop(split) == {}
    assert found == {"id": then["id"]}


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_plain_zarr_reads_the_same_golden_arrays(path):
    for split in ("train", "validation"):
        group = zarr.open_group(str(path), mode="r")[split]
        for name, value in wanted(path)[split].items():
            if name in group:
                assert sha256(group[name][:]) == value, name


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_data_verifies(path):
    counts = verify(actcache.open(str(path)), deep=True, progress=False)
    assert counts["unreferenced objects"] == 0
    assert counts["rows whose statistics follow from the stored values"] > 0


def test_golden_rows_are_near_those_that_another_precision_stored():
    """All cases of a format hold the same rows of the same model, at different precision."""
    for folder in {p.parent for p in CASES}:
        cases = {p.name: actcache.open(str(p)) for p in CASES if p.parent == folder}
        site = cases["bf16"].sites[0]
        rows = cases["bf16"].read(site, slice(None))
        for name in ("fvu", "rotated"):
            error = cases[name].read(site, slice(None)) - rows
            assert (error**2).sum() / ((rows - rows.mean(0)) ** 2).sum() < 1.1e-3
            assert not np.array_equal(cases[name].read(site, slice(None)), rows)
