"""The pass that finds snippets gives what brute force over all activations gives."""

from collections import Counter

import numpy as np
import pytest
import torch
from toy_dataset import RandomTopK, tiny_lm, toy_dataset

from sae import SAE, snippets
from sae.codes import encode_sparse
from sae.select import Scratch
from sae.snippets import AFTER, BEFORE, BINS, NEAR, SAMPLED, TOP, WIDTH, collect

D, F = 24, 40
SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def view():
    return toy_dataset(tiny_lm(), n_sequences=60, n_tokens=32).split("validation")


@pytest.fixture(scope="module")
def s():
    return RandomTopK(D, F, 4)


@pytest.fixture(scope="module")
def dense(view, s):
    """{latent: [(sequence, position, value), ...]} and the activations by (sequence, position)."""
    acts = torch.from_numpy(view.read(SITE, slice(None)).copy())
    latents_NF = s.encode(acts).numpy()
    rows = view.rows(slice(None))
    at = {
        (int(q), int(p)): latents_NF[n]
        for n, (q, p) in enumerate(zip(rows.sequence, rows.position, strict=True))
    }
    fired = {
        f: [
            (int(rows.sequence[n]), int(rows.position[n]), latents_NF[n, f])
            for n in np.flatnonzero(latents_NF[:, f])
        ]
        for f in range(F)
    }
    return fired, at


@pytest.fixture(scope="module")
def found(view, s):
    return collect(s, view, view.n_rows)


def snippets_of(found, i):
    rows = range(found.starts[i], found.starts[i + 1])
    return [(int(found.sequence[r]), int(found.position[r]), found.value[r]) for r in rows]


def test_sums_and_histograms_are_those_of_all_activations(found, dense):
    fired, _ = dense
    assert found.latents.tolist() == list(range(F))
    for f, places in fired.items():
        values = np.array([v for *_, v in places], np.float32)
        assert found.fires[f] == len(values)
        if not len(values):
            assert found.largest[f] == 0
            continue
        assert found.largest[f] == values.max()
        assert found.sums[f] == pytest.approx(values.sum(dtype=np.float64))
        bins = Counter(min(int(v / values.max() * BINS), BINS - 1) for v in values)
        assert found.histogram[f].tolist() == [bins[b] for b in range(BINS)]


def test_the_strongest_places_come_first_and_near_ones_once(found, dense):
    fired, _ = dense
    met = 0
    for f, places in fired.items():
        wanted = []
        for q, p, v in sorted(places, key=lambda place: (-place[2], place[0], place[1]))[: 3 * TOP]:
            if len(wanted) < TOP and not any(q == r and abs(p - t) < NEAR for r, t, _ in wanted):
                wanted.append((q, p, v))
        n = int(found.n_top[f])
        assert snippets_of(found, f)[:n] == wanted
        met += len(wanted) == TOP
    assert met > 5, "some latents have more places than are shown"


def test_the_sample_is_of_the_rest_and_ordered_by_strength(found, dense):
    fired, _ = dense
    for f, places in fired.items():
        shown = snippets_of(found, f)
        n = int(found.n_top[f])
        sample = shown[n:]
        assert set(shown) <= set(places)
        assert len(set(shown)) == len(shown) <= TOP + SAMPLED
        assert [v for *_, v in sample] == sorted((v for *_, v in sample), reverse=True)
        if len(places) > 5 * (TOP + SAMPLED):
            assert len(sample) == SAMPLED


def test_the_sample_has_the_quantiles_of_a_uniform_draw():
    """Values 1..n at random places: eight at even ranks of 32 drawn lie near the eight octiles' middles."""
    rng = np.random.default_rng(0)
    n, n_latents = 4000, 200
    kept = snippets._Kept(n_latents, 32)
    latent = np.repeat(np.arange(n_latents, dtype=np.int32), n)
    place = np.concatenate([rng.permutation(n) for _ in range(n_latents)])
    value = np.tile(np.arange(1, n + 1, dtype=np.float32), n_latents)
    order = rng.permutation(len(latent))
    for part in np.array_split(order, 7):
        kept.add(latent[part], snippets._random(latent[part], place[part]), place[part], value[part])
    kept.settle()
    assert np.bincount(kept.latent).tolist() == [32] * n_latents
    values = kept.value.reshape(n_latents, 32) / n
    # the mean of 6,400 uniform draws: standard error 0.0036
    assert values.mean() == pytest.approx(0.5, abs=5 * 0.0036)
    assert np.sort(values, 1).mean(0) == pytest.approx((np.arange(32) + 1) / 33, abs=0.035)


