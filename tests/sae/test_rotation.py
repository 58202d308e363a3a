"""Training in rotated coordinates: the same losses and gradients, and an SAE of the model's activations."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_architectures import CONFIGS, NAMES, REVIVALS

import actcache
import sae
from actcache.errors import Conflict, SpecError
from sae.__main__ import main
from sae.architectures import Architecture
from sae.learner import Learner
from sae.rotation import turned
from sae.train import Trainer
from sae.training import Rules

SITE = "blocks.1.hook_resid_post"
ALL: list[Architecture] = [
    sae.Standard(d_sae=40, l1_coefficient=0.3),
    sae.Gated(d_sae=40, l1_coefficient=0.3),
    sae.JumpReLU(d_sae=40, target_l0=4, bandwidth=0.1),
    sae.TopK(d_sae=40, k=4),
    sae.BatchTopK(d_sae=40, k=4),
    sae.Matryoshka(d_sae=40, k=4, prefixes=(8, 40)),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[actcache.Dataset, actcache.Dataset]:
    """The same rows as `rotated:1e-3` and as `fvu:1e-3`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))
    from tiny_harvest import tiny_spec

    directory = tmp_path_factory.mktemp("rotated")
    specs = [tiny_spec(directory, sites=[SITE], precision=p) for p in ("rotated:1e-3", "fvu:1e-3")]
    rotated, plain = (actcache.harvest(s, root=str(directory / "root"), progress=False) for s in specs)
    return rotated, plain


def _rotation(ds: actcache.Dataset) -> np.ndarray:
    found = ds.stream(SITE, rotated=True).rotation(SITE)
    assert found is not None
    return found


def _train(
    ds: actcache.Dataset, configs: object, rotated: bool = True, epochs: int = 1, **options: object
) -> list[sae.SAE]:
    training = {"n_rows": epochs * ds.n_rows, "lr": 3e-3, "dead_after_rows": 500}
    training |= options.pop("training", {})  # type: ignore[arg-type]
    stream = ds.stream(SITE, batch_size=128, epochs=epochs, metadata=False, rotated=rotated)
    return sae.train(stream, configs, sae.Training(**training), **options)  # type: ignore[arg-type]


def test_rotated_rows_are_the_decoded_rows_in_the_basis_of_the_rotation(stored: tuple) -> None:
    ds = stored[0]
    rotation_DD = _rotation(ds)
    assert np.abs(rotation_DD @ rotation_DD.T - np.eye(len(rotation_DD))).max() < 1e-5
    rows = 0
    for turned_rows, plain in zip(ds.stream(SITE, rotated=True), ds.stream(SITE), strict=True):
        wanted = plain[SITE].astype(np.float64) @ rotation_DD.T
        bound = 2.0**-20 * len(rotation_DD) * np.abs(plain[SITE]).max()  # of two float32 products
        assert np.abs(turned_rows[SITE] - wanted).max() < bound
        assert np.array_equal(turned_rows.position, plain.position)
        rows += len(plain)
    assert rows == ds.n_rows
    assert ds.stream(SITE).rotation(SITE) is None


