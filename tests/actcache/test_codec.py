"""Quantisation keeps its stated bounds, clips nothing and refuses what is not finite."""

from dataclasses import replace

import numpy as np
import pytest
from codec_cases import WORST, rows_of, worst_case
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.codec import Precision, calibrate, decode, encode
from actcache.errors import NonFiniteActivation, SpecError
from actcache.quantise import quantise, quantise_rotated
from actcache.shard import encode_chunk
from actcache.statistics import Statistics

FVU = Precision.parse("fvu:1e-3")
ROTATED = ("rotated:1e-2", "rotated:1e-3", "rotated:1e-5")


def stored_of(acts, calibration, precision):
    codes, scale = encode(acts, calibration, precision)
    assert codes.dtype == precision.dtype
    return decode(codes, scale, calibration, precision), scale


def assert_within_the_stated_bound(acts, stored, scale, calibration, precision):
    """docs/format.md, "Precision", the table of errors."""
    acts, stored = acts.astype(np.float64), stored.astype(np.float64)
    error, size = np.abs(stored - acts), np.abs(acts)
    assert np.isfinite(stored).all()
    if precision.rotated:
        d = acts.shape[1]
        centred = np.linalg.norm(acts - calibration.offset_D, axis=1)
        bound = np.sqrt(d) * (scale / 2.0 + (d + 4) * 2.0**-22 * centred) + 2.0**-23 * np.linalg.norm(
            acts, axis=1
        )
        assert (np.linalg.norm(error, axis=1) <= bound).all()
    elif precision.quantised:
        unit = scale[:, None].astype(np.float64) * calibration.channel_D
        assert (error <= (0.5 + 2.0**-14) * unit + 2.0**-23 * size).all()
    elif precision.kind == "bf16":
        assert (error <= np.maximum(2.0**-8 * size, 2.0**-134)).all()
    elif precision.kind == "fp16":
        assert (error <= np.maximum(2.0**-11 * size, 2.0**-25)).all()
    else:
        assert (error == 0).all()


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


@pytest.mark.parametrize("precision", ["fvu:1e-3", "fvu:3e-3", "fvu:1e-2", *ROTATED])
def test_noise_stays_below_the_stated_fraction(precision):
    precision = Precision.parse(precision)
    acts, _ = rows_of(20_000, 64)
    calibration = calibrate(acts[:5000], precision)
    stored, scale = stored_of(acts, calibration, precision)
    summary = Statistics.of(acts, stored, scale, calibration).summary()
    assert 0.5 * precision.fvu < summary["fvu_core"] <= precision.fvu


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3"])
@pytest.mark.parametrize("norm", [30, 100, 300])
def test_attention_sinks_do_not_cost_ordinary_rows_their_precision(norm, precision):
    precision = Precision.parse(precision)
    acts, is_sink = rows_of(30_000, 64, sinks=1 / 256, sink_norm=norm)
    calibration = calibrate(acts[:10_000], precision)
    stored, scale = stored_of(acts, calibration, precision)
    ordinary, kept = acts[~is_sink], stored[~is_sink]
    fvu = ((kept - ordinary) ** 2).sum() / ((ordinary - ordinary.mean(0)) ** 2).sum()
    assert fvu <= 1e-3
    assert_within_the_stated_bound(acts, stored, scale, calibration, precision)  # the sinks are not clipped


def test_rotated_codes_take_fewer_bits_where_channels_go_together():
    rng = np.random.default_rng(0)
    acts = (rng.normal(size=(8192, 64)) * np.exp(-np.arange(64) / 8)) @ rng.normal(size=(64, 64))
    acts = acts.astype(np.float32)
    bits = {}
    for name in ("fvu:1e-3", "rotated:1e-3"):
        precision = Precision.parse(name)
        codes, _ = encode(acts, calibrate(acts, precision), precision)
        bits[precision.kind] = 8 * len(encode_chunk(codes, precision.rotated)) / codes.size
    assert bits["rotated"] < 0.7 * bits["fvu"]


def test_the_step_of_rotated_codes_is_wider_where_components_vanish_below_it():
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(8192, 64)) * np.exp(-np.arange(64))
    precision = Precision.parse("rotated:1e-3")
    calibration = calibrate(acts.astype(np.float32), precision)
    assert calibration.step > 2 * np.sqrt(12 * 0.95e-3 * calibration.core_variance / 64)


def test_rotated_codes_are_zigzag_and_never_the_fill_value():
    calibration = replace(
        calibrate(np.eye(2, dtype=np.float32), FVU), offset_D=np.zeros(2, np.float32), step=1.0
    )
    calibration = replace(calibration, rotation_DD=np.eye(2, dtype=np.float32))
    acts = np.array([[0, -1], [1, -2], [32767, -32767], [32767.6, -32768], [1e5, -1e9]], np.float32)
    codes, scale = quantise_rotated(acts, calibration.offset_D, 1.0, calibration.rotation_DD)
    assert codes[:3].tolist() == [[0, 1], [2, 3], [65534, 65533]]
    assert scale.tolist() == [1, 1, 1, 2, 32768]
    assert codes.max() < 65535
    hole = decode(
        np.full((1, 2), 65535, "<u2"), np.full(1, np.nan, "<f4"), calibration, Precision.parse("rotated:1e-3")
    )
    assert np.isnan(hole).all()


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
    out = np.empty_like(acts)
    assert decode(codes, None, None, precision, out=out) is out
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["fvu:1e-3", "rotated:1e-3", "bf16", "fp16", "fp32"])
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


