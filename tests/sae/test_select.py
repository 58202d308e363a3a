"""Selection against the plain definition: largest values first, ties to the lowest column and row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.encoder import exact_values, pre_activations
from sae.select import Entries, Scratch, largest_in_batch, largest_per_row

SHAPES = st.tuples(
    st.integers(1, 9), st.integers(1, 130), st.integers(1, 40), st.integers(0, 2**31), st.booleans()
)


def _values(n: int, f: int, seed: int, coarse: bool) -> torch.Tensor:
    """Coarse values have many ties."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (n, f)) if coarse else rng.standard_normal((n, f))
    return torch.from_numpy(x.astype(np.float32))


def _triples(entries: Entries) -> list[tuple[int, int, float]]:
    return list(zip(entries.rows.tolist(), entries.columns.tolist(), entries.values.tolist(), strict=True))


@given(SHAPES)
@settings(max_examples=150, deadline=None)
def test_largest_per_row_is_a_stable_sort_of_each_row(case: tuple[int, int, int, int, bool]) -> None:
    n, f, k, seed, coarse = case
    k = min(k, f)
    x = _values(n, f, seed, coarse)
    entries = largest_per_row(x, k, Scratch())
    wanted = []
    for row, values in enumerate(x.numpy()):
        best = np.sort(np.argsort(-values, kind="stable")[:k])
        wanted += [(row, int(c), float(values[c])) for c in best]
    assert _triples(entries) == wanted
    assert entries.row_starts.tolist() == list(range(0, n * k + 1, k))


@given(SHAPES, st.floats(-1, 5))
@settings(max_examples=150, deadline=None)
def test_largest_in_batch_is_a_stable_sort_of_the_positive_values_whatever_the_guess(
    case: tuple[int, int, int, int, bool], guess: float
) -> None:
    n, f, k, seed, coarse = case
    x = _values(n, f, seed, coarse)
    m = min(k, f) * n
    flat = x.numpy().reshape(-1)
    best = np.sort(np.argsort(-flat, kind="stable")[:m])
    wanted = [(int(i) // f, int(i) % f, float(flat[i])) for i in best if flat[i] > 0]
    scratch = Scratch(guess=guess)
    for _ in range(2):  # the second time with the guess that the first one left
        entries = largest_in_batch(x, m, scratch)
        assert _triples(entries) == wanted
    assert np.array_equal(np.repeat(np.arange(n), np.diff(entries.row_starts)), entries.rows)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_positive_and_by_column_keep_every_entry_in_its_place(case: tuple[int, int, int, int, bool]) -> None:
    n, f, k, seed, coarse = case
    entries = largest_per_row(_values(n, f, seed, coarse), min(k, f), Scratch())
    kept = entries.positive()
    assert _triples(kept) == [t for t in _triples(entries) if t[2] > 0]
    order, starts = kept.by_column
    for column in range(f):
        own = order[starts[column] : starts[column + 1]]
        assert (kept.columns[own] == column).all()
        assert (np.diff(kept.rows[own]) > 0).all()
    assert starts[-1] == len(kept.values) == len(order)


def test_more_columns_than_sixteen_bits_are_grouped_rightly() -> None:
    x = torch.zeros(2, 70_000)
    x[0, 66_000], x[1, 464], x[1, 66_000] = 3.0, 2.0, 1.0  # 66,000 = 464 modulo 2^16
    order, starts = largest_per_row(x, 2, Scratch()).positive().by_column
    assert starts[465] - starts[464] == 1
    assert starts[66_001] - starts[66_000] == 2
    assert len(order) == 3


def test_nan_is_kept_so_that_the_loss_shows_it() -> None:
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    x[2] = torch.nan
    entries = largest_per_row(x, 3, Scratch())
    assert np.isnan(entries.values[entries.rows == 2]).all()
    assert len(entries.values) == 12


@pytest.mark.parametrize("n", [7, 3])
def test_scratch_serves_a_shorter_batch_from_the_same_memory(n: int) -> None:
    scratch = Scratch()
    first = scratch.get("a", (7, 5), torch.float32)
    again = scratch.get("a", (n, 5), torch.float32)
    assert again.shape == (n, 5)
    assert again.data_ptr() == first.data_ptr()
    assert again.is_contiguous()


def test_candidates_by_bfloat16_ranked_exactly_give_the_rows_that_float32_gives() -> None:
    """Rounding alone reorders the k-th; eight more candidates and their true values mend it."""
    g = torch.Generator().manual_seed(0)
    x_ND, b_F = torch.randn(256, 48, generator=g), torch.randn(1536, generator=g) / 10
    W_FD = torch.randn(1536, 48, generator=g) / 7
    p = {"W_enc_FD": W_FD, "b_enc_F": b_F}
    scratch = Scratch()
    wanted = largest_per_row(torch.addmm(b_F, x_ND, W_FD.T), 16, Scratch())
    rounded_NF = pre_activations(x_ND, p, "bfloat16", scratch)
    assert rounded_NF.dtype == torch.bfloat16
    found = largest_per_row(rounded_NF, 16, scratch, exact_values(x_ND, p))
    assert np.array_equal(found.columns, wanted.columns)
    assert np.abs(found.values - wanted.values).max() < 1e-5
    by_rounded = largest_per_row(rounded_NF.float(), 16, Scratch())
    assert not np.array_equal(by_rounded.columns, wanted.columns)


def test_nan_survives_bfloat16_selection() -> None:
    x_ND = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    x_ND[3, 0] = torch.nan
    p = {"W_enc_FD": torch.randn(200, 12), "b_enc_F": torch.zeros(200)}
    rounded_NF = pre_activations(x_ND, p, "bfloat16", Scratch())
    entries = largest_per_row(rounded_NF, 4, Scratch(), exact_values(x_ND, p))
    assert np.isnan(entries.values[entries.rows == 3]).all()
    assert len(entries.values) == 32


def test_bfloat16_selection_is_for_topk_alone() -> None:
    training = sae.Training(n_rows=10, selection="bfloat16")
    assert training.rules(sae.TopK(d_sae=8, k=2)).selection == "bfloat16"
    with pytest.raises(ValueError, match="topk alone, but an SAE is batchtopk"):
        training.rules(sae.BatchTopK(d_sae=8, k=2))
