"""Statistics equal a float64 reference however the rows are cut, and merge exactly."""

import numpy as np
import pytest
from codec_cases import assert_is_the_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.codec import Precision, calibrate
from actcache.statistics import BINS_PER_OCTAVE, PERCENTILES, ZERO_BIN, Statistics, merge

FVU, FP32 = Precision.parse("fvu:1e-3"), Precision.parse("fp32")
BIN = 2 ** (1 / BINS_PER_OCTAVE)


def rows_of(n, d, seed, sinks=0.0, magnitude=1.0):
    """(the LM's rows, stored rows): channels of unlike scale and mean, some rows far out."""
    rng = np.random.default_rng(seed)
    acts = (rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + rng.normal(size=d) * 5) * magnitude
    acts[rng.random(n) < sinks] *= 300
    stored = acts + rng.uniform(-0.05, 0.05, acts.shape) * magnitude
    return acts.astype(np.float32), stored.astype(np.float32)


def statistics_in_parts(acts, stored, cuts, calibration):
    ends = np.cumsum(cuts)
    scale = np.full(len(acts), calibration.step, np.float32)
    return merge(
        [
            Statistics.of(acts[e - n : e], stored[e - n : e], scale[e - n : e], calibration)
            for n, e in zip(cuts, ends, strict=True)
        ]
    )


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from([1, 5, 33]),
    st.sampled_from([FVU, FP32]),
    st.sampled_from([0.0, 0.02]),
    st.sampled_from([1e-20, 1.0, 1e18]),
)
@settings(max_examples=120, deadline=None)
def test_any_split_into_parts_merges_to_the_float64_reference(cuts, seed, d, precision, sinks, magnitude):
    acts, stored = rows_of(sum(cuts), d, seed, sinks, magnitude)
    calibration = calibrate(acts, precision)
    found = statistics_in_parts(acts, stored, cuts, calibration)
    assert_is_the_reference(found, acts, stored, calibration)


@pytest.mark.parametrize("sinks", [0.0, 1 / 256])
def test_many_rows_in_parts_are_those_in_one_piece(sinks):
    acts, stored = rows_of(30_000, 96, 3, sinks)
    calibration = calibrate(acts[:10_000], FVU)
    whole = Statistics.of(acts, stored, None, calibration)
    parts = statistics_in_parts(acts, stored, [1, 999, 14_000, 15_000], calibration)
    for found in (whole, parts):
        assert_is_the_reference(found, acts, stored, calibration)
    assert np.array_equal(whole.norm_bins_K, parts.norm_bins_K)
    assert np.array_equal(whole.norm_counts_K, parts.norm_counts_K)


def test_a_channel_that_is_stored_constant_has_no_variance():
    acts, _ = rows_of(5000, 8, 0)
    stored = acts.copy()
    stored[:, 3] = 1 / 3
    assert Statistics.of(acts, stored, None, calibrate(acts, FVU)).summary()["variance"][3] == 0


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(0, 1000),
    st.sampled_from([1e-40, 1e-12, 1.0, 1e30]),
)
@settings(max_examples=80, deadline=None)
def test_norm_percentiles_are_within_a_bin_of_the_true_ones(cuts, seed, magnitude):
    rng = np.random.default_rng(seed)
    stored = (rng.normal(size=(sum(cuts), 3)) * magnitude * np.exp(rng.normal(size=(sum(cuts), 1)))).astype(
        "f4"
    )
    stored[rng.random(len(stored)) < 0.1] = 0
    calibration = calibrate(stored, FP32)
    found = statistics_in_parts(stored, stored, cuts, calibration)
    assert found.norm_counts_K.sum() == len(stored)
    assert (np.diff(found.norm_bins_K) > 0).all()
    norms = np.sort(np.linalg.norm(stored.astype(np.float64), axis=1))
    percentiles = found.summary()["norm_percentiles"]
    assert tuple(percentiles) == PERCENTILES
    for percent, norm in percentiles.items():
        true = np.percentile(norms, percent, method="inverted_cdf")
        assert true / BIN <= norm <= true * BIN
    bins = np.full(len(norms), ZERO_BIN)
    bins[norms > 0] = np.floor(BINS_PER_OCTAVE * np.log2(norms[norms > 0]))
    sorted_bins = np.repeat(found.norm_bins_K, found.norm_counts_K)
    assert (np.abs(sorted_bins - bins) <= (norms > 0)).all()  # at an edge rounding may choose the neighbour