@pytest.mark.parametrize("precision", ["fvu:1e-2", "fvu:1e-3", *ROTATED, "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", WORST)
def test_the_worst_rows_keep_the_stated_error(case, precision):
    precision = Precision.parse(precision)
    acts = worst_case(case)
    calibration = calibrate(acts[: max(1, len(acts) // 2)], precision)
    if precision.kind == "fp16" and np.abs(acts).max() > 65504:
        with pytest.raises(NonFiniteActivation, match=r"row in fp16: \d+ holds .* channel \d+"):
            encode(acts, calibration, precision)
        return
    stored, scale = stored_of(acts, calibration, precision)
    assert_within_the_stated_bound(acts, stored, scale, calibration, precision)
    if precision.quantised and calibration.step > 2.0**-100 and case != "constant, then not":
        summary = Statistics.of(acts, stored, scale, calibration).summary()
        assert summary["fvu_core"] <= precision.fvu


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3"])
def test_rows_whose_decoded_values_could_overflow_are_refused_by_row_and_channel(precision):
    precision = Precision.parse(precision)
    acts, _ = rows_of(100, 8)
    calibration = calibrate(acts, precision)
    acts[17, 3] = 3e38
    with pytest.raises(NonFiniteActivation, match=r"row 17 .*channel 3"):
        encode(acts, calibration, precision)
    with pytest.raises(NonFiniteActivation, match=r"row 17 .*channel 3"):
        calibrate(acts, precision)


def entropy(codes):
    share = np.bincount(codes.astype(int).ravel() + 128) / codes.size
    share = share[share > 0]
    return -(share * np.log2(share)).sum()


def loud_rows(n, d, n_loud, times, seed=0):
    """Normal rows with some channels that many times as loud as the others, as in residual streams."""
    acts = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    acts[:, 5 : 5 + n_loud] *= times
    return acts


@pytest.mark.parametrize("times", [10, 30, 100])
@pytest.mark.parametrize("n_loud", [1, 3, 20])
def test_loud_channels_keep_the_noise_at_the_usual_bits_with_no_row_rescaled(n_loud, times):
    acts = loud_rows(6000, 768, n_loud, times)
    calibration = calibrate(acts[:3000], FVU)
    codes, scale = encode(acts, calibration, FVU)
    stored = decode(codes, scale, calibration, FVU)
    summary = Statistics.of(acts, stored, scale, calibration).summary()
    assert summary["fvu_core"] <= 1e-3
    assert entropy(codes) < 5.3
    assert summary["rows_rescaled"] <= 0.02 * len(acts)
    assert (calibration.channel_D[5 : 5 + n_loud] > 1).all() or n_loud * times**2 > 768 * 100
    assert set(np.delete(calibration.channel_D, range(5, 5 + n_loud))) == {1}
    assert_within_the_stated_bound(acts, stored, scale, calibration, FVU)


def test_loud_channels_whose_rows_are_heavy_tailed_are_not_refused():
    """Some tokens reach far out in a few channels, as massive activations do."""
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(8000, 512)).astype(np.float32)
    acts[:, :4] = 8 * rng.standard_t(3, size=(8000, 4))
    calibration = calibrate(acts[:4000], FVU)
    stored, scale = stored_of(acts, calibration, FVU)
    summary = Statistics.of(acts, stored, scale, calibration).summary()
    assert summary["fvu_core"] <= 1.1e-3
    assert summary["rows_rescaled"] < 0.02 * len(acts)
    assert_within_the_stated_bound(acts, stored, scale, calibration, FVU)


def test_the_fvu_of_the_median_channel_shows_what_the_total_hides():
    acts = loud_rows(6000, 256, 3, 100)
    calibration = calibrate(acts, FVU)
    stored, scale = stored_of(acts, calibration, FVU)
    summary = Statistics.of(acts, stored, scale, calibration).summary()
    by_hand = ((stored - acts) ** 2).sum(0) / ((stored - stored.mean(0)) ** 2).sum(0)
    assert summary["fvu_core"] <= 1e-3
    assert summary["fvu_median_channel"] == pytest.approx(np.median(by_hand), rel=1e-2)
    assert summary["fvu_median_channel"] > 50e-3


def test_the_recorded_line_gives_the_bits_of_decode_with_loud_channels_and_rows():
    acts = loud_rows(2000, 48, 2, 50)
    calibration = calibrate(acts, FVU)
    acts[::7] *= 60
    codes, scale = encode(acts, calibration, FVU)
    assert len(set(calibration.channel_D)) > 1
    assert len(set(scale)) > 1
    names = {"codes": codes, "scale": scale, "channel": calibration.channel_D, "offset": calibration.offset_D}
    assert np.array_equal(eval(FVU.decode_line, names), decode(codes, scale, calibration, FVU))


def test_rows_that_int8_cannot_hold_are_refused_rather_than_stored_worse_than_stated():
    acts, _ = rows_of(2000, 512)
    acts[np.arange(2000), np.random.default_rng(1).integers(0, 512, 2000)] = 200  # a spike in every row
    with pytest.raises(SpecError, match=r"rotated:0\.001 or bf16"):
        calibrate(acts, FVU)


@pytest.mark.parametrize(
    "text", ["fvu", "fvu:", "fvu:x", "fvu:0", "rotated", "rotated:-1", "fvu:nan", "bf16:1e-3", "int8", ""]
)
def test_unknown_precisions_are_refused(text):
    with pytest.raises(SpecError, match="precision is"):
        Precision.parse(text)
