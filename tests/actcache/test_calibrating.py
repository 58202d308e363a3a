"""Which rows calibrate, and that neither they nor an LM batch outgrow the stated memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_harvest import SITES, tiny_spec

from actcache import calibrating
from actcache.codec import Precision, calibrate
from actcache.corpus import tokenise
from actcache.driver import resolve
from actcache.harvester import LM_BATCH_TOKENS, Harvester, batch_size
from actcache.layout import read_calibration
from actcache.store import open_store


def full_rows(n_sequences, context_size):
    return np.arange(n_sequences + 1, dtype=np.int64) * context_size


@pytest.mark.parametrize(
    ("context_size", "wanted"),
    [(16, 4096), (256, 256), (2048, 256), (8192, 256), (32_768, 64), (131_072, 16)],
)
def test_a_calibration_looks_at_256_sequences_and_at_fewer_of_very_long_ones(context_size, wanted):
    row_start = full_rows(5000, context_size)
    assert calibrating.n_sequences(row_start, context_size) == wanted
    assert calibrating.n_sequences(row_start[:8], context_size) == 7


def test_drawn_rows_are_65536_kept_tokens_over_all_the_sequences():
    kept_ST = np.random.default_rng(0).random((300, 400)) < 0.9
    drawn_ST = calibrating.draw(kept_ST, seed=3)
    assert drawn_ST.sum() == 65_536
    assert not (drawn_ST & ~kept_ST).any()
    share_S = drawn_ST.sum(axis=1) / kept_ST.sum(axis=1)
    assert 0.4 < share_S.min() < share_S.max() < 0.8
    assert np.array_equal(calibrating.draw(kept_ST, seed=3), drawn_ST)
    few_ST = kept_ST[:10]
    assert np.array_equal(calibrating.draw(few_ST, seed=3), few_ST)


def test_sites_are_gathered_in_groups_whose_rows_fit_the_budget():
    widths = {"a": 100, "b": 100, "c": 300, "d": 10}
    rows = 1000
    assert calibrating.site_groups(widths, rows, 4 * rows * 200) == [["a", "b"], ["c"], ["d"]]
    assert calibrating.site_groups(widths, rows, 10**9) == [["a", "b", "c", "d"]]
    assert calibrating.site_groups(widths, rows, 1) == [["a"], ["b"], ["c"], ["d"]]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_gathered_rows_are_those_drawn_in_the_order_of_tokens(kind):
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(7, 5, 3)).astype(np.float32)
    drawn_ST = rng.random((7, 5)) < 0.5
    gathered = calibrating.Gathered(["x"], {"x": 3}, drawn_ST)
    for start in range(0, 7, 2):
        batch = acts[start : start + 2]
        gathered.add(start, {"x": torch.from_numpy(batch) if kind == "torch" else batch})
    assert np.array_equal(gathered.pop("x"), acts[drawn_ST])


def test_calibrating_takes_little_memory_beside_the_rows():
    acts = np.random.default_rng(0).normal(size=(65_536, 256)).astype(np.float32)
    acts[:, 3] *= 30
    acts[::300] *= 50  # rows that are not core
    tracemalloc.start()
    try:
        calibration = calibrate(acts, Precision.parse("fvu:1e-3"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert calibration.n_core < calibration.n_rows
    assert peak < 6 * 2**24, f"{peak:,} bytes beside {acts.nbytes:,}"  # some parts of 2^22 values


@pytest.fixture
def job(tmp_path):
    spec = tiny_spec(tmp_path)
    resolved = resolve(spec)
    root = open_store(str(tmp_path / "root"))
    tokens = tokenise(spec, resolved.corpus, resolved.tokenizer, root, progress=False)
    return resolved.job(str(tmp_path / "root" / "dataset"), tokens.store.url, lm_batch=32)


def calibrations(job, url):
    """The calibrations of a Harvester, and the sites of each of its forward passes."""
    harvester = Harvester(replace(job, dataset_url=url))
    passes = []
    forward = harvester._forward

    def noting(input_ids_ST, sites, *rest):
        passes.append(list(sites))
        return forward(input_ids_ST, sites, *rest)

    harvester._forward = noting
    harvester.calibrate()
    harvester.close()
    return {site: read_calibration(harvester.store, site) for site in SITES}, passes


def test_a_small_buffer_calibrates_site_by_site_to_the_same_numbers(job, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "ROWS", 500)
    wide, passes = calibrations(job, str(tmp_path / "wide"))
    assert passes == [sorted(SITES)]  # in forward order
    narrow, passes = calibrations(replace(job, buffer_bytes=4 * 500 * 40), str(tmp_path / "narrow"))
    assert passes == [[site] for site in sorted(SITES)]
    for site in SITES:
        assert wide[site].n_rows == narrow[site].n_rows == 500
        # a batch of another size may round otherwise
        assert narrow[site].step == pytest.approx(wide[site].step, rel=1e-5)
        assert narrow[site].offset_D == pytest.approx(wide[site].offset_D, abs=1e-4 * wide[site].step)


@pytest.mark.parametrize(
    ("context_size", "width", "wanted"),
    [(256, 192, 32), (2048, 4096, 10), (2048, 32 * 4096, 1), (131_072, 64, 1), (8192, 64, 8)],
)
def test_an_lm_batch_is_bounded_in_tokens_and_in_bytes(context_size, width, wanted):
    buffer_bytes = 4 * 2**30
    batch = batch_size(32, context_size, width, buffer_bytes)
    assert batch == wanted
    assert batch == 1 or batch * context_size <= LM_BATCH_TOKENS
    assert batch == 1 or 3 * 4 * batch * context_size * width <= buffer_bytes / 4


def test_a_harvester_runs_batches_that_its_buffer_holds(job, tmp_path):
    tight = Harvester(replace(job, dataset_url=str(tmp_path / "tight"), buffer_bytes=4 * 3 * 4 * 16 * 64 * 5))
    ids_ST, length_S = tight.tokens.sequences("train", 0, 23)
    sizes = [len(acts[SITES[0]]) for _, acts in tight._forward(ids_ST, SITES, length_S)]
    assert sizes == [5, 5, 5, 5, 3]
    tight.close()
