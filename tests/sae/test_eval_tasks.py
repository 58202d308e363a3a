"""Logit-difference tasks and probing: files are checked, weak models are skipped, and both run on the bundled LM."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from toy_dataset import ConstantSAE, IdentitySAE

from actcache.errors import SpecError
from sae.evals.logit_difference import TASKS, logit_difference, read_task
from sae.evals.probing import labelled_rows, python_files, sparse_probing

SITE = "blocks.3.hook_resid_post"
BUNDLED = "bundled:stdlib-gpt2"


def test_task_files_are_whole_and_a_bad_line_is_named(tmp_path):
    for name in TASKS:
        pairs = read_task(name)
        assert len(pairs) >= 48
        assert all(pair["answer"] != pair["wrong"] for pair in pairs)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b", "wrong": "c"}\n{"prompt": 1}\n')
    with pytest.raises(SpecError, match="line 2 needs prompt, answer and wrong"):
        read_task(str(tmp_path / "bad.jsonl"))
    with pytest.raises(SpecError, match="brackets, ioi"):
        read_task("nothing")


@pytest.fixture(scope="module")
def bundled():
    from actcache.lm import load_lm, load_tokenizer

    return load_lm(BUNDLED), load_tokenizer(BUNDLED)


@pytest.mark.slow
def test_the_bundled_lm_closes_brackets_and_saes_keep_what_they_must(bundled):
    lm, tokenizer = bundled
    pairs, mean = read_task("brackets"), torch.zeros(lm.d_model)
    perfect = logit_difference(IdentitySAE(lm.d_model, site=SITE), lm, tokenizer, pairs, mean)
    assert perfect["accuracy"] >= 0.75
    assert perfect["recovered"] == pytest.approx(1, abs=1e-4)
    ablated = logit_difference(ConstantSAE(torch.zeros(lm.d_model), site=SITE), lm, tokenizer, pairs, mean)
    assert ablated["recovered"] == pytest.approx(0, abs=1e-6)
    turned = [{**pair, "answer": pair["wrong"], "wrong": pair["answer"]} for pair in pairs]
    skipped = logit_difference(IdentitySAE(lm.d_model, site=SITE), lm, tokenizer, turned, mean)
    assert "the clean LM is right on" in skipped["skipped"]
    assert json.loads(json.dumps(perfect)) == perfect
    long = [{"prompt": "a", "answer": "several tokens of text", "wrong": "b"}]
    with pytest.raises(SpecError, match="must be one"):
        logit_difference(IdentitySAE(lm.d_model, site=SITE), lm, tokenizer, long, mean)


@pytest.mark.slow
def test_probes_on_the_bundled_lm_tell_comments_apart_out_of_distribution_too(bundled):
    lm, tokenizer = bundled
    paths = sysconfig.get_paths()
    texts = python_files(sorted(Path(paths["stdlib"]).glob("*.py")), 40)
    other = python_files(sorted(Path(paths["purelib"]).glob("pip/**/*.py")), 20)
    assert len(texts) == 40
    train, test, ood = (
        labelled_rows(lm, tokenizer, t, SITE, 128, 4_000) for t in (texts[:20], texts[20:], other)
    )
    found = sparse_probing(IdentitySAE(lm.d_model, site=SITE), train, test, ood)
    told = {label: scores["dense"]["auc"] for label, scores in found.items() if "dense" in scores}
    assert len(told) >= 3
    assert min(told.values()) > 0.8
    for scores in found.values():
        if "dense" in scores:
            assert scores["k1"]["auc"] > 0.5
            assert 0.5 < scores["dense"]["auc_ood"] <= 1
