"""A filter masks rows after the order is fixed: it moves no other row, and resuming holds."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

from actcache.errors import SpecError
from actcache.filters import Where

OPTIONS = {"batch_size": 100, "lanes": 8, "seed": 2}


def places(batch):
    return batch.sequence.astype(np.int64) * 1000 + batch.position


def document_of(dataset, batch):
    """The document of each row, by `ds.documents`, which test_corpus.py holds to the texts."""
    stored = dict(
        zip(places(dataset.rows(slice(None))), dataset.documents(slice(None)).document, strict=True)
    )
    return np.array([stored[place] for place in places(batch)], np.int64)


def kept(dataset, site, batch, condition):
    """Which rows of an unfiltered batch meet a condition, said once more in plain words."""
    name, value = condition
    return {
        "token_ids": lambda: np.array([t in value for t in batch.token_id], bool),
        "not_token_ids": lambda: np.array([t not in value for t in batch.token_id], bool),
        "sequences": lambda: np.array([s in value for s in batch.sequence], bool),
        "not_sequences": lambda: np.array([s not in value for s in batch.sequence], bool),
        "documents": lambda: np.isin(document_of(dataset, batch), list(value)),
        "not_documents": lambda: ~np.isin(document_of(dataset, batch), list(value)),
        "max_norm": lambda: np.linalg.norm(batch[site].astype(np.float64), axis=1) <= value,
    }[name]()


@given(
    conditions=st.dictionaries(
        st.sampled_from(
            ["token_ids", "not_token_ids", "sequences", "not_sequences", "documents", "not_documents"]
        ),
        st.sets(st.integers(0, 90), max_size=60),
        max_size=3,
    ),
    norm_percent=st.sampled_from([None, 0.5, 50, 90]),
    world_size=st.sampled_from([1, 2, 8]),
    resume=st.integers(0, 30),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filtered_batches_are_the_unfiltered_ones_less_the_rows_that_fail(
    tiny, conditions, norm_percent, world_size, resume
):
    dataset, site = tiny[0], SITES[0]
    if norm_percent is not None:
        norms = np.linalg.norm(dataset.read(site, slice(None)).astype(np.float64), axis=1)
        conditions = {**conditions, "max_norm": float(np.percentile(norms, norm_percent))}
    if not conditions:
        return
    where = Where(**conditions)
    whole = list(dataset.stream(site, **OPTIONS))
    resume = min(resume, len(whole) - 1)
    state = {**dataset.stream(site, **OPTIONS, where=where).state(), "row": resume * 100}
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        alone = list(dataset.stream(site, **OPTIONS, **ranks))[resume:]
        ours = list(dataset.stream(site, **OPTIONS, **ranks, where=where, state=state))
        assert len(ours) == len(alone)
        for batch, unfiltered in zip(ours, alone, strict=True):
            mask = np.ones(len(unfiltered), bool)
            for condition in conditions.items():
                mask &= kept(dataset, site, unfiltered, condition)
            assert np.array_equal(places(batch), places(unfiltered)[mask])
            assert np.array_equal(batch[site], unfiltered[site][mask])


def test_a_filter_needs_no_metadata_in_the_batches(tiny):
    dataset = tiny[0]
    tokens = set(dataset.rows(slice(0, 50)).token_id.tolist())
    where = Where(token_ids=tokens)
    ours = list(dataset.stream(SITES[0], **OPTIONS, where=where, metadata=False))
    theirs = list(dataset.stream(SITES[0], **OPTIONS, where=where))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a[SITES[0]], b[SITES[0]])
    with pytest.raises(SpecError, match="metadata=True"):
        _ = ours[0].token_id


def test_norm_conditions_hold_at_every_site(tiny):
    dataset = tiny[0]
    largest = {site: dataset.stats(site)["mean_norm"] for site in SITES}
    for batch in dataset.stream(**OPTIONS, where=Where(max_norm=largest)):
        for site in SITES:
            assert (np.linalg.norm(batch[site], axis=1) <= largest[site] * 1.0001).all()
    one = sum(len(b) for b in dataset.stream(**OPTIONS, where=Where(max_norm={SITES[0]: largest[SITES[0]]})))
    both = sum(len(b) for b in dataset.stream(**OPTIONS, where=Where(max_norm=largest)))
    assert 0 < both < one < dataset.n_rows


def test_a_norm_percentile_comes_from_the_statistics_of_train(tiny):
    dataset, site = tiny[0], SITES[0]
    known = dataset.stats(site).get("norm_percentiles", {})
    for split in (dataset, dataset.split("validation")):
        for percent, norm in known.items():
            ours = split.stream(site, **OPTIONS, where=Where(max_norm_percentile=percent))
            theirs = split.stream(site, **OPTIONS, where=Where(max_norm=norm))
            for a, b in zip(ours, theirs, strict=True):
                assert np.array_equal(places(a), places(b))
    with pytest.raises(SpecError, match="norm percentiles|Use one of them"):
        dataset.stream(site, where=Where(max_norm_percentile=12.5))


def test_the_state_knows_the_filter(tiny):
    dataset = tiny[0]
    where = Where(not_token_ids=[1, 2])
    state = dataset.stream(where=where).state()
    dataset.stream(where=Where(not_token_ids={2, 1}), state=state)
    for other in (None, Where(not_token_ids=[1]), Where(token_ids=[1, 2])):
        with pytest.raises(SpecError, match="where"):
            dataset.stream(where=other, state=state)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "no condition"),
        ({"token_ids": [-1]}, "whole numbers"),
        ({"token_ids": [10**6]}, "whole numbers"),
        ({"sequences": [0.5]}, "whole numbers"),
        ({"max_norm": 0.0}, "above 0"),
        ({"max_norm": {"elsewhere": 1.0}}, "names elsewhere"),
    ],
)
def test_conditions_that_mean_nothing_are_refused(tiny, bad, match):
    with pytest.raises(SpecError, match=match):
        tiny[0].stream(SITES[0], where=Where(**bad))


def test_documents_that_begin_within_sequences_are_told_apart(tiny):
    """A filter of one document serves just its rows, and its complement all others."""
    dataset = tiny[0]
    document_N = dataset.documents(slice(None)).document
    n_documents = len(np.unique(document_N))
    assert n_documents > 20
    for document in np.unique(document_N)[:: n_documents // 10]:
        ours = list(dataset.stream(SITES[0], **OPTIONS, where=Where(documents=[document]), metadata=False))
        assert sum(map(len, ours)) == (document_N == document).sum()
        others = dataset.stream(SITES[0], **OPTIONS, where=Where(not_documents=[document]))
        assert sum(map(len, others)) == (document_N != document).sum()
    with pytest.raises(SpecError, match="documents must be whole numbers"):
        dataset.stream(where=Where(documents=[-1]))
