"""Codes, scales, statistics and errors of the device are numpy's, for rows of any dtype, size and number.

On the CPU's torch, and on the GPU too where there is one.
"""

import threading
from unittest.mock import patch

import numpy as np
import pytest
import torch
from codec_cases import WORST, assert_is_the_reference, rows_of, worst_case
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_harvest import tiny_spec

import actcache
from actcache import device as device_module
from actcache.codec import Precision, calibrate, decode, encode
from actcache.device import BlockRows, DeviceCodec, Encoding, to_device
from actcache.errors import Conflict, HarvestError, NonFiniteActivation
from actcache.harvester import Harvester
from actcache.statistics import Statistics, merge

PRECISIONS = ("fvu:1e-2", "fvu:1e-3", "rotated:1e-3", "bf16", "fp16", "fp32")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def not_by_numpy(monkeypatch):
    """The device must do the work itself."""

    def refuse(self):
        raise AssertionError("a batch went to numpy")

    monkeypatch.setattr(Encoding, "_by_numpy", refuse)


def stored_on(device, acts, calibration, precision, given_N=None, dtype=torch.float32):
    """(codes, scale, statistics) by the device, on the host."""
    codec = DeviceCodec(calibration, precision, device)
    encoding = codec.encode(torch.from_numpy(acts).to(device, dtype), given_N)
    return fetched(encoding, precision)


def fetched(encoding, precision):
    statistics = encoding.finish()
    scale = None if encoding.scale_N is None else encoding.scale_N.cpu().numpy()
    return encoding.codes_ND.cpu().numpy().view(precision.dtype), scale, statistics


def decoded(codes, scale, calibration, precision):
    return decode(codes, scale, calibration, precision)


def assert_is_numpys(codes, scale, acts, calibration, precision, given_N=None):
    """Bit for bit; rotated codes and scales to the rounding of their products."""
    codes_np, scale_np = encode(acts, calibration, precision, given_N)
    assert codes.dtype == codes_np.dtype
    assert (scale is None) == (scale_np is None)
    if not precision.rotated:
        assert np.array_equal(codes, codes_np)
        assert scale is None or np.array_equal(scale, scale_np)
        return
    near = scale == scale_np
    assert near.mean() > 0.99
    signed = [(c >> 1).astype(np.int64) ^ -(c & 1).astype(np.int64) for c in (codes, codes_np)]
    assert np.abs(signed[0] - signed[1])[near].max(initial=0) <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", WORST)
