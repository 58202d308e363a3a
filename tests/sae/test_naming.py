"""Names of SAEs: those that were there before stay, and any two SAEs of a run have two."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from sae.naming import run_names
from sae.options import sae_of_text

TOPK, BATCHTOPK = sae.TopK(d_sae=64, k=6), sae.BatchTopK(d_sae=64, k=6)


def _named(*texts: str) -> list[str]:
    return run_names([sae_of_text(text) for text in texts])


def test_names_say_architecture_width_and_control_of_l0_and_the_site_where_that_is_not_enough() -> None:
    a, b = replace(TOPK, site="blocks.0.x"), replace(TOPK, site="model/layers.1:out")
    assert run_names([a, BATCHTOPK]) == ["topk-64-6", "batchtopk-64-6"]
    assert run_names([a, b]) == ["topk-64-6-blocks.0.x", "topk-64-6-model_layers.1_out"]
    assert _named("standard:d_sae=64,l1_coefficient=0.5", "topk:d_sae=64,k=6,lr=3e-4,seed=7") == [
        "standard-64-0.5",
        "topk-64-6",  # nothing else is called so
    ]


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (("topk:d_sae=64,k=6", "topk:d_sae=64,k=6,lr=3e-4"), ["topk-64-6", "topk-64-6-lr0.0003"]),
        (
            ("topk:d_sae=64,k=6,lr=1e-3,seed=1", "topk:d_sae=64,k=6,lr=1e-3,seed=2"),
            ["topk-64-6-seed1", "topk-64-6-seed2"],
        ),
        (
            ("topk:d_sae=64,k=6,seed=1", "topk:d_sae=64,k=6,lr=1e-3", "topk:d_sae=64,k=6,betas=0.9+0.99"),
            ["topk-64-6-seed1", "topk-64-6-lr0.001", "topk-64-6-betas0.9_0.99"],
        ),
        (
            ("topk:d_sae=64,k=6,revive=none", "topk:d_sae=64,k=6,k_aux=5", "topk:d_sae=64,k=6,revive=ghost"),
            ["topk-64-6-revive_none", "topk-64-6-k_aux5", "topk-64-6-revive_ghost"],
        ),
        (
            ("jumprelu:d_sae=64,target_l0=8", "jumprelu:d_sae=64,l0_coefficient=8"),
            ["jumprelu-64-8-target_l0_8", "jumprelu-64-8-l0_coefficient8"],
        ),
        (
            ("topk:d_sae=2000000,k=1000001", "topk:d_sae=2000000,k=1000002"),
            ["topk-2000000-1e+06-k1000001", "topk-2000000-1e+06-k1000002"],
        ),
    ],
)
def test_saes_that_share_the_rest_say_what_differs(texts: tuple[str, ...], names: list[str]) -> None:
    assert _named(*texts) == names
    assert _named(*reversed(texts)) == names[::-1]


def test_a_difference_is_said_where_it_is_and_the_site_last() -> None:
    a, b = replace(TOPK, site="a"), replace(TOPK, site="b")
    other = replace(a, optimiser=sae.Optimiser(seed=-1))
    assert run_names([a, b, other]) == ["topk-64-6-a", "topk-64-6-b", "topk-64-6-seed-1-a"]


def test_one_sae_twice_is_refused_however_it_is_written() -> None:
    with pytest.raises(
        ValueError, match=r"the SAE topk-64-6 is listed twice; leave one out, or give them seeds"
    ):
        run_names([TOPK, BATCHTOPK, replace(TOPK)])
    stream = sae.ArrayStream(np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32))
    same = replace(TOPK, optimiser=sae.Optimiser(seed=3, lr=1e-3))
    with pytest.raises(ValueError, match=r"the SAEs topk-64-6 and topk-64-6-lr0\.001-seed3 are the same"):
        sae.train(stream, [TOPK, same], sae.Training(n_rows=100, seed=3, lr=1e-3))


@st.composite
def _configs(draw: st.DrawFn) -> sae.TopK:
    optimiser = sae.Optimiser(
        lr=draw(st.none() | st.floats(1e-6, 1.0)),
        seed=draw(st.none() | st.integers(-5, 40)),
        betas=draw(st.none() | st.just((0.0, 0.99))),
        lr_warmup_rows=draw(st.none() | st.integers(0, 3)),
    )
    revive = draw(st.sampled_from([sae.AuxK(), None, sae.AuxK(k_aux=3), sae.Resampling(every_rows=9)]))
    site = draw(st.sampled_from(["a/b", "a:b", "a_b"]))
    return sae.TopK(d_sae=9, k=draw(st.integers(1, 2)), site=site, revive=revive, optimiser=optimiser)


@given(st.lists(_configs(), min_size=2, max_size=6, unique=True))
def test_any_saes_that_differ_have_names_that_differ_and_are_safe(configs: list[sae.TopK]) -> None:
    names = run_names(configs)
    assert len(set(names)) == len(configs)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]+", name) for name in names)


def test_seeds_of_their_own_decide_weights_and_the_runs_seed_those_of_the_others() -> None:
    acts = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    own = sae.TopK(d_sae=12, k=2, optimiser=sae.Optimiser(seed=5))
    plain = replace(own, optimiser=sae.Optimiser())

    def trained(configs: list[sae.TopK], seed: int) -> list[str]:
        training = sae.Training(n_rows=400, seed=seed)
        return [s.digest() for s in sae.train(sae.ArrayStream(acts, batch_size=100), configs, training)]

    together = trained([plain, own], 1)
    assert together == [*trained([plain], 1), *trained([plain], 5)]
    assert together[1] == trained([own], 8)[0]
