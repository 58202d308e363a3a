"""Batches as numpy or torch, in the dtype asked for, centred and scaled: the same numbers every way."""

import numpy as np
import pytest
import torch
from tiny_harvest import SITES, tiny_spec

import actcache
from actcache.codec import Calibration, Precision, decode, encode
from actcache.errors import SpecError
from actcache.output import decode_on_device

OPTIONS = {"batch_size": 300, "lanes": 8, "seed": 1}
SITE = SITES[0]


def both(dataset, **options):
    """The plain batches, and those with the options."""
    return list(zip(dataset.stream(**OPTIONS), dataset.stream(**OPTIONS, **options), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.bfloat16])
def test_torch_batches_hold_the_rows_in_the_dtype_asked_for(tiny, dtype):
    for plain, batch in both(tiny[0], device="cpu", dtype=dtype):
        for site in SITES:
            name = str(dtype).removeprefix("torch.")
            assert torch.equal(batch[site], torch.from_numpy(plain[site]).to(getattr(torch, name)))
        assert torch.equal(batch.token_id, torch.from_numpy(plain.token_id.astype(np.int64)))
        assert len(batch) == len(plain)


def test_numpy_batches_in_float16(tiny):
    for plain, batch in both(tiny[0], dtype=np.float16):
        assert batch[SITE].dtype == np.float16
        assert np.array_equal(batch[SITE], plain[SITE].astype(np.float16))


@pytest.mark.parametrize("precision", ["fvu:1e-3", "bf16", "fp16", "fp32"])
def test_decoding_on_a_device_gives_the_bits_of_numpy(precision):
    rng = np.random.default_rng(0)
    acts_ND = (rng.standard_normal((257, 24)) * rng.lognormal(0, 2, (257, 1))).astype(np.float32)
    zero_D = rng.standard_normal(24).astype(np.float32)
    calibration = Calibration(zero_D, 0.03, zero_D, 1.0, 257, 257, 1.0)
    parsed = Precision.parse(precision)
    codes_ND, scale_N = encode(acts_ND, calibration, parsed)
    bits_ND = codes_ND.view(np.int16) if precision == "bf16" else codes_ND
    on_device = decode_on_device(
        torch,
        torch.from_numpy(bits_ND),
        None if scale_N is None else torch.from_numpy(scale_N),
        torch.from_numpy(zero_D),
        parsed,
    )
    assert np.array_equal(on_device.numpy(), decode(codes_ND, scale_N, calibration, parsed))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_host(tiny):
    for options in ({}, {"centre": True, "unit_norm": True}, {"dtype": "bfloat16"}):
        ours = tiny[0].stream(**OPTIONS, **options, device="cuda")
        theirs = tiny[0].stream(**OPTIONS, **options, device="cpu")
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(a[site].cpu(), b[site]) for site in SITES)
            assert torch.equal(a.sequence.cpu(), b.sequence)


def test_centred_and_scaled_rows_have_the_moments_that_the_stream_states(tiny):
    dataset = tiny[0]
    mean_D, norm = dataset.stats(SITE)["mean"], dataset.stats(SITE)["mean_norm"]
    for options in ({"centre": True}, {"unit_norm": True}, {"centre": True, "unit_norm": True}):
        stream = dataset.stream(SITE, **OPTIONS, **options)
        acts_ND = np.concatenate([b[SITE] for b in stream]).astype(np.float64)
        stated = stream.stats(SITE)
        tolerance = 1e-5 * norm
        assert np.abs(acts_ND.mean(0) - stated["mean"]).max() < tolerance
        assert np.abs(acts_ND.var(0) - stated["variance"]).max() < 1e-5 * stated["variance"].max()
        norms = np.linalg.norm(acts_ND, axis=1)
        found = norms.mean() if "centre" not in options else np.sqrt(np.square(norms).mean())
        assert found == pytest.approx(stated["mean_norm"], rel=1e-5)
        if "unit_norm" in options:
            assert stated["mean_norm"] == pytest.approx(1, rel=1e-5)
        assert np.abs(acts_ND).max() <= stated["max_abs"] * (1 + 1e-5)
    order = {"lanes": 8, "seed": 1, "batch_size": 300}
    plain = np.concatenate([b[SITE] for b in dataset.stream(SITE, **order)])
    served = np.concatenate([b[SITE] for b in dataset.stream(SITE, **order, centre=True)])
    assert np.array_equal(served, plain - mean_D.astype(np.float32))


def test_held_out_rows_are_moved_as_those_of_train(tiny):
    train, held_out = tiny[0], tiny[0].split("validation")
    mean_D = train.stats(SITE)["mean"].astype(np.float32)
    for plain, batch in both(held_out, centre=True):
        assert np.array_equal(batch[SITE], plain[SITE] - mean_D)


def test_drop_last_leaves_out_the_short_batch_alone(tiny):
    dataset = tiny[0]
    order = {"batch_size": 500, "lanes": 8, "epochs": 2}
    whole = [b for b in dataset.stream(SITE, **order) if len(b) == 500]
    stream = dataset.stream(SITE, **order, drop_last=True)
    states, ours = [], []
    for batch in stream:
        ours.append(batch)
        states.append(stream.state())
    assert len(stream) == len(ours) == len(whole)
    for a, b in zip(ours, whole, strict=True):
        assert np.array_equal(a[SITE], b[SITE])
    for t, state in enumerate(states):
        rest = list(dataset.stream(SITE, **order, drop_last=True, state=state))
        assert len(rest) == len(ours) - t - 1
        assert all(np.array_equal(a[SITE], b[SITE]) for a, b in zip(rest, ours[t + 1 :], strict=True))
    late = {**stream.state(), "epoch": 1, "row": dataset.n_rows - 3}
    assert list(dataset.stream(SITE, **order, drop_last=True, state=late)) == []
    with pytest.raises(SpecError, match="serves nothing"):
        dataset.stream(SITE, batch_size=10**6, drop_last=True)


def test_what_cannot_hold_the_values_is_refused(tiny, tmp_path):
    dataset = tiny[0]
    with pytest.raises(SpecError, match="numpy has no bfloat16"):
        dataset.stream(dtype="bfloat16")
    with pytest.raises(SpecError, match="wanted float32"):
        dataset.stream(dtype="int8")
    with pytest.raises(SpecError, match="wanted float32"):
        dataset.stream(dtype="half-ish")


def test_float16_is_refused_where_it_would_overflow(tmp_path):
    dataset = actcache.harvest(tiny_spec(tmp_path, "gpt2", n_tokens=1000), tmp_path / "root", progress=False)
    dataset.stats(SITE)
    table = dataset._shared.statistics
    column = table.column_names.index("max_abs")
    dataset._shared.__dict__["statistics"] = table.set_column(column, "max_abs", [[7e4] * len(table)])
    with pytest.raises(SpecError, match="float16 holds 65504"):
        dataset.stream(SITE, dtype="float16")
    dataset.stream(SITE, dtype="float16", unit_norm=True, centre=True)