def test_the_worst_rows_are_stored_as_by_numpy(case, precision, device):
    precision = Precision.parse(precision)
    acts = worst_case(case)
    calibration = calibrate(acts[: max(1, len(acts) // 2)], precision)
    if precision.kind == "fp16" and np.abs(acts).max() > 65504:
        with pytest.raises(NonFiniteActivation) as theirs:
            encode(acts, calibration, precision)
        with pytest.raises(NonFiniteActivation) as ours:
            stored_on(device, acts, calibration, precision)
        assert str(ours.value) == str(theirs.value)
        return
    codes, scale, statistics = stored_on(device, acts, calibration, precision)
    assert_is_numpys(codes, scale, acts, calibration, precision)
    stored = decoded(codes, scale, calibration, precision)
    assert_is_the_reference_of(statistics, acts, stored, scale, calibration)


def assert_is_the_reference_of(found, acts, stored, scale, calibration):
    """The float64 reference's figures; those that depend on a rounded edge are numpy's within a row or two."""
    theirs = Statistics.of(acts, stored, scale, calibration)
    assert found.rows_rescaled == theirs.rows_rescaled
    assert found.max_abs == pytest.approx(theirs.max_abs, rel=1e-6)  # rotated: of products, rounded otherwise
    assert found.n_core == theirs.n_core
    for name in ("norm_sum", "sse", "core_sse", "max_error"):
        # an error is known to the rounding of the values that it is between
        noise = 2.0**-23 * theirs.max_abs * (theirs.max_error if name.endswith("sse") else 1)
        noise *= acts.size if name.endswith("sse") else name == "max_error"
        assert getattr(found, name) == pytest.approx(getattr(theirs, name), rel=1e-6, abs=noise)
    size = np.abs(stored.astype(np.float64)).max(axis=0)
    noise = 2.0**-23 * theirs.max_abs * theirs.max_error * len(acts)
    assert found.core_sse_D == pytest.approx(theirs.core_sse_D, rel=1e-6, abs=noise)
    for mean, m2 in (("mean_D", "m2_D"), ("core_mean_D", "core_m2_D")):
        assert (np.abs(getattr(found, mean) - getattr(theirs, mean)) <= 2e-6 * size).all()
        noise = len(acts) * (size * 2.0**-22) ** 2
        assert (np.abs(getattr(found, m2) - getattr(theirs, m2)) <= 2e-6 * getattr(theirs, m2) + noise).all()
    assert found.norm_counts_K.sum() == len(acts)
    bins = [np.repeat(x.norm_bins_K, x.norm_counts_K) for x in (found, theirs)]
    assert (np.abs(bins[0] - bins[1]) <= 1).all()


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([1, 5, 33]),
    st.sampled_from(PRECISIONS),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([0.0, 0.02]),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e18]),
    st.sampled_from([1, 3000]),
    st.sampled_from(DEVICES),
)
@settings(max_examples=150, deadline=None)
def test_any_batches_and_pieces_merge_to_the_float64_reference(
    cuts, seed, d, precision, dtype, sinks, magnitude, piece_values, device
):
    precision, dtype = Precision.parse(precision), DTYPES[dtype]
    acts, _ = rows_of(sum(cuts), d, seed, sinks)
    tensor = torch.from_numpy(acts).mul_(magnitude).to(dtype)
    acts = tensor.float().numpy()
    if not np.isfinite(acts).all() or (precision.kind == "fp16" and np.abs(acts).max() > 65504):
        return  # the LM's own dtype overflows, or the stored one: errors have their tests
    calibration = calibrate(acts, precision)
    codec = DeviceCodec(calibration, precision, device)
    with patch.object(device_module, "_PIECE_VALUES", piece_values):
        encodings = [codec.encode(part.to(device)) for part in tensor.split(cuts)]
        parts = [fetched(encoding, precision) for encoding in encodings]
    codes = np.concatenate([part[0] for part in parts])
    scale = np.concatenate([part[1] for part in parts]) if precision.quantised else None
    assert_is_numpys(codes, scale, acts, calibration, precision)
    stored = decoded(codes, scale, calibration, precision)
    found = merge([part[2] for part in parts])
    if precision.rotated:  # numpy's products round otherwise than these
        assert_is_the_reference_of(found, acts, stored, scale, calibration)
    else:
        assert_is_the_reference(found, acts, stored, calibration)


