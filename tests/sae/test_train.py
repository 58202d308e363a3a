"""The training loop: what it promises about data, scale, metrics and errors."""

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from actcache.errors import SpecError
from sae.architectures import Architecture
from sae.learner import geometric_median

SITE = "blocks.1.hook_resid_post"
TOPK, BATCHTOPK = sae.TopK(d_sae=64, k=6), sae.BatchTopK(d_sae=64, k=6)


def _acts(n: int = 4000, d: int = 20, seed: int = 0, scale: float = 7.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = rng.standard_exponential((n, 50)) * (rng.random((n, 50)) < 0.1)
    return (scale * (codes @ rng.standard_normal((50, d)) + 2)).astype(np.float32)


def _stream(acts: np.ndarray | None = None, **options: object) -> sae.ArrayStream:
    options = {"batch_size": 250, "site": SITE, **options}
    return sae.ArrayStream(_acts() if acts is None else acts, **options)  # type: ignore[arg-type]


def _fvu(s: sae.SAE, acts: np.ndarray) -> float:
    x = torch.from_numpy(acts)
    return float((s(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def _tensors(s: sae.SAE) -> dict[str, bytes]:
    return {name: t.contiguous().numpy().tobytes() for name, t in s.state_dict().items()}


def test_one_stream_trains_many_saes_and_each_equals_the_one_trained_alone() -> None:
    training = sae.Training(n_rows=5000, seed=3, dead_after_rows=1000)
    together = sae.train(_stream(), [TOPK, BATCHTOPK], training)
    for config, s in zip([TOPK, BATCHTOPK], together, strict=True):
        (alone,) = sae.train(_stream(), config, training)
        assert _tensors(alone) == _tensors(s)


def test_saes_take_raw_activations_of_any_leading_shape() -> None:
    acts = _acts()
    for s in sae.train(_stream(acts), [TOPK, BATCHTOPK], sae.Training(n_rows=20_000, lr=3e-3)):
        assert _fvu(s, acts) < 0.3
        assert s.W_dec.norm(dim=1).sub(1).abs().max() < 1e-6
        assert s.W_enc.shape == (20, 64)
        block = torch.from_numpy(acts[:24]).reshape(2, 3, 4, 20)
        assert s.encode(block).shape == (2, 3, 4, 64)
        assert torch.allclose(s(block).reshape(24, 20), s(acts[:24]), atol=1e-4)
        assert s.cfg["site"] == SITE


def test_the_scale_of_the_activations_does_not_matter_with_input_scaling() -> None:
    training = sae.Training(n_rows=5000)
    for config in (TOPK, BATCHTOPK):
        (small,) = sae.train(_stream(_acts(scale=1.0)), config, training)
        (large,) = sae.train(_stream(_acts(scale=1024.0)), config, training)
        assert torch.allclose(small.W_dec, large.W_dec, atol=1e-4)
        assert torch.allclose(small.b_dec * 1024, large.b_dec, rtol=1e-3)
        if config is BATCHTOPK:
            assert large.threshold is not None
            assert float(large.threshold) == pytest.approx(1024 * float(small.threshold), rel=1e-3)


def test_without_input_scaling_the_weights_are_the_trained_ones() -> None:
    (s,) = sae.train(
        _stream(), TOPK, sae.Training(n_rows=250, input_scale="none", b_dec_init="mean", lr=1e-9)
    )
    first = next(iter(_stream()))[SITE]
    assert torch.allclose(s.b_dec, torch.from_numpy(first.mean(0)), rtol=1e-4)
    assert s.cfg["input_scale_folded"] == 1.0


def test_more_rows_than_the_stream_serves_is_refused_before_training() -> None:
    with pytest.raises(SpecError, match=r"n_rows is 9,000, but the stream serves 2 x 4,000 rows.*epochs=3"):
        sae.train(_stream(epochs=2), TOPK, sae.Training(n_rows=9000))


def test_a_stream_that_ends_early_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Short(sae.ArrayStream):
        def __iter__(self) -> Iterator:
            yield next(super().__iter__())

    stream = Short(_acts(), batch_size=250, site=SITE)
    with pytest.raises(SpecError, match="the stream ended after 250 rows, but n_rows is 1,000"):
        sae.train(stream, TOPK, sae.Training(n_rows=1000), out=tmp_path / "run")


def test_the_run_ends_at_exactly_n_rows(tmp_path: Path) -> None:
    (s,) = sae.train(_stream(), TOPK, sae.Training(n_rows=1111, log_every=1), out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "topk-64-6" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines] == [250, 500, 750, 1000, 1111]
    assert s.cfg["rows"] == 1111


def test_metrics_say_what_the_batch_says(tmp_path: Path) -> None:
    acts = _acts(250)
    stream = _stream(acts)
    training = sae.Training(n_rows=5000, log_every=7, dead_after_rows=500)
    sae.train(stream, [TOPK, BATCHTOPK], training, out=tmp_path)
    for name in ("topk-64-6", "batchtopk-64-6"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 8, 15, 20]
        keys = ["step", "rows", "loss", "l0", "fvu", "dead", "lr", "rows_per_s", "stall_share"]
        assert all(list(line) == keys for line in lines)
        assert lines[-1]["l0"] == pytest.approx(6)
        assert lines[-1]["fvu"] < lines[0]["fvu"]
        assert all(0 <= line["stall_share"] <= 1 and line["rows_per_s"] > 0 for line in lines)
    s = sae.load(tmp_path / "topk-64-6")
    # the batch is the whole data, and the last step's learning rate is near zero
    assert _fvu(s, acts) == pytest.approx(lines_fvu(tmp_path / "topk-64-6"), rel=0.02)


def lines_fvu(directory: Path) -> float:
    return float(json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["fvu"])


def test_the_learning_rate_rises_holds_and_falls() -> None:
    rules = sae.Training(n_rows=1000, lr_warmup_rows=100, lr_decay=0.2).rules(TOPK)
    factors = {rows: rules.lr_factor(rows, 10) for rows in (0, 40, 90, 500, 800, 900, 990)}
    assert factors == pytest.approx({0: 0.1, 40: 0.5, 90: 1, 500: 1, 800: 1, 900: 0.5, 990: 0.05})
    flat = sae.Training(n_rows=1000, lr_warmup_rows=0, lr_decay=0, sparsity_warmup_rows=50).rules(TOPK)
    assert flat.lr_factor(999, 1) == 1
    assert [flat.sparsity_factor(rows, 10) for rows in (0, 30, 40, 900)] == pytest.approx([0.2, 0.8, 1, 1])


def test_defaults_follow_the_sources() -> None:
    training = sae.Training(n_rows=10**9)
    assert training.rules(sae.TopK(d_sae=2**14, k=8)).lr == pytest.approx(2e-4)
    assert training.rules(sae.TopK(d_sae=2**12, k=8)).lr == pytest.approx(4e-4)
    assert training.rules(TOPK).dead_after_rows == 10_000_000
    assert sae.Training(n_rows=2_000_000).rules(TOPK).dead_after_rows == 200_000
    assert training.rules(TOPK).betas == (0.9, 0.999)
    jump, gated, standard = (
        sae.JumpReLU(d_sae=64),
        sae.Gated(d_sae=64, l1_coefficient=1),
        sae.Standard(d_sae=64, l1_coefficient=1),
    )
    assert (training.rules(jump).lr, training.rules(jump).betas) == (7e-5, (0.0, 0.999))
    assert (training.rules(gated).lr, training.rules(gated).betas) == (5e-5, (0.0, 0.999))
    assert (training.rules(standard).lr, training.rules(standard).betas) == (5e-5, (0.9, 0.999))
    assert training.rules(standard).sparsity_warmup_rows == 10**9 // 20


def test_an_saes_own_settings_come_before_the_runs_and_those_before_the_published_ones() -> None:
    own = sae.JumpReLU(d_sae=64, optimiser=sae.Optimiser(lr=1e-2, lr_warmup_rows=7))
    training = sae.Training(n_rows=1000, lr=1e-3, lr_decay=0.5)
    rules = training.rules(own)
    assert (rules.lr, rules.lr_warmup_rows, rules.lr_decay, rules.betas) == (1e-2, 7, 0.5, (0.0, 0.999))
    assert training.rules(sae.JumpReLU(d_sae=64)).lr == 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_rows": 0}, "n_rows is 0; it must be at least 1"),
        ({"n_rows": 1, "lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"n_rows": 1, "lr_decay": 2.0}, "lr_decay is 2.0"),
        ({"n_rows": 1, "step": "fast"}, "step is 'fast'; it must be one of sparse, dense"),
        (
            {"n_rows": 1, "input_scale": "unity"},
            "input_scale is 'unity'; it must be one of sqrt_d, unit, none",
        ),
        ({"n_rows": 1, "betas": (0.9, 1.0)}, "betas are"),
    ],
)
def test_training_settings_that_make_no_sense_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sae.Training(**values)


ALL = [
    sae.Standard(d_sae=64, l1_coefficient=0.5),
    sae.Gated(d_sae=64, l1_coefficient=0.5),
    sae.JumpReLU(d_sae=64),
    TOPK,
    BATCHTOPK,
    sae.Matryoshka(d_sae=64, k=6),
]


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.architecture)
@pytest.mark.parametrize("scale", ["sqrt_d", "unit"])
def test_training_goes_on_from_a_finished_sae_as_it_was(config: Architecture, scale: str) -> None:
    """With a learning rate of almost nothing, what comes out is what went in, in raw units."""
    settings = sae.Training(n_rows=2000, lr=1e-3, input_scale=scale)  # type: ignore[arg-type]
    (s,) = sae.train(_stream(), config, settings)
    (same,) = sae.train(_stream(), config, replace(settings, n_rows=1, lr=1e-12), start=s)
    if config.learns_threshold_by_average:
        assert 0.8 < same.threshold / s.threshold < 1.3  # the one step moved it by a tenth of the way
        same.threshold = s.threshold
    x = _acts(500, seed=1)
    scaled = float(s(x).abs().max())
    assert (same(x) - s(x)).abs().max() < 1e-5 * scaled
    (more,) = sae.train(_stream(), config, settings, start=s)
    assert _fvu(more, _acts()) < _fvu(s, _acts())


def test_an_sae_of_another_shape_can_not_be_started_from() -> None:
    (s,) = sae.train(_stream(), TOPK, sae.Training(n_rows=250))
    with pytest.raises(
        SpecError, match="start from is topk with d_in 20 and d_sae 64; wanted is topk .* d_sae 32"
    ):
        sae.train(_stream(), replace(TOPK, d_sae=32), sae.Training(n_rows=250), start=s)
    with pytest.raises(SpecError, match="Gated starts from gated only"):
        sae.train(_stream(), ALL[1], sae.Training(n_rows=250), start=s)


def test_the_saved_weights_are_the_moving_average_that_was_asked_for() -> None:
    def run(n_rows: int, **options: float) -> sae.SAE:
        settings = sae.Training(n_rows=1000, lr=1e-2, lr_decay=0, lr_warmup_rows=0, **options)  # type: ignore[arg-type]
        return sae.train(_stream(), replace(TOPK, revive=None), replace(settings, n_rows=n_rows))[0]

    steps = [run(250 * i).W_enc for i in (1, 2, 3)]
    start = run(250, ema_decay=0.9).W_enc - 0.1 * steps[0]  # 0.9 of the first weights
    wanted = start
    for W_enc in steps:
        wanted = (wanted if W_enc is not steps[0] else start) * (
            0.9 if W_enc is not steps[0] else 1
        ) + 0.1 * W_enc
    assert (run(750, ema_decay=0.9).W_enc - wanted).abs().max() < 1e-5


def test_sites_are_checked_against_the_stream() -> None:
    training = sae.Training(n_rows=500)
    with pytest.raises(SpecError, match=f"site blocks.9.hook_mlp_out is not in the stream, which has {SITE}"):
        sae.train(_stream(), replace(TOPK, site="blocks.9.hook_mlp_out"), training)
    two = sae.ArrayStream({"a": _acts(), "b": _acts(d=12)}, batch_size=250)
    with pytest.raises(SpecError, match="the stream has 2 sites and the config names none"):
        sae.train(two, TOPK, training)
    a, b = sae.train(two, [replace(TOPK, site="a"), replace(TOPK, site="b")], training)
    assert (a.cfg["d_in"], b.cfg["d_in"]) == (20, 12)


def test_a_wrong_width_is_one_clear_line() -> None:
    (s,) = sae.train(_stream(), TOPK, sae.Training(n_rows=250))
    with pytest.raises(
        ValueError, match=rf"activations have shape \(3, 21\); this SAE has d_in 20 \(site {SITE}\)"
    ):
        s.encode(torch.zeros(3, 21))
    with pytest.raises(ValueError, match=r"latents have shape \(3, 20\); this SAE has d_sae 64"):
        s.decode(torch.zeros(3, 20))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("step", ["sparse", "dense"])
def test_a_loss_that_is_not_finite_names_step_sae_and_rows_and_keeps_the_checkpoint(
    tmp_path: Path, bad: float, step: str
) -> None:
    acts = _acts()
    good_stats = _stream(acts.copy())
    order = np.random.default_rng((0, 0)).permutation(4000)
    acts[order[1000 + 17], 4] = bad  # row 17 of the fifth batch
    stream = _stream(acts)
    stream.stats = good_stats.stats  # type: ignore[method-assign]
    training = sae.Training(n_rows=4000, checkpoint_every_rows=500, step=step)  # type: ignore[arg-type]
    with pytest.raises(sae.NonFiniteLoss) as caught:
        sae.train(stream, [TOPK], training, out=tmp_path)
    message = str(caught.value)
    assert "the loss of topk-64-6 is" in message
    assert "at step 5 (batch 4, rows 1,000 to 1,250)" in message
    assert "1 of its 250 rows hold inf or NaN, first row 17 of the batch" in message
    assert "The last checkpoint" in message
    assert "\n" not in message
    healed = _stream(good_stats._acts[SITE])
    (s,) = sae.train(healed, [TOPK], training, out=tmp_path)
    (straight,) = sae.train(_stream(good_stats._acts[SITE]), [TOPK], training)
    assert _tensors(s) == _tensors(straight)


def test_geometric_median_minimises_distance_and_ignores_a_few_huge_rows() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g) * torch.arange(1, 7)
    median = geometric_median(x, max_steps=1000, tolerance=1e-12)

    def total(point: torch.Tensor) -> float:
        return float((x - point).double().norm(dim=1).sum())

    for _ in range(50):
        assert total(median) <= total(median + 0.05 * torch.randn(6, generator=g)) + 1e-6
    with_sinks = torch.cat([x, torch.full((4, 6), 1e5)])
    assert (geometric_median(with_sinks) - geometric_median(x)).norm() < 0.5
    assert with_sinks.mean(0).norm() > 900


def test_geometric_median_of_equal_rows_is_that_row() -> None:
    assert torch.allclose(geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_array_stream_serves_each_row_once_an_epoch_and_resumes_exactly() -> None:
    acts = np.arange(1003, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)

    def rows(stream: sae.ArrayStream, n: int | None = None) -> list[list[int]]:
        found = []
        for batch in stream:
            found.append(batch[SITE][:, 0].astype(int).tolist())
            if len(found) == n:
                break
        return found

    stream = _stream(acts, epochs=2, batch_size=100)
    whole = rows(stream)
    assert [len(batch) for batch in whole] == ([100] * 10 + [3]) * 2
    first, second = list(chain(*whole[:11])), list(chain(*whole[11:]))
    assert sorted(first) == sorted(second) == list(range(1003))
    assert first != second
    for cut in (0, 1, 10, 11, 12, 21):
        stream = _stream(acts, epochs=2, batch_size=100)
        rows(stream, cut) if cut else None
        state = json.loads(json.dumps(stream.state()))
        again = _stream(acts, epochs=2, batch_size=100)
        again.restore(state)
        assert rows(again) == whole[cut:]
    with pytest.raises(ValueError, match=r"seed 0 \(here 1\)"):
        _stream(acts, seed=1, batch_size=100).restore(state)


@pytest.mark.parametrize(
    ("acts", "message"),
    [
        (np.zeros((3, 4, 5)), "each site needs"),
        (np.zeros((0, 4)), "no rows"),
        ({"a": np.zeros((3, 4)), "b": np.zeros((2, 4))}, "sites differ in rows"),
    ],
)
def test_arrays_that_are_no_activations_are_refused(acts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sae.ArrayStream(acts)  # type: ignore[arg-type]


def test_activations_that_are_all_zero_can_not_be_scaled() -> None:
    with pytest.raises(SpecError, match=r"mean norm is 0\.0"):
        sae.train(_stream(np.zeros((500, 4), np.float32)), TOPK, sae.Training(n_rows=500))


def test_a_harvested_dataset_trains_by_command_line_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real reader, with its threads: same bits from the CLI, the API, and an interrupted run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "actcache"))
    from tiny_harvest import SITES, tiny_spec

    import actcache
    from sae.__main__ import main

    ds = actcache.harvest(tiny_spec(tmp_path), root=str(tmp_path / "root"), engine="local")
    arguments = [
        "train",
        "--data",
        ds.url,
        "--arch",
        "topk",
        "--arch",
        "batchtopk",
        "--k",
        "4",
        "--d-sae",
        "40",
    ]
    arguments += ["--site", SITES[0], "--rows", "6000", "--batch-size", "256", "--json"]
    arguments += ["--checkpoint-every-rows", "1500", "--out", str(tmp_path / "cli")]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["rows"] for r in results] == [6000, 6000]

    def stream(state: dict | None = None) -> actcache.reader.Stream:  # type: ignore[name-defined]
        epochs = -(-6000 // ds.n_rows)
        return ds.stream([SITES[0]], batch_size=256, epochs=epochs, metadata=False, state=state)

    configs = [sae.TopK(d_sae=40, k=4), sae.BatchTopK(d_sae=40, k=4)]
    training = sae.Training(n_rows=6000, checkpoint_every_rows=1500)
    straight = sae.train(stream(), configs, training)

    class Broken(Exception):
        pass

    def breaking(whole: Iterator) -> Iterator:
        for i, batch in enumerate(whole):
            if i == 15:
                raise Broken
            yield batch

    interrupted = stream()
    kind = type(interrupted)
    with monkeypatch.context() as m:
        original = kind.__iter__
        m.setattr(kind, "__iter__", lambda self: breaking(original(self)))
        with pytest.raises(Broken):
            sae.train(interrupted, configs, training, out=tmp_path / "api")
    resumed = sae.train(stream(), configs, training, out=tmp_path / "api")
    for a, b, r in zip(straight, resumed, results, strict=True):
        cli = sae.load(r["path"])
        assert _tensors(a) == _tensors(b) == _tensors(cli)
        assert cli.cfg["site"] == SITES[0]
        assert cli.cfg["dataset"] == {"url": ds.url, "id": ds.id}
        assert cli.cfg["context_size"] == 16
        assert cli.cfg["model"] == ds.spec.model


def test_a_checkout_that_is_not_installed_trains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    (s,) = sae.train(_stream(), TOPK, sae.Training(n_rows=250))
    assert s.cfg["actcache_version"] is None


def test_functions_are_not_hidden_by_the_modules_of_their_names() -> None:
    import sae.export
    import sae.train

    assert callable(sae.train)
    assert callable(sae.export)
    assert set(sae.__all__) <= set(dir(sae))
    with pytest.raises(AttributeError, match="module 'sae' has no attribute 'trian'"):
        sae.trian  # noqa: B018


def test_the_command_line_makes_every_combination_that_makes_sense_and_refuses_the_rest() -> None:
    import click

    from sae.options import combinations

    values = {"d_sae": (64, 128), "k": (4,), "target_l0": (8.0, 16.0), "k_aux": None, "bandwidth": 0.1}
    found = combinations(("topk", "jumprelu"), None, values)
    jump = [sae.JumpReLU(d_sae=w, target_l0=t, bandwidth=0.1) for w in (64, 128) for t in (8.0, 16.0)]
    assert found == [sae.TopK(d_sae=64, k=4), sae.TopK(d_sae=128, k=4), *jump]
    (ghost,) = combinations(("topk",), "ghost", {"d_sae": (64,), "k": (4,), "scale_by_dead_share": True})
    assert ghost.revive == sae.GhostGrads(scale_by_dead_share=True)
    (bare,) = combinations(("topk",), "none", {"d_sae": (64,), "k": (4,)})
    assert bare.revive is None
    with pytest.raises(click.UsageError, match="--bandwidth: no architecture or --revive chosen here"):
        combinations(("topk",), None, {"d_sae": (64,), "k": (4,), "bandwidth": 0.1})
    with pytest.raises(click.UsageError, match="gated: Gated needs l1_coefficient; give a value"):
        combinations(("gated",), None, {"d_sae": (64,)})
