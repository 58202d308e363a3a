"""Documents of every kind of file: the same texts from each, and what cannot be read counted or named."""

import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_as
from pyarrow.feather import write_feather
from tiny_harvest import write_corpus

from actcache.errors import CorpusError, SpecError
from actcache.sources import Skipped, documents, resolve_corpus
from actcache.spec import Corpus

TEXTS = ["one document", "another\nwith lines", "ünïcode ☃"]


def read(source, **options):
    skipped = Skipped()
    resolved = resolve_corpus(Corpus(str(source), **options))
    return [d.content for d in documents(resolved, skipped)], skipped.counts


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
    assert skipped == {
        "not JSON": 1,
        "without the field": 1,
        "empty": 1,
        "not valid Unicode (lone surrogates)": 1,
        "not valid UTF-8": 1,
    }
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert read(tmp_path / "*.txt") == ([], {"not valid UTF-8": 1})


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


IDS = [[5, 6, 7], [8], [9, 10]]
CHATS = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(3)]


ROWS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "feather", "saved"]


@pytest.mark.parametrize("kind", ["text", *ROWS])
def test_every_kind_of_file_gives_the_same_texts_and_says_where_they_are(tmp_path, kind):
    resolved = resolve_corpus(Corpus(write_as(tmp_path / "c", kind, "text", TEXTS)))
    found = list(documents(resolved, Skipped(strict=True)))
    assert [d.content for d in found] == TEXTS
    places = {"text": [(0, 0), (1, 0), (2, 0)], "saved": [(0, 0), (0, 1), (1, 0)]}
    assert [(d.file, d.record) for d in found] == places.get(kind, [(0, 0), (0, 1), (0, 2)])
    assert all("/" not in name for name in resolved.names)


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_file_gives_the_same_tokens_and_chats(tmp_path, kind):
    found, _ = read(write_as(tmp_path / "ids", kind, "ids", IDS), token_field="ids")
    assert [ids.tolist() for ids in found] == IDS
    found, _ = read(write_as(tmp_path / "chats", kind, "messages", CHATS), chat_field="messages")
    assert found == CHATS


@pytest.mark.parametrize("kind", ["text", *ROWS])
def test_a_remote_corpus_is_read_as_a_local_one(tmp_path, kind):
    source = write_as(tmp_path / "c", kind, "text", TEXTS)
    fs = fsspec.filesystem("memory")
    folder = f"/corpus-{kind}"
    for path in (tmp_path / "c").iterdir():
        fs.pipe_file(f"{folder}/{path.name}", path.read_bytes())
    assert read(f"memory:/{source.replace(str(tmp_path / 'c'), folder)}")[0] == TEXTS
    if kind != "saved":
        assert read(f"memory:/{folder}")[0] == TEXTS
    fs.rm(folder, recursive=True)