@pytest.mark.usefixtures("not_by_numpy")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ordinary_rows_with_attention_sinks_stay_on_the_device(precision, dtype, device):
    precision = Precision.parse(precision)
    acts, _ = rows_of(4096, 64, sinks=1 / 128)
    acts[5] = 0
    acts = torch.from_numpy(acts).to(DTYPES[dtype]).float().numpy()
    calibration = calibrate(acts, precision)
    codes, scale, statistics = stored_on(device, acts, calibration, precision, dtype=DTYPES[dtype])
    assert_is_numpys(codes, scale, acts, calibration, precision)
    stored = decoded(codes, scale, calibration, precision)
    assert_is_the_reference_of(statistics, acts, stored, scale, calibration)
    if precision.kind == "fvu":
        assert statistics.rows_rescaled > 10


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoding_waits_for_no_value(precision):
    """On the meta device there is none: asking for one raises."""
    precision = Precision.parse(precision)
    calibration = calibrate(rows_of(500, 16)[0], precision)
    codec = DeviceCodec(calibration, precision, "meta")
    encoding = codec.encode(torch.empty(4000, 16, dtype=torch.bfloat16, device="meta"))
    assert encoding.codes_ND.shape == (4000, 16)
    assert encoding.codes_ND.element_size() == precision.dtype.itemsize
    BlockRows(codec, 5000, 16).put(torch.empty(4000, dtype=torch.int64, device="meta"), encoding)


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3"])
def test_more_large_rows_than_there_is_room_for_are_done_by_numpy_and_the_next_batch_has_room(
    precision, device, monkeypatch
):
    precision = Precision.parse(precision)
    acts, _ = rows_of(3000, 16)
    calibration = calibrate(acts, precision)
    acts[::4] *= 1e6
    codec = DeviceCodec(calibration, precision, device)
    for _ in range(2):
        codes, scale, statistics = fetched(codec.encode(torch.from_numpy(acts).to(device)), precision)
        assert_is_numpys(codes, scale, acts, calibration, precision)
        assert statistics.rows_rescaled == 750
        monkeypatch.setattr(Encoding, "_by_numpy", None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_that_are_not_finite_are_refused_as_by_numpy(bad, dtype, precision, device):
    precision = Precision.parse(precision)
    acts, _ = rows_of(900, 512)
    calibration = calibrate(acts, precision)
    acts[[701, 800], 3] = bad  # past the first of numpy's pieces
    tensor = torch.from_numpy(acts).to(DTYPES[dtype])
    encoding = DeviceCodec(calibration, precision, device).encode(tensor.to(device))
    if bad == 3e38 and precision.kind in ("bf16", "fp32"):
        assert encoding.finish().max_abs > 2.9e38
        return
    with pytest.raises(NonFiniteActivation, match=r"(row|row in fp16:) 701 holds .* channel 3") as ours:
        encoding.finish()
    with pytest.raises(NonFiniteActivation) as theirs:
        encode(tensor.float().numpy(), calibration, precision)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3"])
def test_given_scales_hold_or_conflict_by_row(precision, device):
    precision = Precision.parse(precision)
    acts, _ = rows_of(2000, 64, sinks=0.01)
    calibration = calibrate(acts, precision)
    _, given_N = encode(acts, calibration, precision)
    given_N[::3] *= 2
    codes, scale, statistics = stored_on(device, acts, calibration, precision, given_N)
    assert np.array_equal(scale, given_N)
    assert_is_numpys(codes, scale, acts, calibration, precision, given_N)
    assert statistics.rows_rescaled >= 666
    acts[1500] *= 1e6
    with pytest.raises(Conflict, match="row 1500 reaches code"):
        stored_on(device, acts, calibration, precision, given_N)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_rows_have_empty_statistics(precision, device):
    precision = Precision.parse(precision)
    calibration = calibrate(rows_of(100, 8)[0], precision)
    codes, _, statistics = stored_on(device, np.empty((0, 8), np.float32), calibration, precision)
    assert codes.shape == (0, 8)
    assert statistics.n_rows == 0


@pytest.mark.usefixtures("not_by_numpy")
def test_a_bfloat16_lm_is_stored_as_its_own_bits(device):
    precision = Precision.parse("bf16")
    acts = torch.from_numpy(rows_of(500, 16)[0]).to(torch.bfloat16)
    codes, scale, statistics = stored_on(
        device,
        acts.float().numpy(),
        calibrate(acts.float().numpy(), precision),
        precision,
        None,
        torch.bfloat16,
    )
    assert np.array_equal(codes, acts.view(torch.int16).numpy().view(np.uint16))
    assert scale is None
    assert statistics.sse == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_block_gathers_batches_in_stored_order(precision, device):
    precision = Precision.parse(precision)
    acts, _ = rows_of(700, 24, sinks=0.01)
    calibration = calibrate(acts, precision)
    codec = DeviceCodec(calibration, precision, device)
    order = np.random.default_rng(1).permutation(700)
    block = BlockRows(codec, 700, 24)
    for part in np.split(np.arange(700), [300, 310]):
        given_N = encode(acts[part], calibration, precision)[1] if len(part) == 10 else None  # one by numpy
        encoding = codec.encode(torch.from_numpy(acts[part]).to(device), given_N)
        encoding.finish()
        block.put(to_device(order[part], device), encoding)
    block.start_copy()
    codes, scale = block.wait()
    assert_is_numpys(codes[order], None if scale is None else scale[order], acts, calibration, precision)


def test_measuring_codes_of_another_run_is_numpys(device):
    precision = Precision.parse("fvu:1e-3")
    acts, _ = rows_of(500, 16)
    calibration = calibrate(acts, precision)
    codes, scale = encode(acts, calibration, precision)
    moved = torch.from_numpy(acts * 1.001).to(device)
    found = DeviceCodec(calibration, precision, device).measure(moved, codes, scale)
    theirs = Statistics.of(
        moved.cpu().numpy(), decoded(codes, scale, calibration, precision), scale, calibration
    )
    assert found.sse == theirs.sse > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own
@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3", "bf16"])
def test_a_compiled_codec_stores_the_same(precision, device):
    precision = Precision.parse(precision)
    acts, _ = rows_of(2050, 64, sinks=0.01)
    calibration = calibrate(acts, precision)
    codec = DeviceCodec(calibration, precision, device, compiled=True)
    for n in (2050, 999, 40):
        codes, scale, statistics = fetched(codec.encode(torch.from_numpy(acts[:n]).to(device)), precision)
        assert_is_numpys(codes, scale, acts[:n], calibration, precision)
        stored = decoded(codes, scale, calibration, precision)
        assert_is_the_reference_of(statistics, acts[:n], stored, scale, calibration)


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3", "bf16", "fp32"])
def test_a_harvest_that_quantises_on_the_device_is_the_same_dataset(tmp_path, monkeypatch, precision):
    """On the CPU as the device: codes bit for bit (rotated within one), statistics within rounding."""
    spec = tiny_spec(tmp_path, n_tokens=2000, precision=precision)
    usual = actcache.harvest(spec, str(tmp_path / "usual"), progress=False)
    monkeypatch.setattr(Harvester, "_start", _then_on_device(Harvester._start))
    there = actcache.harvest(spec, str(tmp_path / "there"), progress=False)
    for site in usual.sites:
        if precision.startswith("rotated"):
            close = usual.stats(site)["max_error"] * 2 * 1.01 * usual.d_in(site) ** 0.5
            assert np.abs(usual.read(site, slice(None)) - there.read(site, slice(None))).max() <= close
        else:
            assert np.array_equal(usual.read(site, slice(None)), there.read(site, slice(None)))
        for name in ("mean", "variance", "mean_norm", "fvu_core"):
            assert there.stats(site)[name] == pytest.approx(usual.stats(site)[name], rel=1e-4, abs=1e-7)


def _then_on_device(start):
    def started(self):
        self.on_device = True
        start(self)

    return started


def test_a_bad_value_on_the_device_names_its_sequence_and_position(tmp_path, monkeypatch):
    from actcache import capture

    run_capture = capture.run_capture

    def with_a_nan(model, input_ids_BT, sites, *rest):
        acts = run_capture(model, input_ids_BT, sites, *rest)
        if threading.current_thread().name.startswith("lm"):  # of a block: calibration runs in this thread
            acts = {site: x.clone() for site, x in acts.items()}
            for x in acts.values():
                x[3, 5] = float("nan")
        return acts

    spec = tiny_spec(tmp_path, n_tokens=2000, validation_blocks=0)
    monkeypatch.setattr(Harvester, "_start", _then_on_device(Harvester._start))
    monkeypatch.setattr(capture, "run_capture", with_a_nan)
    with pytest.raises(HarvestError, match=r"(train|test) sequence \d+, position 5: row .* holds nan"):
        actcache.harvest(spec, str(tmp_path / "root"), lm_batch=64, progress=False)