def test_what_stands_around_a_place_is_that_latents_activations(found, dense, view):
    _, at = dense
    cut = 0
    for f in range(F):
        for row in range(found.starts[f], found.starts[f + 1]):
            q, p = int(found.sequence[row]), int(found.position[row])
            ids = view.context(q)
            for column in range(WIDTH):
                t = p + column - BEFORE
                if not 0 <= t < len(ids):
                    assert found.token_ids[row, column] == -1
                    assert found.values[row, column] == 0
                    cut += 1
                else:
                    assert found.token_ids[row, column] == ids[t]
                    wanted = at[q, t][f] if (q, t) in at else 0
                    assert found.values[row, column] == wanted
            assert found.values[row, BEFORE] == found.value[row]
    assert cut, "some snippets reach over the end of a sequence"
    assert WIDTH == BEFORE + 1 + AFTER <= 32
    assert TOP + SAMPLED <= 20


@pytest.mark.parametrize("part_codes", [40, 1000])
def test_neither_chunks_nor_parts_change_anything(part_codes, found, view, s, monkeypatch, tmp_path):
    monkeypatch.setattr(snippets, "_CHUNK_ROWS", 37)
    monkeypatch.setattr(snippets, "_PART_CODES", part_codes)
    monkeypatch.setattr(snippets, "_FLUSH_CODES", 300)
    monkeypatch.setattr(snippets, "_PENDING", 100)
    again = collect(s, view, view.n_rows, directory=tmp_path)
    for name, value in vars(found).items():
        if name == "sums":  # float64, added in another order
            np.testing.assert_allclose(again.sums, value, rtol=1e-12)
        else:
            np.testing.assert_array_equal(getattr(again, name), value)
    assert list(tmp_path.iterdir()) == []


def test_some_latents_are_the_same_as_among_all(found, view, s):
    some = collect(s, view, view.n_rows, [17, 3])
    assert some.latents.tolist() == [3, 17]
    for i, f in enumerate([3, 17]):
        assert snippets_of(some, i) == snippets_of(found, f)
        np.testing.assert_array_equal(some.histogram[i], found.histogram[f])


def test_an_sae_that_never_fires_has_no_snippets(view):
    class Silent(RandomTopK):
        def encode(self, acts):
            return super().encode(acts) * 0

    found = collect(Silent(D, F), view, view.n_rows)
    assert found.fires.sum() == 0
    assert found.token_ids.shape == (0, WIDTH)
    assert found.starts.tolist() == [0] * (F + 1)


@pytest.mark.parametrize("architecture", ["topk", "standard", "gated", "jumprelu", "batchtopk", "matryoshka"])
def test_sparse_encoding_is_the_sae_s_own(architecture):
    g = torch.Generator().manual_seed(1)
    W = torch.randn(D, F, generator=g)
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "k": 5, "site": SITE}
    extra = {}
    if architecture == "gated":
        extra = {"b_gate": torch.randn(F, generator=g), "r_mag": torch.randn(F, generator=g) / 9}
    elif architecture in ("jumprelu", "batchtopk", "matryoshka"):
        extra = {"threshold": torch.rand(F, generator=g) * 4}
    s = SAE(cfg, W, torch.randn(F, generator=g), W.T.contiguous(), torch.randn(D, generator=g), **extra)
    acts = torch.randn(50, D, generator=g)
    dense = s.encode(acts)
    if architecture in ("jumprelu", "batchtopk"):  # a value exactly at the threshold, where they differ
        row, latent = (dense > 0).nonzero()[0].tolist()
        s.threshold[latent] = dense[row, latent]
        dense = s.encode(acts)
        assert (dense[row, latent] > 0) == (architecture == "batchtopk")
    found = encode_sparse(s, acts, Scratch())
    again = torch.zeros(50, F)
    again[found.rows, found.columns] = torch.from_numpy(found.values)
    assert torch.equal(again, dense)