LINES = [
    (b'{"text": "good"}', None),
    (b"not json", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"other": 1}', "without the field"),
    (b'{"text": null}', "without the field"),
    (b'{"text": 3}', "of type int, not text"),
    (b'{"text": " "}', "empty"),
    (b"", "empty"),
    (b'{"text": "\\ud800"}', "not valid Unicode (lone surrogates)"),
    (b'{"text": "\xff"}', "not valid UTF-8"),
    ('{"text": "x"}'.encode("utf-16"), "not valid UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_bad_line_is_counted_by_its_reason_and_named_by_a_strict_corpus(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    texts, skipped = read(path)
    assert texts == (["before", "good", "after"] if reason is None else ["before", "after"])
    assert skipped == ({} if reason is None else {reason: 1})
    resolved = resolve_corpus(Corpus(str(path)))
    if reason in (None, "empty"):
        assert len(list(documents(resolved, Skipped(strict=True)))) == len(texts)
    else:
        with pytest.raises(
            CorpusError, match="d.jsonl, line 2: " + reason.replace("(", r"\(").replace(")", r"\)")
        ):
            list(documents(resolved, Skipped(strict=True)))


@pytest.mark.parametrize(
    ("options", "value", "reason"),
    [
        ({"token_field": "f"}, [1, None], "not a list of integers"),
        ({"token_field": "f"}, None, "without the field"),
        ({"token_field": "f"}, [], "empty"),
        ({"chat_field": "f"}, None, "without the field"),
        ({"chat_field": "f"}, [], "empty"),
        (
            {"chat_field": "f"},
            [{"role": None, "content": "x"}],
            "not a list of messages with role and content",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "feather"])
def test_bad_tokens_and_chats_are_counted_alike_in_every_format(tmp_path, kind, options, value, reason):
    good = [1, 2] if "token_field" in options else CHATS[0]
    found, skipped = read(write_as(tmp_path / "c", kind, "f", [good, value, good]), **options)
    assert len(found) == 2
    assert skipped == {reason: 1}


def test_json_tokens_of_other_types_are_counted(tmp_path):
    values = ["text", [1.0], [True], [2**70], {"a": 1}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"f": v}) + "\n" for v in values))
    found, skipped = read(tmp_path / "d.jsonl", token_field="f")
    assert found == []
    assert skipped == {"not a list of integers": 4, "token ids outside of the vocabulary": 1}


def test_invalid_utf8_in_a_table_loses_one_row_not_its_batch(tmp_path):
    offsets, data = np.array([0, 2, 3, 5], np.int32), b"ab\xffcd"
    column = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(data))
    for kind, write_table in (("parquet", pq.write_table), ("feather", write_feather)):
        write_table(pa.table({"text": column}), str(tmp_path / f"d.{kind}"))
        assert read(tmp_path / f"d.{kind}") == (["ab", "cd"], {"not valid UTF-8": 1})


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        ([1, 2], {}, "is int64, not text"),
        (["a"], {"token_field": "f"}, "is string; token ids are a list of integers"),
        ([[1.5]], {"token_field": "f"}, "is list<.*double>; token ids"),
        ([["a"]], {"chat_field": "f"}, "messages are a list of structs"),
    ],
)
def test_a_column_of_another_type_is_one_clear_error(tmp_path, column, options, message):
    pq.write_table(pa.table({"f": column}), tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / "d.parquet", **({"text_field": "f"} | options))


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "arrow", "feather"])
def test_a_truncated_file_is_an_error_that_names_it_even_if_not_strict(tmp_path, kind):
    source = write_as(tmp_path / "c", kind, "text", [f"document {i} {i * i}" for i in range(300)])
    path = tmp_path / "c" / f"data.{kind}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorpusError, match=f"data.{kind}"):
        read(source)


def test_a_dataset_dict_asks_for_one_of_its_splits(tmp_path):
    write_as(tmp_path / "train", "saved", "text", TEXTS)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(CorpusError, match="holds the splits train, test; give .*/train"):
        read(tmp_path)
    assert read(tmp_path / "train")[0] == TEXTS


def test_a_saved_dataset_leads_to_no_other_directory(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(CorpusError, match="other directories"):
        read(tmp_path)


def test_fields_that_exclude_each_other_are_refused(tmp_path):
    with pytest.raises(SpecError, match="both given"):
        Corpus("x", token_field="a", chat_field="b")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CorpusError, match="which have no field 'a'"):
        read(tmp_path / "a.txt", token_field="a")


def test_strict_is_no_part_of_the_identity_and_the_field_is(tmp_path):
    source = write_as(tmp_path / "c", "jsonl", "text", TEXTS)
    plain = resolve_corpus(Corpus(source)).identity()
    assert resolve_corpus(Corpus(source, strict=True)).identity() == plain
    assert resolve_corpus(Corpus(source, text_field="other")).identity() != plain
    assert resolve_corpus(Corpus(source, token_field="text")).identity() != plain
