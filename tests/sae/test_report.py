"""The report says what the files say, shows any text as text, and needs nothing but itself."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from toy_dataset import tiny_lm, toy_dataset

from actcache.errors import CorruptObject, SpecError
from sae import SAE
from sae.evals import DEFINITIONS, evaluate_many
from sae.evals.latents import read_parquet
from sae.report import report_command, write_report
from sae.snippets import TokenTexts, visible

D_MODEL, D_SAE = 24, 40
SITE = "blocks.0.hook_resid_post"
HOSTILE = {
    7: "<script>alert(1)</script>",
    8: '"><img src=x onerror=alert(2)>',
    9: "\u202eevil",
    10: "😀",
    11: "x" * 10_000,
    12: "\n",
    13: "\t",
    14: "    ",
    15: "\x1b[31m",
    16: "&amp;{{ 7 * 7 }}",
    17: "</span></li></ol>",
}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def ds(lm):
    return toy_dataset(lm, n_sequences=40)


def word_tokenizer(words):
    """A real tokenizer with one token for each word: whatever a vocabulary may hold."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token=words[0])


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([HOSTILE.get(i, f" word{i}") for i in range(64)])


def random_sae(k, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=g), dim=1)
    cfg = {
        "architecture": "topk", "d_in": D_MODEL, "d_sae": D_SAE, "k": k, "site": SITE,
        "rows": 512, "batch_size": 64, "lr": 1e-3, "dataset": {"url": "memory://toy", "id": "toy-dataset"},
    }  # fmt: skip
    return SAE(cfg, W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.zeros(D_MODEL))


def write_run(path, n=2):
    """Directories as `sae.train` leaves them: sae.json, weights.safetensors, metrics.jsonl."""
    saes = []
    for k in range(2, 2 + n):
        s = random_sae(k, seed=k)
        s.save(path / f"topk-{D_SAE}-{k}")
        rng = np.random.default_rng(k)
        lines = [
            {"step": i, "rows": 64 * i, "loss": 9 / i + rng.random(), "l0": k, "fvu": 1 / i, "dead": 0}
            for i in range(1, 9)
        ]
        (path / f"topk-{D_SAE}-{k}" / "metrics.jsonl").write_text(
            "".join(json.dumps(x) + "\n" for x in lines)
        )
        saes.append(s)
    return saes


