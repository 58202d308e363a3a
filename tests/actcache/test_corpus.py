"""Token stores: every token once, known by its document; splits that content alone decides."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora import write_as
from tiny_harvest import tiny_spec, write_corpus
from tiny_models import save_tiny_lm, tiny_tokenizer

import actcache
from actcache import corpus as corpus_module
from actcache import packing
from actcache.corpus import SPLITS, TokenStore, kept_tokens, open_tokens, split_of, tokenise
from actcache.errors import CorpusError, NotADataset, SpecError
from actcache.lm import load_tokenizer
from actcache.packing import document_places
from actcache.ray_engine import in_a_cluster, ray_map
from actcache.sources import Skipped, documents, resolve_corpus
from actcache.spec import PACKINGS, Corpus, Spec
from actcache.store import LocalStore, open_store


def test_splits_follow_the_content_and_the_shares():
    splits = [split_of(f"document {i}", 0.2, 0.1) for i in range(5000)]
    assert abs(splits.count("validation") / 5000 - 0.2) < 0.03  # five standard errors
    assert abs(splits.count("test") / 5000 - 0.1) < 0.03
    assert split_of("document 1", 0.2, 0.1) == splits[1]


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
    for _, _, text in documents(resolve_corpus(spec.corpus), Skipped()):
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
    with pytest.raises(
        CorpusError, match=r"all of which fall into the other splits .* lower validation_share"
    ):
        make_tokens(held_out, tmp_path / "root")
    special = Corpus(write_as(tmp_path / "c", "jsonl", "ids", [[1, 2], [2]]), token_field="ids")
    special = replace(special, validation_share=0.0, test_share=0.0)
    with pytest.raises(CorpusError, match="keeps no row: every token of its train split is special"):
        make_tokens(replace(spec, corpus=special), tmp_path / "root")


def test_a_corpus_of_malformed_documents_says_why_none_was_taken(spec, tmp_path):
    from dataclasses import replace

    (tmp_path / "bad.jsonl").write_text("[1, 2]\nnull\n")
    with pytest.raises(CorpusError, match="2 documents skipped: not a JSON object"):
        make_tokens(replace(spec, corpus=Corpus(str(tmp_path / "bad.jsonl"))), tmp_path / "root")


def test_a_corpus_that_cannot_be_reached_is_named(spec, tmp_path):
    from dataclasses import replace

    with pytest.raises(CorpusError, match=r"cannot open corpus 'ftp://127\.0\.0\.1:1/x'.*refused"):
        make_tokens(replace(spec, corpus=Corpus("ftp://127.0.0.1:1/x")), tmp_path / "root")


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


def store_of(spec, root, tokenizer=None, **options):
    return tokenise(
        spec,
        resolve_corpus(spec.corpus),
        tokenizer or tiny_tokenizer(),
        open_store(str(root)),
        progress=False,
        **options,
    )


def documents_of(tokens, split):
    """{document: its stored tokens' (offset, id)} of a split, by the store's arrays."""
    n = tokens.n_sequences(split)
    input_ids, length = tokens.sequences(split, 0, n)
    arrays = tokens.documents(split, 0, n)
    kept = kept_tokens(input_ids, length, tokens.identity["special_token_ids"])
    sequence, position = np.nonzero(kept)
    document, offset = document_places(sequence, position, *arrays.values(), tokens.identity)
    out = {}
    for d, o, i in zip(document.tolist(), offset.tolist(), input_ids[kept].tolist(), strict=True):
        out.setdefault(d, []).append((o, i))
    return {d: sorted(found) for d, found in out.items()}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_every_row_is_led_back_to_its_file_record_and_offset(tmp_path, packing, prepend_bos):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "bc", "def"], rng.integers(1, 30))) + str(i) for i in range(90)]
    for i in range(3):
        lines = [json.dumps({"text": t}) for t in texts[i * 30 : i * 30 + 30]]
        (tmp_path / f"{i}.jsonl").write_text("not json\n" + "\n".join(lines))
    corpus = Corpus(f"{tmp_path}/*.jsonl", validation_share=0.2, test_share=0.2)
    spec = Spec(
        model="unused", corpus=corpus, sites=["x"], context_size=24, n_tokens=1, packing=packing,
        prepend_bos=prepend_bos,
    )  # fmt: skip
    tokens = store_of(spec, tmp_path / "root")
    assert tokens.manifest["skipped"] == {"not JSON": 3}
    tokenizer, seen, cut = tiny_tokenizer(), [], 0
    for split in SPLITS:
        n_tokens = 0
        for document, found in documents_of(tokens, split).items():
            file, record = tokens.source(split, document)
            number = int(file.split(".")[0]) * 30 + record - 1
            seen.append(number)
            text = texts[number]
            assert split_of(text, 0.2, 0.2) == split
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = tokens.rows(split, "document_start", document, document + 2)
            assert np.diff(start) == len(ids) + (packing == "concat")
            stored = ids[: 24 - prepend_bos] if packing == "single" else ids
            cut += len(ids) - len(stored)
            n_tokens += len(stored) + (packing == "concat")
            assert found == list(enumerate(stored))
        assert n_tokens == tokens.manifest["splits"][split]["n_tokens"]
    assert sorted(seen) == list(range(90))
    assert cut == sum(s["n_tokens_cut"] for s in tokens.manifest["splits"].values())
    assert (cut > 0) == (packing == "single")


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_dataset_knows_the_documents_of_its_rows(tmp_path, packing):
    spec = tiny_spec(tmp_path, packing=packing, context_size=12)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    tokenizer = load_tokenizer(spec.model)
    paths = (tmp_path / "corpus").iterdir()
    ids = {p.name: tokenizer(p.read_text(), add_special_tokens=False)["input_ids"] for p in paths}
    for split in dataset.splits:
        part = dataset.split(split)
        index = np.random.default_rng(0).permutation(part.n_rows)[:200]
        rows, found = part.rows(index), part.documents(index)
        sources = part.sources(found.document)
        for i, (file, record) in enumerate(sources):
            assert record == 0
            assert rows.token_id[i] == ids[file][found.offset[i]]
    moved = shutil.copytree(dataset.url, tmp_path / "elsewhere" / "copy")
    copied = actcache.open(str(moved))
    assert np.array_equal(copied.documents(slice(50)).offset, dataset.documents(slice(50)).offset)
    with pytest.raises(NotADataset, match="holds no token store"):
        copied.sources([0])


@pytest.mark.parametrize("holds", ["text", "tokens", "chat"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "feather", "saved"])
def test_no_document_nor_its_duplicate_is_in_two_splits_and_shares_are_right(tmp_path, kind, holds):
    if kind == "text" and holds != "text":
        pytest.skip("text files hold text")
    n = 150
    values = {
        "text": [f"document {i}" for i in range(n)],
        "tokens": [[5 + i % 80, 5 + i // 80, 7] for i in range(n)],
        "chat": [[{"role": "user", "content": f"question {i}"}] for i in range(n)],
    }[holds]
    twice = values + values[::-1]  # every document has its duplicate elsewhere
    options = {"text": {"text_field": "f"}, "tokens": {"token_field": "f"}, "chat": {"chat_field": "f"}}[
        holds
    ]
    corpus = Corpus(
        write_as(tmp_path / "c", kind, "f", twice), validation_share=0.2, test_share=0.1, **options
    )
    spec = Spec(model="unused", corpus=corpus, sites=["x"], context_size=16, n_tokens=1, packing="isolated")
    tokens = store_of(spec, tmp_path / "root", chat_tokenizer())
    resolved = resolve_corpus(corpus)
    content = {
        (resolved.names[d.file], d.record): json.dumps(np.asarray(d.content).tolist())
        for d in documents(resolved, Skipped())
    }
    by_split = {
        split: [content[tokens.source(split, d)] for d in range(tokens.n_documents(split))]
        for split in SPLITS
    }
    assert sum(map(len, by_split.values())) == 2 * n
    for split, found in by_split.items():
        others = set().union(*(by_split[s] for s in SPLITS if s != split))
        assert not others & set(found)
        assert all(found.count(c) == 2 for c in found)
    for split, share in (("validation", 0.2), ("test", 0.1)):  # five standard errors of n draws
        assert abs(len(by_split[split]) / (2 * n) - share) < 5 * (share * (1 - share) / n) ** 0.5


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("packing", PACKINGS)
def test_chats_are_rendered_by_the_template_with_one_bos_and_one_eos(tmp_path, packing):
    chats = [[{"role": r, "content": "hi"}] for r in ("user", "bad", "system")]
    corpus = Corpus(
        write_as(tmp_path / "c", "jsonl", "m", chats), chat_field="m", validation_share=0, test_share=0
    )
    spec = Spec(model="unused", corpus=corpus, sites=["x"], context_size=40, n_tokens=1, packing=packing)
    tokenizer = chat_tokenizer()
    tokens = store_of(spec, tmp_path / "root", tokenizer)
    assert tokens.manifest["skipped"] == {"refused by the chat template": 1}
    input_ids, length = tokens.sequences("train", 0, tokens.n_sequences("train"))
    found = sorted("".join(tokenizer.decode(ids[:n])) for ids, n in zip(input_ids, length, strict=True))
    first, second = ("<s>user: hi</s>", "<s>system: hi</s>")
    assert (
        found
        == {
            "concat": [f"<s>{first}{second}"],  # BOS of the sequence, then the template's own
            "isolated": [first + second],
            "single": sorted([first, second]),
        }[packing]
    )
    other = chat_tokenizer()
    other.chat_template += " "
    assert (
        store_of(spec, tmp_path / "root", other).identity["chat_template"] != tokens.identity["chat_template"]
    )
    with pytest.raises(SpecError, match="no chat template"):
        store_of(spec, tmp_path / "root", tiny_tokenizer())


def test_given_ids_are_checked_and_keep_their_own_bos_and_eos_once(tmp_path):
    ids = [[1, 5, 6, 2], [7, 8], [9, 95], [9, 96], [-1], [2**40], [1]]
    for kind, expected in (
        ("concat", [1, 1, 5, 6, 2, 7, 8, 2, 9, 95, 2, 1, 2]),
        ("isolated", [1, 5, 6, 2, 1, 7, 8, 1, 9, 95]),
    ):
        source = write_as(tmp_path / kind, "parquet", "ids", ids)
        corpus = Corpus(source, token_field="ids", validation_share=0, test_share=0)
        spec = Spec(model="unused", corpus=corpus, sites=["x"], context_size=20, n_tokens=1, packing=kind)
        tokens = store_of(spec, tmp_path / "root")
        input_ids, length = tokens.sequences("train", 0, 1)
        assert input_ids[0, : length[0]].tolist() == expected
        assert tokens.manifest["skipped"] == {
            "token ids outside of the vocabulary": 3,
            **({"without a token": 1} if kind == "isolated" else {}),
        }


def test_a_strict_corpus_raises_at_the_document_even_when_a_lenient_store_is_there(tmp_path):
    from dataclasses import replace

    ids = [[5, 6], [7, 1000]]
    corpus = Corpus(write_as(tmp_path / "c", "jsonl", "ids", ids), token_field="ids", validation_share=0)
    spec = Spec(model="unused", corpus=corpus, sites=["x"], context_size=16, n_tokens=1)
    strict = replace(spec, corpus=replace(corpus, strict=True))
    with pytest.raises(CorpusError, match=r"data.jsonl, line 2: token ids outside of the vocabulary"):
        store_of(strict, tmp_path / "root")
    lenient = store_of(spec, tmp_path / "root")
    assert lenient.manifest["skipped"] == {"token ids outside of the vocabulary": 1}
    with pytest.raises(CorpusError, match="was built without these documents"):
        store_of(strict, tmp_path / "root")


def stored_bytes(tokens):
    root = Path(tokens.store.url)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_neither_batches_nor_buckets_nor_the_executor_change_a_byte(spec, tmp_path, monkeypatch):
    whole = stored_bytes(store_of(spec, tmp_path / "a"))
    monkeypatch.setattr(packing, "_BUCKET_BYTES", 1)  # a bucket a shard
    monkeypatch.setattr(corpus_module, "sequence_rows", lambda context_size: (64, 4))
    many = store_of(spec, tmp_path / "b")
    few = TokenStore(many.store, many.manifest)
    monkeypatch.setattr(packing, "_BUCKET_BYTES", 2**25)
    monkeypatch.setattr(corpus_module, "_TAKE_TOKENS", 100)
    monkeypatch.setattr(corpus_module, "_BATCH_LENGTH", 300)
    assert stored_bytes(store_of(spec, tmp_path / "c", run=map)) == stored_bytes(few)
    monkeypatch.undo()
    assert stored_bytes(store_of(spec, tmp_path / "d", run=map)) == whole


def test_a_killed_build_leaves_no_store_and_is_finished_by_the_next(spec, tmp_path):
    class Killed(BaseException):
        pass

    whole = stored_bytes(store_of(spec, tmp_path / "a"))
    for keep in range(0, len(whole), 7):
        root = tmp_path / f"root-{keep}"
        store = open_store(str(root)).sub(f"tokens/{Path(store_of(spec, tmp_path / 'a').store.url).name}")
        create, made = LocalStore.create, []

        def stop(self, key, data, create=create, made=made, keep=keep):
            if len(made) >= keep:
                raise Killed
            made.append(key)
            return create(self, key, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStore, "create", stop)
            with pytest.raises(Killed):
                store_of(spec, root)
        assert open_tokens(store) is None
        assert stored_bytes(store_of(spec, root)) == whole


def test_a_document_longer_than_a_batch_and_a_shard_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BATCH_LENGTH", 1000)
    monkeypatch.setattr(corpus_module, "_TAKE_TOKENS", 1000)
    monkeypatch.setattr(corpus_module, "PIECE_LENGTH", 500)
    monkeypatch.setattr(corpus_module, "sequence_rows", lambda context_size: (64, 4))
    text = "word and another " * 2000
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "small"}))
    corpus = Corpus(str(tmp_path / "big.jsonl"), validation_share=0, test_share=0)
    spec = Spec(model="unused", corpus=corpus, sites=["x"], context_size=256, n_tokens=1)
    tokens = store_of(spec, tmp_path / "root")
    assert tokens.n_documents("train") == 2
    expected = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokens.rows("train", "document_start", 0, 3).tolist() == [0, len(expected) + 1, len(expected) + 7]
    assert [i for _, i in documents_of(tokens, "train")[0]] == expected


@pytest.mark.ray
def test_ray_tasks_make_the_same_store_and_their_errors_are_ours(spec, tmp_path, ray_session, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BATCH_LENGTH", 1000)  # about 40 tasks
    whole = stored_bytes(store_of(spec, tmp_path / "a"))
    assert in_a_cluster()
    assert stored_bytes(store_of(spec, tmp_path / "b", run=ray_map)) == whole

    def refuse(item):
        raise CorpusError(f"no {item}")

    with pytest.raises(CorpusError, match="no 1"):
        list(ray_map(refuse, iter([1, 2, 3])))


def model_with_one_token_too_many(directory):
    """A llama that embeds 96 tokens, with a tokenizer of 97: as Gemma 3, whose tokenizer has one for images."""
    save_tiny_lm(directory, "llama", vocab_size=96)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens("<image>")
    assert len(tokenizer) == 97
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_token_that_the_model_does_not_embed_refuses_its_document_and_not_the_model(tmp_path, caplog):
    model = model_with_one_token_too_many(tmp_path / "tiny-llama")
    write_corpus(tmp_path / "corpus")
    bad = tmp_path / "corpus" / "0007.txt"
    bad.write_text(bad.read_text() + " <image>")
    spec = tiny_spec(tmp_path, family="llama", model=model, n_tokens=1000)
    made = actcache.plan(spec)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    tokens = dataset._shared.tokens
    assert tokens.identity["vocab_size"] == 96
    assert tokens.manifest["skipped"] == {"token ids outside of the vocabulary": 1}
    assert "0007.txt" in caplog.text
    assert made.extent["train"].blocks == dataset.manifest.sites[dataset.sites[0]].n_blocks["train"]


def test_a_bos_or_eos_that_the_model_does_not_embed_is_refused(tmp_path):
    model = model_with_one_token_too_many(tmp_path / "tiny-llama")
    tokenizer = load_tokenizer(model)
    tokenizer.eos_token = "<image>"
    tokenizer.save_pretrained(model)
    with pytest.raises(
        SpecError, match="EOS is token 96, and the model embeds 96 of the tokenizer's 97 tokens"
    ):
        actcache.plan(tiny_spec(tmp_path, family="llama", model=model))
