"""Packing without loss, document places against brute force, and a shuffle that fits in no memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache import packing
from actcache.packing import Packer, Spill, document_places, position_ids

BOS, EOS = 1, 2
DOCUMENTS = st.lists(st.integers(1, 40), max_size=40)
PACKINGS = ("concat", "isolated", "single")


def identity(kind, context_size, bos=BOS):
    return {
        "packing": kind,
        "context_size": context_size,
        "bos_token_id": bos,
        "eos_token_id": EOS,
        "vocab_size": 70_000,
    }


def pack(kind, context_size, bos, lengths, takes=()):
    """Documents of running ids from 10, packed with calls of `take` between; (documents, records, packer)."""
    packer = Packer(identity(kind, context_size, bos))
    at, documents, parts = 10, [], []
    for i, n in enumerate(lengths):
        documents.append(np.arange(at, at + n))
        at += n
        packer.add(documents[-1])
        if i in takes:
            parts.append(packer.take())
    parts.append(packer.take(last=True))
    return documents, np.concatenate(parts), packer


def begins(records_S, context_size):
    return np.unpackbits(records_S["document_begins"], axis=1, count=context_size)


@given(st.sampled_from(PACKINGS), DOCUMENTS, st.integers(2, 17), st.booleans(), st.sets(st.integers(0, 40)))
@settings(max_examples=300, deadline=None)
def test_every_token_lies_where_the_record_says(kind, lengths, context_size, with_bos, takes):
    documents, records_S, packer = pack(kind, context_size, BOS if with_bos else None, lengths, takes)
    begins_ST = begins(records_S, context_size)
    inside_ST = np.arange(context_size) < records_S["length"][:, None]
    own_ST = inside_ST & (records_S["input_ids"] >= 10)
    sequence_N, position_N = np.nonzero(own_ST)
    by_sequence = records_S["document"], records_S["document_offset"], begins_ST
    document_N, offset_N = document_places(
        sequence_N, position_N, *by_sequence, identity(kind, context_size, BOS if with_bos else None)
    )
    found = [documents[d][o] for d, o in zip(document_N, offset_N, strict=True)]
    assert found == records_S["input_ids"][own_ST].tolist()
    everything = np.concatenate([[], *documents]).astype(int).tolist()
    width = context_size - with_bos
    if kind == "single":
        everything = [i for d in documents for i in d[:width].tolist()]
        assert packer.n_tokens_cut == sum(max(0, len(d) - width) for d in documents)
    assert sorted(found) == everything
    assert packer.n_tokens == len(found)
    assert packer.n_documents == len(documents)
    assert (records_S["input_ids"][~inside_ST] == EOS).all()
    heads = records_S["input_ids"] == BOS
    if kind == "concat":
        assert (heads.sum(axis=1) == with_bos).all()
        assert (records_S["length"][:-1] == context_size).all()
    else:  # one before each document or piece
        assert np.array_equal(heads.sum(axis=1), (begins_ST.sum(axis=1) + 1) * with_bos)
    if kind == "single":
        assert not begins_ST.any()
    if kind == "isolated":  # a document that fits is never cut
        sequences = {}
        for d, s in zip(document_N, sequence_N, strict=True):
            sequences.setdefault(int(d), set()).add(int(s))
        assert all(len(sequences[i]) == -(-len(d) // width) for i, d in enumerate(documents))


@given(st.sampled_from(PACKINGS), DOCUMENTS, st.integers(2, 17), st.sets(st.integers(0, 40)))
@settings(max_examples=100, deadline=None)
def test_when_records_are_taken_changes_none_of_them(kind, lengths, context_size, takes):
    assert np.array_equal(
        pack(kind, context_size, BOS, lengths, takes)[1], pack(kind, context_size, BOS, lengths)[1]
    )


def test_isolated_positions_start_again_at_each_document():
    _, records_S, _ = pack("isolated", 10, BOS, [3, 4, 2])
    assert records_S["input_ids"].tolist() == [[1, 10, 11, 12, 1, 13, 14, 15, 16, 2], [1, 17, 18] + [2] * 7]
    assert position_ids(begins(records_S, 10))[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert records_S["length"].tolist() == [9, 3]


@given(st.integers(0, 500), st.integers(1, 9), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_spill_serves_any_order_whatever_fits_in_memory(n, shard_rows, bucket_records, random):
    import tempfile
    from pathlib import Path

    dtype = np.dtype([("a", "<i8"), ("b", "u1", (3,))])
    records_S = np.zeros(n, dtype)
    records_S["a"] = np.arange(n)
    order = list(range(n))
    random.shuffle(order)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BUCKET_BYTES", bucket_records * 11 * shard_rows)
        spill = Spill(Path(directory, "x"), dtype)
        for start in range(0, n, 70):
            spill.append(records_S[start : start + 70])
        shards = list(spill.shuffled(np.array(order, np.int64), shard_rows)) if n else []
        assert list(Path(directory).iterdir()) == []
    assert [len(s) for s in shards] == [min(shard_rows, n - i) for i in range(0, n, shard_rows)]
    assert [int(r["a"]) for s in shards for r in s] == order
