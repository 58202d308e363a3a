"""What a corpus is follows from names that tell it, or is asked for; nothing is read as something else."""

import gzip
import json

import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_as

from actcache.corpus_files import format_of
from actcache.errors import CorpusError, SpecError
from actcache.sources import Skipped, beginning, documents, resolve_corpus
from actcache.spec import Corpus

LINES = "".join(json.dumps({"text": f"text {i}", "other": 1}) + "\n" for i in range(30))


def read(source, storage_options=None, **options):
    skipped = Skipped()
    resolved = resolve_corpus(Corpus(str(source), **options), storage_options)
    return [d.content for d in documents(resolved, skipped)], skipped.counts


def files(directory, contents):
    for name, content in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.NDJSON.gz", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.feather", "arrow"),
        ("a.txt", "text"),
        ("a.txt.gz", "text"),
        ("x/a.PY", "text"),
        ("a.json", None),
        ("a.json.gz", None),
        ("a.csv", None),
        ("a.bin", None),
        ("README", None),
        (".txt", None),
        ("https://host/a.jsonl?sig=x.txt", "jsonl"),
        ("https://host/a.parquet?a=1#b", "parquet"),
        ("https://host/download?file=a.jsonl", None),
        ("https://host/download?id=7", None),
        ("s3://bucket/a.jsonl.gz?versionId=abc", "jsonl"),
    ],
)
def test_the_format_is_what_the_name_tells(name, kind):
    assert format_of(name) == kind


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("data.json", LINES, "format='jsonl'"),
        ("data.json.gz", gzip.compress(LINES.encode()), "format='jsonl'"),
        ("data.json", json.dumps([{"text": "a"}]), "write a document a line first"),
        ("data.csv", "id,text\n1,hello\n", "write it as parquet"),
        ("data.tsv", "id\ttext\n", "write it as parquet"),
        ("data.bin", b"\x00", "format='text'"),
        ("LICENSE", "mine", "format='text'"),
    ],
)
@pytest.mark.parametrize("how", ["file", "glob", "directory"])
def test_a_name_that_may_be_several_things_is_refused_with_the_remedy(tmp_path, name, content, remedy, how):
    directory = files(tmp_path / "c", {name: content})
    source = {"file": directory / name, "glob": directory / "*", "directory": directory}[how]
    with pytest.raises(CorpusError, match="does not tell its format") as err:
        read(source)
    assert remedy in str(err.value)
    assert name in str(err.value)
    assert "\n" not in str(err.value)


def test_what_the_user_says_holds_whatever_the_name(tmp_path):
    directory = files(tmp_path / "c", {"a.json": LINES, "b.json.gz": gzip.compress(LINES.encode())})
    texts = [f"text {i}" for i in range(30)]
    assert read(directory, format="jsonl") == (texts * 2, {})
    assert read(directory / "a.json", format="text") == ([LINES], {})
    assert resolve_corpus(Corpus(str(directory / "a.json"), format="jsonl")).identity()["format"] == "jsonl"
    with pytest.raises(SpecError, match="format is 'json'.*did you mean 'jsonl'"):
        Corpus("x", format="json")


def test_a_format_that_is_the_one_of_the_names_changes_no_identity(tmp_path):
    source = write_as(tmp_path / "c", "jsonl", "text", ["a", "b"])
    plain = resolve_corpus(Corpus(source)).identity()
    assert resolve_corpus(Corpus(source, format="jsonl", max_skipped_share=0.5)).identity() == plain


def test_a_directory_of_several_formats_is_refused_with_a_glob_that_works(tmp_path):
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one row of an index"]}), table)
    contents = {
        "index.parquet": table.getvalue().to_pybytes(),
        "sub/1.jsonl": LINES,
        "2.jsonl": LINES,
        "a.txt": "a",
    }
    directory = files(tmp_path / "m", contents)
    with pytest.raises(
        CorpusError, match=r"formats jsonl, parquet, text \(2 jsonl such as 2.jsonl, 1 parquet"
    ) as err:
        read(directory)
    glob = str(err.value).split("such as ")[-1].split(", or")[0]
    assert len(read(glob)[0]) == 60
    with pytest.raises(CorpusError, match="formats text, unknown .*1 unknown such as b.pyc"):
        read(files(tmp_path / "g", {"a.txt": "real", "b.pyc": b"\x00"}))


def test_hidden_files_are_no_part_of_a_directory(tmp_path):
    contents = {
        "a.txt": "real",
        ".git/HEAD": "ref",
        ".DS_Store": b"\x00",
        "sub/.cache/x.txt": "no",
        "sub/b.md": "too",
    }
    assert read(files(tmp_path / "g", contents))[0] == ["real", "too"]
    assert read(tmp_path / "g" / ".git" / "*", format="text")[0] == ["ref"]