class Page(HTMLParser):
    """What a browser would make of the file: tags with attributes, and the text of the body."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory, ds, lm, tokenizer):
    """An evaluated run of two SAEs and its report."""
    path = tmp_path_factory.mktemp("run")
    results = evaluate_many(write_run(path), ds, lm)
    html = write_report(path, ds, tokenizer=tokenizer, n_latents=D_SAE).read_text()
    return path, results, html


def test_every_number_in_the_table_is_the_number_in_the_json(run):
    path, _, html = run
    cells = [a for a in Page(html).all("td") if "data-metric" in a]
    shown = {
        "l0",
        "dead_latents",
        "fvu",
        "cosine",
        "l2_ratio",
        "kl",
        "ce_recovered_zero",
        "ce_recovered_mean",
    }
    shown |= {"ce_clean", "ce_spliced", "ce_zero", "ce_mean"}
    for directory in sorted(p for p in path.iterdir() if p.is_dir()):
        stored = json.loads((directory / "eval.json").read_text())
        found = {a["data-metric"]: a["data-value"] for a in cells if a["data-sae"] == directory.name}
        assert set(found) == shown
        assert {name: json.loads(value) for name, value in found.items()} == {n: stored[n] for n in shown}
    assert len(cells) == 2 * len(shown)


def test_the_text_of_a_cell_is_its_value_rounded(run):
    _, _, html = run
    cells = re.findall(r'data-metric="(?:fvu|ce_clean|kl)" data-value="([^"]+)">([^<]+)<', html)
    assert len(cells) == 6
    assert all(f"{float(value):.4f}" == text for value, text in cells)


def test_every_column_is_explained(run):
    text = " ".join("".join(Page(run[2]).text).split())
    for name in ("l0", "dead_latents", "fvu", "cosine", "l2_ratio", "ce_clean", "ce_recovered_zero", "kl"):
        assert DEFINITIONS[name] in text


def test_a_hostile_corpus_stays_text(run, ds, tokenizer):
    html = run[2]
    page = Page(html)
    text = "".join(page.text)
    met = set(np.unique(ds.split("validation").input_ids)) & set(HOSTILE)
    assert {7, 8, 9, 11} <= met, "the toy corpus must contain what this test is about"
    assert len(page.all("script")) == 1  # ours
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert HOSTILE[7] in text
    assert HOSTILE[8] in text
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "⟨202E⟩evil" in text
    assert "x" * 61 not in html
    assert len(html) < 3_000_000


def test_markup_is_balanced_so_no_token_closed_an_element(run):
    class Balance(HTMLParser):
        void = frozenset(("meta", "link", "br", "input"))
        stack: list[str]

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                self.stack.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    parser = Balance()
    parser.stack = []
    parser.feed(run[2])
    parser.close()
    assert parser.stack == []


def test_nothing_is_fetched(run):
    html = run[2]
    page = Page(html)
    links = [attrs[name] for _, attrs in page.tags for name in ("href", "src", "xlink:href") if name in attrs]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors


def test_snippets_show_the_places_that_the_evaluation_kept(run):
    path, _, html = run
    directory = path / f"topk-{D_SAE}-2"
    table = read_parquet(directory / "latents.parquet")
    section = html[html.index('id="sae-0"') : html.index('id="sae-1"')]
    cards = re.findall(r'<article aria-label="latent (\d+)">(.*?)</article>', section, flags=re.DOTALL)
    assert {int(latent) for latent, _ in cards} == {row["latent"] for row in table if row["fires"]}
    for latent, card in cards:
        row = table[int(latent)]
        places = re.findall(r'title="sequence (\d+), position (\d+)">([\d.]+)</span>', card)
        assert 1 <= len(places) <= 8
        kept = list(zip(row["top_sequence"], row["top_position"], row["top_value"], strict=True))
        assert (int(places[0][0]), int(places[0][1])) == kept[0][:2]
        values = {(q, p): v for q, p, v in kept}
        for q, p, shown in places:
            decimals = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(values[int(q), int(p)], abs=0.51 * 10**-decimals)


def test_the_same_files_give_the_same_page(run, ds, tokenizer, tmp_path):
    path, _, html = run
    again = write_report(path, ds, tokenizer=tokenizer, n_latents=D_SAE, out=tmp_path / "again.html")
    assert again.read_text() == html


def test_a_run_without_an_evaluation_says_so(tmp_path, ds, tokenizer):
    write_run(tmp_path)
    page = Page(write_report(tmp_path, ds, tokenizer=tokenizer).read_text())
    text = "".join(page.text)
    assert text.count("not evaluated yet") == 2
    assert "python -m sae eval" in text
    assert len(page.all("svg")) == 4  # the training curves
    assert not [a for a in page.all("td") if "data-metric" in a]


def test_rows_alone_leave_the_loss_columns_out(tmp_path, ds, tokenizer):
    evaluate_many(write_run(tmp_path, n=1), ds)
    page = Page(write_report(tmp_path, ds, tokenizer=tokenizer).read_text())
    metrics = {a["data-metric"] for a in page.all("td") if "data-metric" in a}
    assert metrics == {"l0", "dead_latents", "fvu", "cosine", "l2_ratio"}
    assert "loss of the LM" not in "".join(page.text)


def test_one_sae_with_a_model_beside_one_without(tmp_path, ds, lm, tokenizer):
    first, second = write_run(tmp_path)
    evaluate_many([first], ds, lm)
    evaluate_many([second], ds)
    page = Page(write_report(tmp_path, ds, tokenizer=tokenizer).read_text())
    assert "".join(page.text).count("vs zeros") == 2
    assert len([a for a in page.all("td") if a.get("data-metric") == "kl"]) == 1


def test_without_the_dataset_the_figures_are_still_there(run, tmp_path):
    html = write_report(
        run[0], None, out=tmp_path / "r.html", dataset_note="The dataset is on another disk."
    ).read_text()
    page = Page(html)
    assert "The dataset is on another disk." in "".join(page.text)
    assert page.all("article") == []
    assert len([a for a in page.all("td") if "data-metric" in a]) == 24


def test_stale_results_are_named(tmp_path, ds, tokenizer):
    (s,) = write_run(tmp_path, n=1)
    evaluate_many([s], ds)
    s.W_dec.data[0] *= -1
    s.save(s.path)
    page = Page(write_report(tmp_path, ds, tokenizer=tokenizer).read_text())
    assert "not those that were evaluated" in "".join(page.text)
    assert page.all("article") == []


def test_a_torn_last_line_of_metrics_is_left_out_and_a_torn_middle_refused(tmp_path):
    (s,) = write_run(tmp_path, n=1)
    metrics = s.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 9, "ro')
    assert "<svg" in write_report(tmp_path).read_text()
    metrics.write_text('{"step"\n' + metrics.read_text())
    with pytest.raises(CorruptObject, match=r"metrics\.jsonl line 1"):
        write_report(tmp_path)


def test_no_sae_is_one_clear_error(tmp_path):
    with pytest.raises(SpecError, match="no finished SAE"):
        write_report(tmp_path)


def test_command_writes_beside_the_run_and_names_an_unreachable_dataset(tmp_path):
    (s,) = write_run(tmp_path, n=1)
    s.cfg["dataset"]["url"] = str(tmp_path / "nowhere")
    s.save(s.path)
    outcome = CliRunner().invoke(report_command, [str(tmp_path)], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert outcome.output.strip() == str(tmp_path / "report.html")
    assert "could not be opened" in (tmp_path / "report.html").read_text()


def test_part_of_a_character_shows_as_a_replacement():
    from actcache.lm import load_tokenizer

    tokenizer = load_tokenizer("bundled:stdlib-gpt2")
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("é € 😀\n    return x", add_special_tokens=False)
    shown = [str(texts[i]) for i in ids]
    assert "return" in "".join(shown)
    assert all(shown)
    assert any("�" in text for text in shown) or len(ids) < 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("<b>&\"'", "&lt;b&gt;&amp;&#34;&#39;"),
        ("x\n", "x<u>↵</u>"),
        ("\t", "<u>⇥</u>"),
        ("   y", '<u class="sp">   </u>y'),
        ("\u202ex", "<u>⟨202E⟩</u>x"),
        ("\x00", "<u>⟨0000⟩</u>"),
        ("é😀", "é😀"),
        ("z" * 61, "z" * 60 + "<u>…</u>"),
    ],
)
def test_visible_text(text, shown):
    assert str(visible(text)) == shown


def test_harvest_train_eval_report_by_command_on_a_real_dataset(tmp_path, capsys):
    """The whole chain on stored shards: what the page shows is what the stored rows give."""
    import actcache
    import sae
    from sae.__main__ import main

    rng = np.random.default_rng(0)
    words = ["def", "return", "self", "import", "<b>", "x = 1", "while True:", "pass"]
    docs = [{"text": "\n".join(rng.choice(words, 60))} for _ in range(60)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    corpus = actcache.Corpus(source=str(tmp_path / "docs.jsonl"), validation_share=0.4)
    spec = actcache.Spec(
        model="bundled:stdlib-gpt2", corpus=corpus, sites=["blocks.1.hook_resid_post"], context_size=16,
        n_tokens=2048, block_rows=1024, test_blocks=0,
    )  # fmt: skip
    ds = actcache.harvest(spec, root=str(tmp_path / "root"), engine="local")
    out = tmp_path / "run"
    stream = ds.stream(batch_size=256)
    (s,) = sae.train(stream, [sae.TopK(d_sae=64, k=8)], sae.Training(n_rows=2048, log_every=2), out=out)
    assert main(["eval", str(out), "--sequences", "8", "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert json.loads((s.path / "eval.json").read_text()) == printed

    view = ds.split("validation")
    x = view.read(ds.sites[0], slice(None)).astype(np.float64)
    error = np.square(x - s(x.astype(np.float32)).numpy()).sum()
    assert printed["fvu"] == pytest.approx(error / np.square(x - x.mean(0)).sum(), rel=1e-5)
    assert printed["l0"] <= 8
    assert printed["n_rows"] == view.n_rows == len(x)
    assert printed["dataset"] == ds.id

    assert main(["report", str(out), "--latents", "3"]) == 0
    page = Page((out / "report.html").read_text())
    (fvu,) = (a["data-value"] for a in page.all("td") if a.get("data-metric") == "fvu")
    assert json.loads(fvu) == printed["fvu"]
    assert len(page.all("article")) >= 3
    assert page.all("b"), "the strongest tokens are highlighted"
    for row in read_parquet(s.path / "latents.parquet"):
        for sequence, position, value in zip(
            row["top_sequence"][:1], row["top_position"][:1], row["top_value"][:1], strict=True
        ):
            rows = view.rows(slice(None))
            (i,) = np.flatnonzero((rows.sequence == sequence) & (rows.position == position))
            assert rows.token_id[i] == view.context(sequence)[position]
            assert float(s.encode(x[i].astype(np.float32))[row["latent"]]) == pytest.approx(value, rel=1e-4)
