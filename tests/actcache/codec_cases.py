"""Rows that codecs are tried on, and the float64 reference of their statistics: on the CPU and on the device."""

import numpy as np
import pytest

WORST = (
    "huge channel", "huge row", "huge row in the calibration", "constant channel", "constant site",
    "constant, then not", "loud channels", "zeros", "denormals", "denormal channel", "small", "large", "all sizes", "two values",
    "one row",
)  # fmt: skip


def rows_of(n, d, seed=0, sinks=0.0, sink_norm=100.0):
    rng = np.random.default_rng(seed)
    acts = (rng.normal(size=(n, d)) * rng.uniform(0.5, 2, d) + rng.normal(size=d)).astype(np.float32)
    is_sink = rng.random(n) < sinks
    acts[is_sink] *= sink_norm
    return acts, is_sink


def worst_case(name, n=3000, d=24):
    """Rows that break codecs; the first half of them calibrates."""
    rng = np.random.default_rng(7)
    acts = rng.normal(size=(n, d)) * rng.uniform(0.5, 2, d) + rng.normal(size=d)
    if name == "huge channel":
        acts[:, 5] *= 1e6
    elif name == "huge row":
        acts[n // 2 + 10] *= 1e9
    elif name == "huge row in the calibration":
        acts[10] *= 1e9
    elif name == "constant channel":
        acts[:, 5] = 1 / 3
    elif name == "constant site":
        acts[:] = 3.7
    elif name == "constant, then not":
        acts[: n // 2] = 3.7
    elif name == "loud channels":
        acts[:, [3, 9]] *= [[40, -500]]
        acts[::50] *= 20
    elif name == "zeros":
        acts[:] = 0
    elif name == "denormals":
        acts *= 1e-41
    elif name == "denormal channel":
        acts[:, 5] *= 1e-41
    elif name == "small":
        acts *= 1e-20
    elif name == "large":
        acts *= 1e30
    elif name == "all sizes":
        acts *= np.exp(rng.normal(size=d) * 5)
    elif name == "two values":
        acts = np.sign(acts)
    elif name == "one row":
        acts = acts[:1]
    return acts.astype(np.float32)


def assert_is_the_reference(found, acts, stored, calibration):
    """Within 1e-6 of the one-pass float64 figures: relative, means relative to the channel's size."""
    core = ((acts.astype(np.float64) - calibration.median_D) ** 2).sum(1) <= calibration.radius2
    exact, error = stored.astype(np.float64), stored.astype(np.float64) - acts
    assert found.n_rows == len(acts)
    assert found.n_core == core.sum()
    for mean, m2, part in (
        (found.mean_D, found.m2_D, exact),
        (found.core_mean_D, found.core_m2_D, exact[core]),
    ):
        size = np.abs(part).max(axis=0)
        assert (np.abs(mean - part.mean(axis=0)) <= 1e-6 * size).all()
        noise = 1e-6 * len(part) * (size * 2.0**-24) ** 2  # the centre is a float32 number
        assert (np.abs(m2 - ((part - part.mean(axis=0)) ** 2).sum(axis=0)) <= 1e-6 * m2 + noise).all()
    assert found.norm_sum == pytest.approx(np.linalg.norm(exact, axis=1).sum(), rel=1e-6)
    # the difference of two float32 numbers is rounded to 2^-24 of itself
    assert found.sse == pytest.approx((error**2).sum(), rel=1e-6)
    assert found.core_sse == pytest.approx((error[core] ** 2).sum(), rel=1e-6)
    by_channel = (error[core] ** 2).sum(axis=0)
    assert found.core_sse_D == pytest.approx(by_channel, rel=1e-6, abs=1e-6 * by_channel.max(initial=0))
    assert found.max_abs == np.abs(stored).max()
    assert found.max_error == pytest.approx(np.abs(error).max(), rel=1e-6)