def test_a_directory_with_several_splits_is_refused_and_one_of_them_is_read(tmp_path):
    contents = {
        f"data/{split}-0000{i}-of-00002.jsonl": LINES for split in ("train", "test") for i in range(2)
    }
    directory = files(tmp_path / "d", contents)
    with pytest.raises(CorpusError, match="several splits: test, train; give one, such as") as err:
        read(directory)
    example = str(err.value).split("such as ")[1].split(", or")[0]
    assert len(read(example)[0]) == 30
    assert len(read(directory / "data" / "train-*.jsonl")[0]) == 60
    assert len(read(files(tmp_path / "one", {"a/train.jsonl": LINES, "b/train.jsonl": LINES}))[0]) == 60
    code = files(tmp_path / "code", {"tests/test_x.py": "x", "train.py": "y"})  # text: names are free
    assert len(read(code)[0]) == 2


@pytest.fixture
def repository(monkeypatch):
    """Contents of a repository on a Hub on loopback, to fill, and the storage options."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server.hub() as server:
        contents = server.repos["lab/text"] = {
            ".gitattributes": b"",
            "README.md": b"# Text",
            "load.py": b"import x",
        }
        options = {"endpoint": server.endpoint, "token": "hf_of_nobody", "skip_instance_cache": True}
        yield contents, options


def test_a_hub_dataset_with_several_configurations_or_splits_asks_for_one(repository):
    contents, options = repository
    contents |= {f"{c}/{s}-00000.jsonl": LINES.encode() for c in ("en", "fr") for s in ("train", "test")}
    with pytest.raises(
        CorpusError, match=r"several folders \(configurations, perhaps\): en, fr; give one, such as"
    ):
        read("hf://datasets/lab/text", options)
    with pytest.raises(CorpusError, match="several splits: test, train"):
        read("hf://datasets/lab/text/en", options)
    assert len(read("hf://datasets/lab/text/en/train-*.jsonl", options)[0]) == 30
    assert len(read("hf://datasets/lab/text/**/train-*.jsonl", options)[0]) == 60


def test_a_hub_dataset_of_one_folder_and_split_is_read_without_what_is_about_it(repository):
    contents, options = repository
    contents |= {f"data/train-0000{i}.jsonl": LINES.encode() for i in range(2)}
    assert len(read("hf://datasets/lab/text", options)[0]) == 60
    contents["data/extra.csv"] = b"a,b"
    with pytest.raises(CorpusError, match="formats jsonl, unknown"):
        read("hf://datasets/lab/text", options)


def test_a_byte_order_mark_is_no_text_in_any_format(tmp_path):
    mark = b"\xef\xbb\xbf"
    files(tmp_path, {"t/a.txt": mark + b"hello", "j/a.jsonl": mark + b'{"text": "hello"}'})
    assert read(tmp_path / "t")[0] == read(tmp_path / "j")[0] == ["hello"]
    [(document, _)] = beginning(resolve_corpus(Corpus(str(tmp_path / "t"))), 0, 1, 100).documents
    assert document.content == "hello"


def test_packed_text_files_are_unpacked(tmp_path):
    directory = files(tmp_path / "t", {"a.txt.gz": gzip.compress(b"hello " * 1000), "b.txt": "there"})
    assert read(directory)[0] == ["hello " * 1000, "there"]
    [(document, factor)] = beginning(resolve_corpus(Corpus(str(directory))), 0, 1, 40).documents
    assert document.content.startswith("hello")
    assert factor >= 1


@pytest.mark.parametrize(("n_bad", "refused"), [(20, False), (21, True), (99, True)])
def test_a_corpus_of_which_too_much_cannot_be_taken_is_an_error(tmp_path, n_bad, refused):
    lines = [json.dumps({"text": "ok"} if i >= n_bad else {"body": "lost"}) for i in range(100)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    if not refused:
        assert read(path)[1] == {"without the field": n_bad}
        return
    with pytest.raises(
        CorpusError,
        match=f"{n_bad} of 100 documents cannot be taken .*: {n_bad} without the field, the first",
    ):
        read(path)
    assert read(path, max_skipped_share=1)[1] == {"without the field": n_bad}
    assert len(read(path, text_field="body", max_skipped_share=1)[0]) == n_bad


def test_empty_documents_are_no_share(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": " " if i else "x"}) + "\n" for i in range(100))
    )
    assert read(tmp_path / "d.jsonl") == (["x"], {"empty": 99})


def test_a_field_of_another_name_ends_the_reading_early(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "x"}\n' * 30_000)
    with pytest.raises(CorpusError, match="10000 of 10000 documents cannot be taken"):
        read(path, max_skipped_share=0.5)


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    files(tmp_path, {"a[1].txt": "this", "a1.txt": "not this"})
    assert read(tmp_path / "a[1].txt")[0] == ["this"]


def test_a_text_field_of_text_files_is_said_to_be_of_no_use(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("x")
    assert read(tmp_path / "a.txt", text_field="content")[0] == ["x"]
    assert "no field 'content' is read" in caplog.text
