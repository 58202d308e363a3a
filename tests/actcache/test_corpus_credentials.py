"""Credentials in a corpus's URL are used to read it and appear nowhere."""

import functools
import http.server
import json
import logging
import pickle
import threading
from pathlib import Path

import pytest
from tiny_harvest import tiny_spec

import actcache
from actcache.errors import CorpusError
from actcache.sources import locate_corpus
from actcache.spec import Corpus, Spec, public_text, public_url

SECRETS = ("DEADBEEF", "hunter2")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://host/a.jsonl?X-Amz-Signature=DEADBEEF&x=1", "https://host/a.jsonl"),
        ("https://host/a.jsonl?DEADBEEF", "https://host/a.jsonl"),
        ("https://host/a.jsonl#DEADBEEF", "https://host/a.jsonl"),
        ("https://me:hunter2@host:8080/a@b.jsonl", "https://host:8080/a@b.jsonl"),
        ("ftp://me:hunter2@host/a.jsonl", "ftp://host/a.jsonl"),
        ("s3://bucket/a.jsonl?versionId=DEADBEEF", "s3://bucket/a.jsonl"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("hf://datasets/lab/text@refs/a.parquet", "hf://datasets/lab/text@refs/a.parquet"),
        ("simplecache::https://host/a.jsonl?sig=DEADBEEF", "simplecache::https://host/a.jsonl"),
        ("zip://a.jsonl::https://me:hunter2@host/a.zip?s=1", "zip://a.jsonl::https://host/a.zip"),
        ("/data/what?.txt", "/data/what?.txt"),
        ("data/*.jsonl", "data/*.jsonl"),
        ("bundled:stdlib", "bundled:stdlib"),
    ],
)
def test_a_source_is_shown_without_what_may_be_a_credential(source, shown):
    assert public_url(source) == shown
    corpus = Corpus(source)
    assert corpus.shown == shown
    spec = Spec(model="m", corpus=corpus, sites=["s"], context_size=8, n_tokens=1)
    for text in (repr(corpus), str(spec), public_text(f"cannot read <{source}>: 403")):
        assert not [secret for secret in SECRETS if secret in text]
    assert pickle.loads(pickle.dumps(corpus)) == corpus  # and whoever reads it has all of it


def test_a_corpus_is_printed_with_what_was_given():
    assert repr(Corpus("a.jsonl", text_field="body")) == "Corpus('a.jsonl', text_field='body')"


@pytest.fixture
def served(tmp_path):
    """URL of a server of 200 documents and one bad line, which asks for a signature and a password."""
    lines = [json.dumps({"text": f"document {i} def return self x = 1 " * 2}) for i in range(200)]
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "data.jsonl").write_text("\n".join([*lines, "not json"]))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            if "X-Amz-Signature=DEADBEEF" not in self.path:
                return self.send_error(403)
            return super().send_head()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_neither_names_nor_manifests_nor_logs_have_it(served, tmp_path, caplog):
    caplog.set_level(logging.INFO, "actcache")
    url = f"{served}/data.jsonl?X-Amz-Signature=DEADBEEF&x=hunter2"
    spec = tiny_spec(tmp_path, corpus=Corpus(url, validation_share=0.1, test_share=0.1), n_tokens=1000)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    assert dataset.n_rows >= 1000
    assert dataset.sources([0]) == [("data.jsonl", dataset.sources([0])[0][1])]
    assert "1 documents skipped (not JSON), the first is http://127.0.0.1" in caplog.text
    for path in Path(tmp_path / "root").rglob("*"):
        assert not [s for s in SECRETS if s.lower() in path.name.lower()]
        assert not path.is_file() or not [s for s in SECRETS if s.encode() in path.read_bytes()]
    assert not [s for s in SECRETS if s in caplog.text]


@pytest.mark.parametrize(
    "source",
    [
        "{served}/data.jsonl?sig=hunter2",
        "{served}/other.jsonl?X-Amz-Signature=DEADBEEF",
        "http://me:hunter2@127.0.0.1:1/data.jsonl?DEADBEEF=1",
        "{served}/data.bin?X-Amz-Signature=DEADBEEF",
    ],
)
def test_no_error_has_it(served, source):
    import traceback

    from actcache.sources import Skipped, documents, resolve_corpus

    with pytest.raises(CorpusError) as err:
        list(documents(resolve_corpus(Corpus(source.format(served=served))), Skipped()))
    shown = "".join(traceback.format_exception(err.value, chain=True, limit=0))
    assert not [secret for secret in SECRETS if secret in str(err.value)]
    assert not [secret for secret in SECRETS if secret in shown]


def test_files_are_read_by_their_whole_url(served):
    corpus = Corpus(f"{served}/data.jsonl?X-Amz-Signature=DEADBEEF")
    located = locate_corpus(corpus)
    assert located.files == (corpus.source,)
    assert located.names == ["data.jsonl"]
