"""Quantisation keeps its stated bounds, clips nothing and refuses what is not finite."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.codec import Precision, calibrate, decode, encode, quantise
from actcache.errors import NonFiniteActivation, SpecError
from actcache.statistics import Statistics

FVU = Precision.parse("fvu:1e-3")


def rows_of(n, d, seed=0, sinks=0.0, sink_norm=100.0):
    rng = np.random.default_rng(seed)
    acts = (rng.normal(size=(n, d)) * rng.uniform(0.5, 2, d) + rng.normal(size=d)).astype(np.float32)
    is_sink = rng.random(n) < sinks
    acts[is_sink] *= sink_norm
    return acts, is_sink


@given(
    st.integers(0, 1000),
    st.sampled_from([1, 3, 64]),
    st.floats(1e-6, 1e6),
    st.sampled_from([1.0, 1e-3, 1e3, 1e6]),
)
@settings(max_examples=60, deadline=None)
def test_quantise_recovers_every_value_to_half_a_step_of_its_row(seed, d, step, magnitude):
    rng = np.random.default_rng(seed)
    acts = (rng.normal(size=(50, d)) * step * magnitude).astype(np.float32)
    step = float(np.float32(step))
    codes, scale = quantise(acts, np.zeros(d, np.float32), step)
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    error = np.abs(codes * scale[:, None].astype(np.float64) - acts)
    # rounding of x * (1 / step) in float32 moves a code boundary by at most 127 * 2^-22 of a step
    assert (error <= scale[:, None] * (0.5 + 127 * 2.0**-22)).all()
    ratio = np.log2(scale / np.float32(step))
    assert np.array_equal(ratio, np.round(ratio))
    assert (ratio >= 0).all()


def test_quantise_uses_the_smallest_multiple_that_holds_the_row():
    acts = np.array([[127.4], [127.6], [254.9], [255.1], [1e6]], np.float32)
    codes, scale = quantise(acts, np.zeros(1, np.float32), 1.0)
    assert scale.tolist() == [1, 2, 2, 4, 8192]
    assert codes[:, 0].tolist() == [127, 64, 127, 64, 122]


def test_quantise_is_odd():
    acts, _ = rows_of(200, 16)
    plus, _ = quantise(acts, np.zeros(16, np.float32), 0.05)
    minus, _ = quantise(-acts, np.zeros(16, np.float32), 0.05)
    assert np.array_equal(plus, -minus)


@pytest.mark.parametrize("fvu", [1e-3, 3e-3, 1e-2])
def test_noise_stays_below_the_stated_fraction(fvu):
    acts, _ = rows_of(20_000, 64)
    precision = Precision("fvu", fvu)
    calibration = calibrate(acts[:5000], precision)
    codes, scale = encode(acts, calibration, precision)
    stored = decode(codes, scale, calibration.offset_D, precision)
    summary = Statistics.of(acts, stored, scale, calibration).summary()
    assert 0.5 * fvu < summary["fvu_core"] <= fvu


@pytest.mark.parametrize("norm", [30, 100, 300])
def test_attention_sinks_do_not_cost_ordinary_rows_their_precision(norm):
    acts, is_sink = rows_of(30_000, 64, sinks=1 / 256, sink_norm=norm)
    calibration = calibrate(acts[:10_000], FVU)
    codes, scale = encode(acts, calibration, FVU)
    stored = decode(codes, scale, calibration.offset_D, FVU)
    ordinary, kept = acts[~is_sink], stored[~is_sink]
    fvu = ((kept - ordinary) ** 2).sum() / ((ordinary - ordinary.mean(0)) ** 2).sum()
    assert fvu <= 1e-3
    assert (np.abs(stored - acts) <= 0.501 * scale[:, None]).all()  # the sinks are not clipped


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_lossless_precisions_round_to_nearest_and_fp32_keeps_every_bit(kind):
    import torch

    acts, _ = rows_of(500, 16)
    precision = Precision.parse(kind)
    codes, scale = encode(acts, calibrate(acts, precision), precision)
    assert scale is None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    expected = torch.from_numpy(acts).to(dtype).float().numpy()
    assert np.array_equal(decode(codes, None, None, precision), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["fvu:1e-3", "bf16", "fp16", "fp32"])
def test_values_that_are_not_finite_are_refused_by_row(bad, kind):
    acts, _ = rows_of(100, 8)
    precision = Precision.parse(kind)
    calibration = calibrate(acts, precision)
    acts[17, 3] = bad
    with pytest.raises(NonFiniteActivation, match=r"row 17 .*channel 3"):
        encode(acts, calibration, precision)


def test_fp16_overflow_is_refused():
    acts = np.full((2, 4), 70_000, np.float32)
    acts[0] = 1
    with pytest.raises(NonFiniteActivation, match="row in fp16: 1 holds inf"):
        encode(acts, calibrate(acts, Precision("fp16")), Precision("fp16"))


@pytest.mark.parametrize("acts", [np.zeros((300, 4)), np.full((300, 4), 3.5), np.full((300, 4), 1e-41)])
def test_constant_rows_survive(acts):
    acts = acts.astype(np.float32)
    calibration = calibrate(acts, FVU)
    codes, scale = encode(acts, calibration, FVU)
    assert np.allclose(decode(codes, scale, calibration.offset_D, FVU), acts, atol=1e-30, rtol=0)


def test_rows_that_int8_cannot_hold_are_refused_rather_than_stored_worse_than_stated():
    acts, _ = rows_of(2000, 512)
    acts[np.arange(2000), np.random.default_rng(1).integers(0, 512, 2000)] = 200  # a spike in every row
    with pytest.raises(SpecError, match="bf16"):
        calibrate(acts, FVU)


def test_one_huge_channel_keeps_the_stated_noise():
    acts, _ = rows_of(5000, 64)
    acts[:, 0] *= 1e4
    calibration = calibrate(acts, FVU)
    codes, scale = encode(acts, calibration, FVU)
    stored = decode(codes, scale, calibration.offset_D, FVU)
    assert Statistics.of(acts, stored, scale, calibration).summary()["fvu_core"] <= 1e-3


@pytest.mark.parametrize("text", ["fvu", "fvu:", "fvu:x", "fvu:0", "fvu:-1", "fvu:nan", "int8", ""])
def test_unknown_precisions_are_refused(text):
    with pytest.raises(SpecError, match="precision is"):
        Precision.parse(text)
