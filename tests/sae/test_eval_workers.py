"""One worker or eight, alive or killed, give the same figures; on a harvested dataset of real blocks."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))

from tiny_harvest import SITES, tiny_spec

import actcache
from sae import SAE
from sae.__main__ import main
from sae.evals import evaluate_many
from sae.evals.latents import read_parquet
from sae.evals.workers import RayPool


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evals")
    spec = tiny_spec(directory, n_tokens=6_000, block_rows=1024)
    return actcache.harvest(spec, root=str(directory / "root"), engine="local", progress=False)


def saes(ds, path):
    found = []
    for i, site in enumerate(SITES):
        d_in = ds.d_in(site)
        g = torch.Generator().manual_seed(i)
        W_dec = torch.nn.functional.normalize(torch.randn(40, d_in, generator=g), dim=1)
        cfg = {"architecture": "topk", "d_in": d_in, "d_sae": 40, "k": 4, "site": site}
        s = SAE(cfg, W_dec.T.contiguous(), torch.zeros(40), W_dec, torch.zeros(d_in))
        s.save(path / str(i))
        found.append(s)
    return found


def model_of(ds):
    return str(Path(ds.url.removeprefix("file://")).parent.parent / "tiny-gpt2")


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def alone(ds, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    return path, evaluate_many(saes(ds, path), ds, model_of(ds), "train", n_sequences=96)


def test_documents_are_what_errors_are_taken_over(ds, alone):
    """The train split has more documents than sequences of 16 tokens would suggest of whole ones."""
    view = ds.split("train")
    document = view.documents(slice(0, view.n_rows)).document
    s, site = alone[1][0], SITES[0]
    x = view.read(site, slice(0, view.n_rows)).astype(np.float64)
    e = x - saes(ds, alone[0])[0](torch.from_numpy(x.astype(np.float32))).numpy()

    def mse(keep):
        return (e[keep] ** 2).sum() / keep.sum()

    left = np.array([mse(document != d) for d in np.unique(document)])
    expected = np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    assert s["standard_errors"]["mse"] == pytest.approx(expected, rel=1e-6)


def test_a_stored_result_is_a_hit_by_dataset_sae_and_settings(ds, alone, monkeypatch):
    import sae.evals.evaluation as evaluation

    path, results = alone
    monkeypatch.setattr(evaluation, "_evaluate", lambda *a: pytest.fail("it was evaluated again"))
    again = evaluate_many(saes(ds, path), ds, model_of(ds), "train", n_sequences=96)
    assert again == results
    assert len(list((path / "0" / "evals").glob("*.parquet"))) == 1
    with pytest.raises(pytest.fail.Exception):
        evaluate_many(saes(ds, path), ds, None, "train")


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_ray_workers_agree_with_this_process(ray_session, ds, alone, tmp_path, workers):
    found = evaluate_many(saes(ds, tmp_path), ds, model_of(ds), "train", n_sequences=96, workers=workers)
    assert_same(found, alone[1])
    mine, theirs = (read_parquet(p / "0" / "latents.parquet") for p in (tmp_path, alone[0]))
    for a, b in zip(mine, theirs, strict=True):
        assert a["fires"] == b["fires"]
        assert a["top_position"] == b["top_position"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_part_of_a_killed_worker_is_done_again(ray_session, ds, alone, tmp_path, monkeypatch, caplog):
    killed = []
    submit = RayPool._submit

    def submit_and_kill(self, calls, waiting, running, limit):
        placed = [n for n in range(len(self._actors)) if n not in self._starting.values()]
        first = ray_session.get(self._actors[placed[0]].pid.remote()) if placed and not killed else None
        submit(self, calls, waiting, running, limit)
        if first is not None:
            assert placed[0] in {number for number, _ in running.values()}
            killed.append(first)
            os.kill(first, signal.SIGKILL)

    monkeypatch.setattr(RayPool, "_submit", submit_and_kill)
    found = evaluate_many(saes(ds, tmp_path), ds, model_of(ds), "train", n_sequences=96, workers=2)
    assert killed
    assert "was lost; starting another" in caplog.text
    assert_same(found, alone[1])


# --- from the command line --------------------------------------------------------------------


def sae_here(capsys, *arguments):
    """What `python -m sae` prints in a process whose standard output is no terminal."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


@pytest.mark.ray
def test_one_ray_worker_by_the_command_line_agrees_with_this_process(
    ray_session, ds, alone, tmp_path, capsys
):
    saes(ds, tmp_path)
    given = ["--data", ds.url, "--model", model_of(ds), "--split", "train", "--sequences", 96]
    found = sae_here(capsys, "eval", tmp_path / "0", tmp_path / "1", *given, "--workers", 1, "--json")
    assert_same(json.loads(found), alone[1])


def test_an_sae_on_two_datasets_shows_how_it_transfers(ds, tmp_path, tmp_path_factory, capsys):
    directory = tmp_path_factory.mktemp("chat")
    spec = tiny_spec(directory, n_tokens=2_000, block_rows=1024, seed=1)
    chat = actcache.harvest(spec, root=str(directory / "root"), engine="local", progress=False)
    saes(ds, tmp_path)
    two = ["--data", ds.url, "--data", chat.url, "--no-model", "--split", "train"]
    base, other = json.loads(sae_here(capsys, "eval", tmp_path / "0", *two, "--json"))
    assert (base["dataset"], other["dataset"]) == (ds.id, chat.id)
    assert base["fvu"] != other["fvu"]
    assert json.loads((tmp_path / "0" / "eval.json").read_text()) == base
    printed = sae_here(capsys, "eval", tmp_path / "0", *two)
    lines = [line.split() for line in printed.splitlines()]
    assert [line[1] for line in lines[1:3]] == [ds.url.rsplit("/", 1)[-1], chat.url.rsplit("/", 1)[-1]]
    assert [line[3] for line in lines[1:3]] == [f"{r['fvu']:.4f}" for r in (base, other)]


def test_a_table_that_is_piped_is_not_cut(ds, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = "an-sae-with-a-name-that-is-longer-than-any-column-would-be-in-a-terminal-of-eighty"
    saes(ds, tmp_path)[0].save(tmp_path / name)
    given = ["--data", ds.url, "--model", model_of(ds), "--split", "train", "--sequences", 16]
    head, row, *_ = sae_here(capsys, "eval", tmp_path / name, *given).splitlines()
    assert row.startswith(name)
    assert "CE recovered, zero" in head
    assert "CE recovered, mean" in head


def test_two_saes_are_compared_from_the_command_line(ds, tmp_path, capsys):
    one = saes(ds, tmp_path)[0]
    same = json.loads(sae_here(capsys, "compare", tmp_path / "0", tmp_path / "0", "--json"))
    assert same == pytest.approx(dict.fromkeys(same, 1.0), abs=1e-6)
    one.W_dec.data = torch.nn.functional.normalize(torch.randn(one.W_dec.shape), dim=1)
    one.save(tmp_path / "other")
    printed = sae_here(capsys, "compare", tmp_path / "0", tmp_path / "other")
    figures = dict(line.split() for line in printed.splitlines())
    assert 0 < float(figures["mcc"]) <= float(figures["max_cosine_to_other"]) < 1
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "nowhere")]) != 0