def test_the_statistics_of_a_rotated_stream_are_those_of_its_rows(stored: tuple) -> None:
    ds = stored[0]
    rows = np.concatenate([batch[SITE] for batch in ds.stream(SITE, rotated=True)]).astype(np.float64)
    stats = ds.stream(SITE, rotated=True).stats(SITE)
    assert np.allclose(stats["mean"], rows.mean(0), atol=1e-4 * np.abs(rows).max())
    assert stats["mean_norm"] == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-4)
    assert stats["total_variance"] == pytest.approx(rows.var(0).sum(), rel=1e-3)
    assert stats["max_abs"] >= np.abs(rows).max()
    assert "variance" not in stats


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        (1, {}, r"is stored as fvu:0.001, and rotated=True is for rotated:<x>; leave it out"),
        (0, {"centre": True}, "goes with neither centre nor unit_norm"),
    ],
)
def test_rotated_rows_are_refused_where_there_are_none(
    stored: tuple, of: int, options: dict, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        stored[of].stream(SITE, rotated=True, **options)


def test_datasets_side_by_side_are_not_served_rotated(stored: tuple) -> None:
    with pytest.raises(SpecError, match="each dataset of a mix has its own rotation"):
        actcache.mix([(stored[0], 1.0)], SITE, rotated=True)
    with pytest.raises(SpecError, match="aligned datasets are served as decoded"):
        actcache.zip(stored[0], stored[1]).stream(rotated=True)


@pytest.mark.parametrize("revive", [*REVIVALS, sae.Resampling(every_rows=300)], ids=lambda r: r.kind)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_gradient_descent_in_rotated_coordinates_is_that_in_the_models(
    config: Architecture, revive: sae.AuxK | sae.GhostGrads | sae.Resampling
) -> None:
    """Everything but Adam: projection, clipping, normalising, dead latents, thresholds. float64."""
    d_in, d_sae = 12, config.d_sae
    config = replace(config, revive=revive)
    rules = Rules(lr=0.3, dead_after_rows=100, clip_norm=0.5)
    g = torch.Generator().manual_seed(1)
    R = torch.linalg.qr(torch.randn(d_in, d_in, generator=g, dtype=torch.float64)).Q
    plain, rotated = (Learner(config, d_in, 1.0, rules, 3, torch.float64) for _ in range(2))
    plain.set_b_dec(torch.randn(d_in, generator=g, dtype=torch.float64))
    for name, p in plain.parameters.items():
        if not config.by_rank and name == "b_enc_F":
            p -= torch.linspace(0, 4, d_sae)
        rotated.parameters[name].copy_(p @ R.T if name.endswith("D") else p)
    for learner in (plain, rotated):
        learner.optimiser = torch.optim.SGD(list(learner.parameters.values()), lr=0.3, fused=True)  # type: ignore[assignment]
        learner._forget = lambda dead_A: None  # type: ignore[method-assign]  # of Adam's moments
    n_dead = 0
    for _ in range(8):
        x_ND = torch.randn(64, d_in, generator=g, dtype=torch.float64) + 1
        outcomes = [a.gradients(x) for a, x in ((plain, x_ND), (rotated, x_ND @ R.T))]
        plain.apply(outcomes[0], x_ND)
        rotated.apply(outcomes[1], x_ND @ R.T)
        assert outcomes[1].loss == pytest.approx(outcomes[0].loss, rel=1e-9)
        n_dead = max(n_dead, plain.n_dead)
    assert n_dead > 5
    for name, wanted in plain.parameters.items():
        found = rotated.parameters[name] @ R if name.endswith("D") else rotated.parameters[name]
        assert (found - wanted).abs().max() < 1e-8 * wanted.abs().max(), name


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.architecture)
def test_the_saved_sae_does_to_decoded_rows_what_was_trained_on_rotated_ones(
    stored: tuple, config: Architecture
) -> None:
    ds = stored[0]
    stream = ds.stream(SITE, batch_size=128, metadata=False, rotated=True)
    trainer = Trainer(stream, [config], sae.Training(n_rows=1280, lr=3e-3), start=[None])
    (s,) = trainer.run()
    acts_ND = ds.read(SITE, slice(0, 500))
    rotation_DD = _rotation(ds)
    trained = trainer.learners[0].finished(s.cfg)
    wanted = trained.encode(acts_ND @ rotation_DD.T)
    # a pre-activation that lies within rounding of a threshold or of rank k may fall to its other side
    close = torch.isclose(s.encode(acts_ND), wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
    assert (~close).sum() <= 2
    expected = trained.decode(wanted) @ torch.tensor(rotation_DD)
    assert torch.allclose(s.decode(wanted), expected, atol=1e-4 * float(np.abs(acts_ND).max()))
    assert s.cfg["trained_rotated"] is True


@pytest.mark.slow
def test_long_rotated_training_ends_where_training_on_decoded_rows_ends(stored: tuple) -> None:
    """Adam takes other steps in another basis: worse at first, as good in the end, within 5 % of the FVU."""
    ds = stored[0]
    x = torch.from_numpy(ds.read(SITE, slice(None)))

    def fvu(s: sae.SAE) -> float:
        return float((s(x) - x).square().sum() / (x - x.mean(0)).square().sum())

    config = sae.TopK(d_sae=40, k=4)
    ends = {
        rotated: np.mean(
            [fvu(_train(ds, config, rotated, 40, training={"seed": seed})[0]) for seed in range(3)]
        )
        for rotated in (False, True)
    }
    assert ends[True] == pytest.approx(ends[False], rel=0.05)
    assert ends[True] < 0.2


def test_a_rotated_run_resumes_to_the_bit_and_is_another_run_than_a_plain_one(
    stored: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds, configs = stored[0], [ALL[3], ALL[4]]
    options = {"training": {"checkpoint_every_rows": 500}}
    straight = _train(ds, configs, **options)

    class Broken(Exception):
        pass

    def breaking(whole: Iterator) -> Iterator:
        for i, batch in enumerate(whole):
            if i == 9:
                raise Broken
            yield batch

    kind = type(ds.stream(SITE))
    original = kind.__iter__
    with monkeypatch.context() as m:
        m.setattr(kind, "__iter__", lambda self: breaking(original(self)))
        with pytest.raises(Broken):
            _train(ds, configs, out=tmp_path / "run", **options)
    _check_snapshots(ds, tmp_path / "run")
    with pytest.raises(Conflict, match=r"data.rotated: True -> None"):
        _train(ds, configs, rotated=False, out=tmp_path / "run", **options)
    resumed = _train(ds, configs, out=tmp_path / "run", **options)
    assert [s.digest() for s in resumed] == [s.digest() for s in straight]
    assert sae.load(tmp_path / "run" / "topk-40-4").digest() == straight[0].digest()


def _check_snapshots(ds: actcache.Dataset, run: Path) -> None:
    """SAEs of a checkpoint are turned back as those of the restored run would be, with the dataset or by its URL."""
    stream = ds.stream(SITE, batch_size=128, metadata=False, rotated=True)
    training = sae.Training(n_rows=ds.n_rows, lr=3e-3, dead_after_rows=500, checkpoint_every_rows=500)
    restored = Trainer(stream, [ALL[3], ALL[4]], training, start=[None, None], out=run)
    restored.open(resume=True)
    for i, name in enumerate(restored.names):
        wanted = restored._finished(i)
        assert wanted is not None
        assert sae.load_checkpoint(run, name).digest() == wanted.digest()
        assert sae.load_checkpoint(run, name, ds=ds).digest() == wanted.digest()


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.architecture)
def test_fine_tuning_in_rotated_coordinates_starts_from_the_sae_given(
    stored: tuple, config: Architecture
) -> None:
    ds = stored[0]
    (given,) = _train(ds, config, rotated=False)
    (same,) = _train(ds, config, start=given, training={"n_rows": 128, "lr": 1e-9})
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        a, b = getattr(given, name), getattr(same, name)
        assert (a - b).abs().max() < 1e-5 * a.abs().max(), name


def test_turning_there_and_back_is_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    R = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q.numpy()
    (s,) = sae.train(
        sae.ArrayStream(np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)),
        sae.Gated(d_sae=9, l1_coefficient=0.1),
        sae.Training(n_rows=100),
    )
    back = turned(turned(s, R), R.T)
    for name, tensor in s.state_dict().items():
        assert torch.allclose(back.state_dict()[name], tensor, atol=1e-6), name


def test_rotated_is_an_option_of_the_command_line_and_of_the_file(
    stored: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--d-sae", "40", "--k", "4", "--lr", "0.003", "--batch-size", "128", "--json"]
    assert main(["train", "--data", stored[0].url, "--rotated", *common, "--out", str(tmp_path / "a")]) == 0
    (tmp_path / "run.toml").write_text(f'data = "{stored[0].url}"\nrotated = true\n')
    file = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "b")]
    assert main(["train", *common, *file]) == 0
    a, b = (sae.load(tmp_path / name / "topk-40-4") for name in "ab")
    assert a.digest() == b.digest()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["data"]["rotated"] is True
    capsys.readouterr()
    assert main(["train", "--data", stored[1].url, "--rotated", *common, "--out", str(tmp_path / "c")]) == 2
    assert "rotated=True is for rotated:<x>" in capsys.readouterr().err
