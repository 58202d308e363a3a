"""Corpora of every format, packing without loss, and splits that content alone decides."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_harvest import write_corpus
from tiny_models import tiny_tokenizer

from actcache.corpus import (
    Skipped,
    documents,
    kept_tokens,
    open_tokens,
    pack_concat,
    resolve_corpus,
    split_of,
    tokenise,
)
from actcache.errors import CorpusError, SpecError
from actcache.spec import Corpus, Spec
from actcache.store import open_store

TEXTS = ["one document", "another\nwith lines", "ünïcode ☃"]


def read(source, **options):
    skipped = Skipped()
    return list(documents(resolve_corpus(Corpus(str(source), **options)), skipped)), skipped.counts


def test_text_files_jsonl_and_parquet_give_the_same_documents(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    assert read(tmp_path / "*.txt")[0] == TEXTS
    assert read(tmp_path / "d.jsonl")[0] == TEXTS
    assert read(tmp_path / "d.parquet")[0] == TEXTS


def test_what_cannot_be_read_is_counted_not_hidden(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"not json",
        b'{"other": 1}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b"\xff\xfe",
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    texts, skipped = read(tmp_path / "d.jsonl")
    assert texts == ["good"]
    assert sum(skipped.values()) == 5
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert read(tmp_path / "*.txt") == ([], {"not valid UTF-8 or JSON, or without the text field": 1})


def test_the_identity_of_a_corpus_is_its_content_not_its_place(tmp_path):
    first, second = write_corpus(tmp_path / "a", 5), write_corpus(tmp_path / "b", 5)
    assert resolve_corpus(Corpus(first)).identity() == resolve_corpus(Corpus(second)).identity()
    (tmp_path / "b" / "0000.txt").write_text("changed")
    assert resolve_corpus(Corpus(first)).revision != resolve_corpus(Corpus(second)).revision


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing/*.txt", {}, "no file matches"),
        ("bundled:other", {}, "not bundled"),
        ("nonsense://x/y", {}, "cannot open"),
    ],
)
def test_a_corpus_that_is_not_there_is_one_clear_error(source, options, message):
    with pytest.raises(CorpusError, match=message):
        read(source, **options)


def test_a_missing_parquet_column_is_named(tmp_path):
    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match="no column 'text'; it has content"):
        read(tmp_path / "d.parquet")


def test_files_of_two_formats_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    with pytest.raises(CorpusError, match="formats jsonl, text"):
        read(tmp_path / "*.*")


def test_splits_follow_the_content_and_the_shares():
    splits = [split_of(f"document {i}", 0.2, 0.1) for i in range(5000)]
    assert abs(splits.count("validation") / 5000 - 0.2) < 0.03  # five standard errors
    assert abs(splits.count("test") / 5000 - 0.1) < 0.03
    assert split_of("document 1", 0.2, 0.1) == splits[1]


@given(st.lists(st.integers(5, 90), max_size=100), st.integers(2, 17), st.booleans())
@settings(max_examples=80, deadline=None)
def test_packing_loses_no_token_and_adds_none(tokens, context_size, with_bos):
    bos = 1 if with_bos else None
    input_ids, length = pack_concat(np.array(tokens, np.uint16), context_size, bos, 2)
    begin = 1 if with_bos else 0
    inside = [row[begin:n].tolist() for row, n in zip(input_ids, length, strict=True)]
    assert [t for row in inside for t in row] == tokens
    assert all(n == context_size for n in length[:-1])
    if with_bos and len(input_ids):
        assert (input_ids[:, 0] == 1).all()


def test_padding_is_known_by_length_and_special_tokens_are_never_rows():
    input_ids = np.array([[1, 5, 2, 6], [1, 7, 8, 8]])
    kept = kept_tokens(input_ids, np.array([4, 3]), [1, 2])
    assert kept.tolist() == [[False, True, False, True], [False, True, True, False]]


@pytest.fixture
def spec(tmp_path):
    source = write_corpus(tmp_path / "corpus")
    corpus = Corpus(source, validation_share=0.1, test_share=0.1)
    return Spec(model="unused", corpus=corpus, sites=["x"], context_size=16, n_tokens=100)


def make_tokens(spec, root):
    return tokenise(
        spec, resolve_corpus(spec.corpus), tiny_tokenizer(), open_store(str(root)), progress=False
    )


def test_token_store_holds_every_token_of_every_document_once(spec, tmp_path):
    tokens = make_tokens(spec, tmp_path / "root")
    tokenizer = tiny_tokenizer()
    expected = {"train": [], "validation": [], "test": []}
    for text in documents(resolve_corpus(spec.corpus), Skipped()):
        expected[split_of(text, 0.1, 0.1)] += [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    for split, ids in expected.items():
        n = tokens.n_sequences(split)
        input_ids, length = tokens.sequences(split, 0, n)
        found = np.concatenate([row[1:k] for row, k in zip(input_ids, length, strict=True)])
        assert sorted(found.tolist()) == sorted(ids)
        assert (input_ids[:, 0] == 1).all()
        kept = kept_tokens(input_ids, length, [0, 1, 2]).sum(axis=1)
        assert np.array_equal(tokens.row_start(split), np.concatenate([[0], np.cumsum(kept)]))
        assert tokens.n_rows(split) == kept.sum()


def test_token_store_is_built_once_and_shuffled_by_the_seed(spec, tmp_path):
    from dataclasses import replace

    first = make_tokens(spec, tmp_path / "root")
    again = make_tokens(spec, tmp_path / "root")
    assert again.store.url == first.store.url
    assert open_tokens(first.store).manifest == again.manifest
    other = make_tokens(replace(spec, seed=1), tmp_path / "root")
    a, b = (t.sequences("train", 0, t.n_sequences("train"))[0] for t in (first, other))
    assert not np.array_equal(a, b)
    assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))


def test_zarr_reads_the_token_store(spec, tmp_path):
    import zarr

    tokens = make_tokens(spec, tmp_path / "root")
    group = zarr.open_group(tokens.store.url, mode="r")
    input_ids, length = tokens.sequences("train", 0, tokens.n_sequences("train"))
    assert np.array_equal(group["train/input_ids"][:], input_ids)
    assert np.array_equal(group["train/length"][:], length)


def test_max_tokens_bounds_the_universe(spec, tmp_path):
    from dataclasses import replace

    bounded = replace(spec, corpus=replace(spec.corpus, max_tokens=1000))
    tokens = make_tokens(bounded, tmp_path / "root")
    total = 0
    for split in ("train", "validation", "test"):
        _, length = tokens.sequences(split, 0, tokens.n_sequences(split))
        total += int((length - 1).sum())
    assert 1000 <= total < 1000 + 600  # the last document is taken whole


def test_a_corpus_without_text_or_rows_is_one_clear_error(spec, tmp_path):
    from dataclasses import replace

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("  \n")
    empty = replace(spec, corpus=Corpus(str(tmp_path / "empty" / "*.txt")))
    with pytest.raises(CorpusError, match="holds no text"):
        make_tokens(empty, tmp_path / "root")
    held_out = replace(spec, corpus=replace(spec.corpus, validation_share=0.999, test_share=0.0))
    with pytest.raises(CorpusError, match="keeps no row"):
        make_tokens(held_out, tmp_path / "root")


def test_prepend_bos_needs_a_bos_and_packing_needs_an_eos(spec, tmp_path):
    from dataclasses import replace

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    resolved = resolve_corpus(spec.corpus)
    root = open_store(str(tmp_path / "root"))
    with pytest.raises(SpecError, match="no BOS"):
        tokenise(replace(spec, prepend_bos=True), resolved, tokenizer, root, progress=False)
    assert tokenise(spec, resolved, tokenizer, root, progress=False).identity["bos_token_id"] is None
    tokenizer.eos_token = None
    with pytest.raises(SpecError, match="no EOS"):
        tokenise(spec, resolved, tokenizer, root, progress=False)
