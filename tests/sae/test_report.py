"""The report says what the files say, shows any text as text, and needs nothing but itself.

What a browser makes of it is tested in test_report_browser.py.
"""

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from toy_dataset import tiny_lm, toy_dataset

from actcache.errors import CorruptObject, SpecError
from sae import SAE
from sae.evals import DEFINITIONS, evaluate_many
from sae.evals.latents import read_parquet
from sae.report import payload, report_command, write_report
from sae.report.dashboards import build, logit_effects, nearest_latents, read_columns
from sae.report.entries import Entry
from sae.report.texts import LOUD, QUIET, TokenTexts, visible
from sae.report.words import with_error
from sae.snippets import BEFORE, WIDTH

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
    """What a browser would make of the file before scripts run: tags with attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.blocks = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self.tags and self.tags[-1][1].get("type") == "application/octet-stream" and data.strip():
            self.blocks.append(data.strip())
        else:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory, ds, lm, tokenizer):
    """An evaluated run of two SAEs and its report: (directory, eval results, summary, page of topk-40-2)."""
    path = tmp_path_factory.mktemp("run")
    results = evaluate_many(write_run(path), ds, lm)
    out = write_report(path, ds, tokenizer=tokenizer, model=lm)
    assert out == path / "report.html"
    assert sorted(p.name for p in path.glob("*.html")) == [
        "report-topk-40-2.html",
        "report-topk-40-3.html",
        "report.html",
    ]
    return path, results, out.read_text(), (path / "report-topk-40-2.html").read_text()


SHOWN = {"l0", "dead_latents", "fvu", "cosine", "l2_ratio", "kl", "ce_recovered_zero", "ce_recovered_mean"}
SHOWN |= {"ce_clean", "ce_spliced", "ce_zero", "ce_mean"}


def test_every_number_in_the_table_is_the_number_in_the_json(run):
    path, _, html, page = run
    for text, names in ((html, ["topk-40-2", "topk-40-3"]), (page, ["topk-40-2"])):
        cells = [a for a in Page(text).all("td") if "data-metric" in a]
        for name in names:
            stored = json.loads((path / name / "eval.json").read_text())
            found = {a["data-metric"]: json.loads(a["data-value"]) for a in cells if a["data-sae"] == name}
            assert found == {n: stored[n] for n in SHOWN}
        assert len(cells) == len(names) * len(SHOWN)


def test_the_text_of_a_cell_is_its_value_rounded(run):
    cells = re.findall(r'data-metric="(?:fvu|ce_clean|kl)" data-value="([^"]+)">([^<]+)<', run[2])
    assert len(cells) == 6
    assert all(f"{float(value):.4f}" == text for value, text in cells)


def test_all_figures_are_there_with_definition_and_error(run):
    path, _, html, _ = run
    page = Page(html)
    text = " ".join("".join(page.text).split())
    stored = json.loads((path / "topk-40-2" / "eval.json").read_text())
    figures = {
        a["data-figure"]: json.loads(a["data-exact"])
        for a in page.all("td")
        if a.get("data-of") == "topk-40-2"
    }
    assert figures == {name: stored[name] for name in DEFINITIONS if stored.get(name) is not None}
    assert all(definition in text for name, definition in DEFINITIONS.items() if name in figures)
    assert with_error(stored["kl"], stored["standard_errors"]["kl"]) in text


def test_figures_that_are_not_known_yet_are_shown_too(run, tmp_path, ds):
    """As a later evaluation may add them: with `_se`, in objects, by position, as a histogram."""
    path = run[0]
    (s,) = write_run(tmp_path, n=1)
    result = json.loads((path / "topk-40-2" / "eval.json").read_text())
    result |= {
        "probe_auc": 0.875,
        "probe_auc_se": 0.01234,
        "tasks": {"brackets": {"recovered": 0.25, "skipped": None}},
        "by_position": [{"from": 0, "fvu": 0.5}, {"from": 8, "fvu": 0.75}],
        "by_norm": {"edge": [1, 2], "fvu": [0.125, 0.0625]},
    }
    result["histograms"]["cosine_of_nearest"] = {"edges": [0, 0.5, 1], "counts": [3, 4]}
    (s.path / "eval.json").write_text(json.dumps(result))
    page = Page(write_report(tmp_path, assets=tmp_path / "assets").read_text())
    text = " ".join(" ".join(page.text).split())
    assert "0.875 ± 0.012" in text
    assert "tasks · brackets · recovered 0.25" in text
    assert "by_position from fvu 0 0.5 8 0.75" in text
    assert "by_norm edge fvu 1 0.125 2 0.0625" in text
    assert "cosine_of_nearest" in text
    assert "probe_auc_se" not in text
    rows = {
        row["figure"]: row
        for row in csv.DictReader(io.StringIO((tmp_path / "assets/figures.csv").read_text()))
    }
    assert rows["probe_auc"]["value"] == "0.875"
    assert rows["probe_auc"]["standard_error"] == "0.01234"
    assert (tmp_path / "assets/topk-40-2-by_norm.csv").read_text().split() == [
        "edge,fvu",
        "1,0.125",
        "2,0.0625",
    ]


def test_figures_and_tables_are_exported(run, tmp_path):
    path = run[0]
    write_report(path, out=tmp_path / "report.html", assets=tmp_path / "assets")
    found = {p.name for p in (tmp_path / "assets").iterdir()}
    assert {"figures.csv", "topk-40-2-training.csv", "topk-40-2-log10_density.csv"} <= found
    assert {"fvu-by-l0.svg", "fvu-by-l0.png", "ce-recovered-by-l0.svg", "training-loss.png"} <= found
    assert (tmp_path / "assets/fvu-by-l0.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "assets/fvu-by-l0.svg").read_text()
    assert "#2166ac" in svg
    assert "var(--" not in svg
    assert "currentColor" not in svg
    stored = [json.loads(line) for line in (path / "topk-40-2/metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "assets/topk-40-2-training.csv").read_text())))
    assert [{k: json.loads(v) for k, v in row.items()} for row in rows] == stored


def test_a_sweep_has_its_frontiers_and_links_to_its_pages(run):
    path, results, html, page = run
    labels = [a["aria-label"] for a in Page(html).all("svg")]
    l0, fvu = results[0]["l0"], results[0]["fvu"]
    assert any(x.startswith("FVU by L0") and f"topk-40-2 at {l0:.3g} has {fvu:.4g}" in x for x in labels)
    assert any(x.startswith("CE recovered by L0") for x in labels)
    links = {a["href"] for a in Page(html).all("a") if not a["href"].startswith("#")}
    assert links == {"report-topk-40-2.html", "report-topk-40-3.html"}
    assert all((path / link).exists() for link in links)
    assert {a["href"] for a in Page(page).all("a") if not a["href"].startswith("#")} == {"report.html"}


def test_what_stopped_at_a_rung_is_shown_as_such(tmp_path):
    saes = write_run(tmp_path, n=3)
    saes[0].cfg |= {"stopped_at_rung": 250, "rows": 256}
    saes[0].save(saes[0].path)
    page = Page(write_report(tmp_path).read_text())
    text = " ".join("".join(page.text).split())
    assert (
        "Three sparse autoencoders, trained on 512 activation rows (1 of them stopped at rungs, on fewer)"
        in text
    )
    assert text.count("stopped at 250 rows") == 1
    assert text.count("topk-40-2, stopped") == 1
    alone = " ".join("".join(Page((tmp_path / "report-topk-40-2.html").read_text()).text).split())
    assert "256 rows in batches of 64" in alone
    assert "stopped at the rung of 250 rows, where its rivals did better" in alone


def test_a_line_of_the_frontier_joins_what_differs_in_sparsity_alone(tmp_path):
    names = ["topk-40-2", "topk-40-4", "topk-40-2-lr0.001", "topk-40-1e-05-lr0.001", "other"]
    families = [Entry(name, tmp_path, random_sae(2).cfg, []).family for name in names]
    assert families[0] == families[1] == families[4]
    assert families[2] == families[3] != families[0]
    sited = Entry(f"topk-40-2-lr0.001-{SITE}", tmp_path, random_sae(2).cfg, [])
    assert sited.short_name == "topk-40-2-lr0.001"
    assert sited.family == families[2]


def test_a_hostile_corpus_stays_text(run, ds):
    html = run[3]
    page = Page(html)
    met = set(np.unique(ds.split("validation").input_ids)) & set(HOSTILE)
    assert {7, 8, 9, 11} <= met, "the toy corpus must contain what this test is about"
    assert len([a for a in page.all("script") if "type" not in a]) == 1  # ours
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "alert(" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    tokens = payload.unpack(page.blocks[0])[1]["tokens"]
    assert {HOSTILE[7], HOSTILE[8], f"{QUIET}⟨202E⟩{LOUD}evil"} <= set(tokens)
    assert max(map(len, tokens)) < 100
    assert len(html) < 1_000_000


def test_markup_is_balanced(run):
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

    for html in run[2:]:
        parser = Balance()
        parser.stack = []
        parser.feed(html)
        parser.close()
        assert parser.stack == []


def test_nothing_is_fetched(run):
    for html in run[2:]:
        page = Page(html)
        links = [a[name] for _, a in page.tags for name in ("src", "xlink:href") if name in a]
        links += [a["href"] for tag, a in page.tags if tag == "link"]
        assert links
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "@import" not in html
        assert "http://" not in html.replace("http://www.w3.org/", "")
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
        anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
        assert {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")} <= anchors


def test_the_blocks_hold_the_dashboards(run, ds, lm, tokenizer):
    path, results, _, html = run
    found = Page(html).blocks
    index, meta = payload.unpack(found[0])
    s = random_sae(2, seed=2)
    view = ds.split("validation")
    W_U = lm.model.lm_head.weight
    table = path / "topk-40-2" / "latents.parquet"
    d = build(s, view, view.n_rows, table, n_latents=D_SAE, seed=0, W_U_VD=W_U)
    assert meta["n_rows"] == results[0]["n_rows"]
    assert index["latent"].tolist() == list(range(D_SAE))
    rows = read_parquet(table)
    for name in ("fires", "density", "mean_activation", "max_activation"):
        assert index[f"column {name}"] == pytest.approx([row[name] for row in rows])
    assert index["largest"] == pytest.approx([row["max_activation"] for row in rows])
    texts = TokenTexts(tokenizer)
    n = d.snippets
    (block, _) = payload.unpack(found[1])
    ids = block["token_low"].astype(int) | block["token_high"].astype(int) << 8
    assert [meta["tokens"][i] for i in ids] == [
        texts[int(t)] if t >= 0 else "" for t in n.token_ids.reshape(-1)
    ]
    largest = np.repeat(n.largest, np.diff(n.starts))[:, None]
    error = block["share"].reshape(-1, WIDTH) / 255 * largest - n.values
    assert np.abs(error).max() <= largest.max() / 510 + 1e-6 or (block["share"] == 1).any()
    assert ((block["share"].reshape(-1, WIDTH) > 0) == (n.values > 0)).all()
    assert index["value"].tolist() == n.value.tolist() == n.values[:, BEFORE].tolist()
    logit = block["logit"].reshape(D_SAE, -1) / 32767 * block["logit_scale"][:, None]
    assert logit[:, :10] == pytest.approx(d.logits.top, abs=1e-3)
    assert block["nearest"].tolist() == d.nearest_ids.reshape(-1).tolist()


def test_logit_effects_and_neighbours_are_those_of_the_definition():
    g = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(30, 8, generator=g), torch.randn(50, 8, generator=g)
    found = logit_effects(W_dec, W_U)
    all_logits = (W_dec.double() @ W_U.double().T).numpy()
    for i in range(30):
        order = np.argsort(-all_logits[i])
        assert found.top_ids[i].tolist() == order[:10].tolist()
        assert found.bottom_ids[i].tolist() == order[::-1][:10].tolist()
        assert found.top[i] == pytest.approx(all_logits[i][order[:10]], abs=1e-5)
    assert (found.histogram.sum(1) == 50).all()
    assert (found.histogram[:, 0] > 0).all()
    ids, cosines = nearest_latents(W_dec, np.array([4, 9]))
    unit = (W_dec / W_dec.norm(dim=1, keepdim=True)).double().numpy()
    for row, f in enumerate((4, 9)):
        cos = unit @ unit[f]
        cos[f] = -9
        assert ids[row].tolist() == np.argsort(-cos)[:6].tolist()
        assert cosines[row] == pytest.approx(np.sort(cos)[::-1][:6], abs=1e-6)


def test_a_site_of_another_width_has_no_logit_effects(run, ds, tokenizer):
    table = run[0] / "topk-40-2" / "latents.parquet"
    view = ds.split("validation")
    d = build(
        random_sae(2, seed=2), view, 64, table, n_latents=4, seed=0, W_U_VD=torch.zeros(64, D_MODEL + 1)
    )
    assert d.logits is None
    assert len(d.latents) == 4
    assert (read_columns(table, D_SAE)["fires"][d.latents] > 0).all()


def test_blocks_of_many_latents_come_back_as_they_were():
    arrays = {
        "a": np.arange(5, dtype=np.uint8),
        "b": np.array([1.5, -2], np.float32),
        "c": np.zeros(0, np.int16),
    }
    found, meta = payload.unpack(payload.pack(arrays, {"tokens": ["é", "\ud800"]}))
    assert meta == {"tokens": ["é", "\ud800"]}
    for name, array in arrays.items():
        assert found[name].tolist() == array.tolist()
        assert found[name].dtype == array.dtype


def test_the_same_files_give_the_same_page(run, ds, lm, tokenizer, tmp_path):
    path, _, html, page = run
    again = write_report(path, ds, tokenizer=tokenizer, model=lm, out=tmp_path / "report.html")
    assert again.read_text() == html
    assert (tmp_path / "report-topk-40-2.html").read_text() == page


def test_one_sae_is_one_file(run, ds, tokenizer, tmp_path):
    out = write_report(run[0] / "topk-40-2", ds, tokenizer=tokenizer, out=tmp_path / "x.html")
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]
    page = Page(out.read_text())
    assert len(page.blocks) == 2
    assert "The LM was not given" in "".join(page.text)


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
    assert "".join(page.text).count("vs zeros") == 1
    assert len([a for a in page.all("td") if a.get("data-metric") == "kl"]) == 1


def test_without_the_dataset_the_figures_are_still_there(run, tmp_path):
    out = tmp_path / "r.html"
    page = Page(
        write_report(run[0], None, out=out, dataset_note="The dataset is on another disk.").read_text()
    )
    assert "The dataset is on another disk." in "".join(page.text)
    assert len([a for a in page.all("td") if "data-metric" in a]) == 24
    assert Page((tmp_path / "r-topk-40-2.html").read_text()).blocks == []


def test_stale_results_are_named(tmp_path, ds, tokenizer):
    (s,) = write_run(tmp_path, n=1)
    evaluate_many([s], ds)
    s.W_dec.data[0] *= -1
    s.save(s.path)
    page = Page(write_report(tmp_path, ds, tokenizer=tokenizer).read_text())
    assert "not those that were evaluated" in "".join(page.text)
    assert page.blocks == []


def test_a_torn_last_line_of_metrics_is_left_out_and_a_torn_middle_refused(tmp_path):
    (s,) = write_run(tmp_path, n=1)
    metrics = s.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 9, "ro')
    assert "<svg" in write_report(tmp_path).read_text()
    metrics.write_text('{"step"\n' + metrics.read_text())
    with pytest.raises(CorruptObject, match=r"metrics\.jsonl line 1"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "latents.parquet is damaged"),
        (lambda data: b"", "latents.parquet is damaged"),
        (lambda data: table_of(latent=range(D_SAE)), "not fires of 40 latents"),
        (lambda data: table_of(fires=range(7)), "it has 7 rows"),
    ],
    ids=["torn", "empty", "no counts", "another SAE's"],
)
def test_a_damaged_table_of_latents_is_one_error_with_its_remedy(
    spoil, message, run, ds, tokenizer, tmp_path
):
    shutil.copytree(run[0] / "topk-40-2", tmp_path / "topk-40-2")
    table = tmp_path / "topk-40-2" / "latents.parquet"
    table.write_bytes(spoil(table.read_bytes()))
    with pytest.raises(CorruptObject, match=f"{message}.*python -m sae eval .* --force") as caught:
        write_report(tmp_path, ds, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def table_of(**columns):
    out = io.BytesIO()
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), out)
    return out.getvalue()


@pytest.mark.parametrize("lost", ["n_rows", "split", "dataset", "sae", "n_tokens"])
def test_an_evaluation_that_lacks_something_is_one_error(lost, run, tmp_path):
    result = json.loads((run[0] / "topk-40-2" / "eval.json").read_text())
    del result[lost]
    (s,) = write_run(tmp_path, n=1)
    (s.path / "eval.json").write_text(json.dumps(result))
    with pytest.raises(CorruptObject, match=f"lacks {lost}.*--force"):
        write_report(tmp_path)
    (s.path / "eval.json").write_text(json.dumps(result)[:50])
    with pytest.raises(CorruptObject, match="not a JSON object.*--force"):
        write_report(tmp_path)


def test_a_run_that_goes_on_is_told_from_one_that_is_not_there(tmp_path, capsys):
    from sae.__main__ import main

    write_run(tmp_path, n=2)
    names = ["topk-40-2", "topk-40-3"]
    (tmp_path / "run.json").write_text(json.dumps({"saes": {name: {} for name in names}}))
    (tmp_path / names[1] / "sae.json").unlink()
    text = "".join(Page(write_report(tmp_path).read_text()).text)
    assert "Not finished, and so not shown: topk-40-3." in text
    (tmp_path / names[0] / "sae.json").unlink()
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has not finished" in line
    assert "goes on from the last checkpoint" in line


@pytest.mark.parametrize("option", ["out", "assets", "neuronpedia"])
def test_a_place_that_cannot_be_written_is_found_before_any_work(option, tmp_path, ds):
    write_run(tmp_path, n=1)
    (tmp_path / "file").write_text("")
    places = {"out": tmp_path / "report.html", option: tmp_path / "file" / "below" / "x.html"}

    class Untouched:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was used")

    with pytest.raises(SpecError, match=f"file/below.* cannot be written .*--{option}"):
        write_report(tmp_path, ds, tokenizer=Untouched(), **places)
    assert not list(tmp_path.glob("*.html"))


def test_results_of_tasks_are_tables(tmp_path):
    (s,) = write_run(tmp_path, n=1)
    scores = {"auc": 0.75, "auc_ood": 0.5}
    found = {
        "probing": {
            "string": {"latents": [3, 1], "k1": scores, "dense": scores},
            "number": {"skipped": "fewer than 20 rows"},
        },
        "brackets": {"n": 100, "accuracy": 0.9, "recovered": 0.8125},
        "ioi": {"n": 10, "accuracy": 0.5, "skipped": "the clean LM is right on 50%"},
    }
    (s.path / "tasks.json").write_text(json.dumps(found))
    page = Page(write_report(tmp_path, assets=tmp_path / "assets").read_text())
    text = " ".join(" ".join(page.text).split())
    assert "string 3, 1 0.75 0.5 0.75 0.5 – number – – – – – fewer than 20 rows" in text
    assert "brackets 100 0.9 0.8125 – ioi 10 0.5 – the clean LM is right on 50%" in text
    assert {"topk-40-2-probing.csv", "topk-40-2-tasks.csv"} <= {
        p.name for p in (tmp_path / "assets").iterdir()
    }


def test_a_long_curve_is_thinned_in_its_picture_and_whole_in_its_table(tmp_path):
    (s,) = write_run(tmp_path, n=1)
    lines = [{"step": i, "rows": i, "loss": 1.0 + i} for i in range(1, 2002)]
    (s.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(tmp_path, assets=tmp_path / "assets").read_text()
    assert len(html) < 150_000
    with open(tmp_path / "assets" / "topk-40-2-training.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 2002))


def test_no_sae_and_no_place_are_one_clear_error(tmp_path):
    with pytest.raises(SpecError, match="no finished SAE"):
        write_report(tmp_path)
    write_run(tmp_path, n=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"):
        write_report(tmp_path, out=tmp_path / "file" / "report.html")


def test_command_writes_beside_the_run_and_names_an_unreachable_dataset(tmp_path):
    (s,) = write_run(tmp_path, n=1)
    s.cfg["dataset"]["url"] = str(tmp_path / "nowhere")
    s.save(s.path)
    outcome = CliRunner().invoke(report_command, [str(tmp_path)], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert outcome.output.strip() == str(tmp_path / "report.html")
    assert "could not be opened" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.03124, 0.00141, "0.0312 ± 0.0014"),
        (98.42, 0.072, "98.420 ± 0.072"),
        (1234.5, 67.0, "1,234 ± 67"),
        (0.5, None, "0.5"),
        (1536, None, "1,536"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_numbers_with_their_errors(value, error, text):
    assert with_error(value, error) == text


def test_part_of_a_character_shows_as_a_replacement():
    from actcache.lm import load_tokenizer

    tokenizer = load_tokenizer("bundled:stdlib-gpt2")
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("é € 😀\n    return x", add_special_tokens=False)
    shown = [texts[i] for i in ids]
    assert "return" in "".join(shown)
    assert all(shown)
    assert any("�" in text for text in shown) or len(ids) < 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("<b>&\"'", "<b>&\"'"),
        ("x\n", "x\x01↵\x02"),
        ("\t", "\x01⇥\x02"),
        ("   y", "\x01···\x02y"),
        ("\u202ex", "\x01⟨202E⟩\x02x"),
        ("\x01\x02", "\x01⟨0001⟩\x02\x01⟨0002⟩\x02"),
        ("é😀", "é😀"),
        ("z" * 61, "z" * 60 + "\x01…\x02"),
    ],
)
def test_visible_text(text, shown):
    assert visible(text) == shown


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

    upload, figures = str(tmp_path / "upload"), str(tmp_path / "figures")
    assert main(["report", str(out), "--latents", "3", "--neuronpedia", upload, "--assets", figures]) == 0
    page = Page((out / "report.html").read_text())
    (fvu,) = (a["data-value"] for a in page.all("td") if a.get("data-metric") == "fvu")
    assert json.loads(fvu) == printed["fvu"]
    index, meta = payload.unpack(page.blocks[0])
    assert len(index["latent"]) == 3
    assert meta["n_logits"] == 10
    assert (tmp_path / "figures" / "figures.csv").exists()
    assert len(list((tmp_path / "upload").glob("*/1-res-topk-64-8/*/batch-0.jsonl.gz"))) == 2
    for row in read_parquet(s.path / "latents.parquet"):
        for sequence, position, value in zip(
            row["top_sequence"][:1], row["top_position"][:1], row["top_value"][:1], strict=True
        ):
            rows = view.rows(slice(None))
            (i,) = np.flatnonzero((rows.sequence == sequence) & (rows.position == position))
            assert rows.token_id[i] == view.context(sequence)[position]
            assert float(s.encode(x[i].astype(np.float32))[row["latent"]]) == pytest.approx(value, rel=1e-4)
