"""Every architecture trains from text: options, `--sae`, presets and TOML, from one set of dataclasses."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import actcache
import sae
from sae.__main__ import main
from sae.architectures import ARCHITECTURES, Optimiser, config_to_dict
from sae.options import preset_of_text, read_file, sae_of_table, sae_of_text
from sae.presets import PRESETS, openai_topk
from sae.revival import REVIVALS

SITE = "blocks.1.hook_resid_post"
EACH = {
    "standard": "standard:d_sae=40,l1_coefficient=0.5,decoder=unit",
    "gated": "gated:d_sae=40,l1_coefficient=0.5",
    "jumprelu": "jumprelu:d_sae=40,target_l0=4,bandwidth=0.1,revive=auxk",
    "topk": "topk:d_sae=40,k=4,revive=resample,every_rows=1000",
    "batchtopk": "batchtopk:d_sae=40,k=4,revive=ghost,scale_by_dead_share=true",
    "matryoshka": "matryoshka:d_sae=40,k=4,prefixes=8+40,lr=1e-3",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> object:
    sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))
    from tiny_harvest import tiny_spec

    directory = tmp_path_factory.mktemp("dataset")
    return actcache.harvest(tiny_spec(directory), root=str(directory / "root"), engine="local")


def _train(ds: object, out: Path | str, *arguments: object) -> list[str]:
    command = ["train", "--data", ds.url, "--out", out, "--rows", 2000, "--batch-size", 200, *arguments]  # type: ignore[attr-defined]
    return [str(a) for a in command]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_trains_by_command_and_api_exports_reloads_and_evaluates(
    architecture: str, dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds, text = dataset, EACH[architecture]
    assert main([*_train(ds, tmp_path / "cli", "--site", SITE), "--sae", text, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    by_command = sae.load(result["path"])
    config = sae_of_text(text)
    stream = ds.stream([SITE], batch_size=200, metadata=False)  # type: ignore[attr-defined]
    (by_api,) = sae.train(stream, config, sae.Training(n_rows=2000), out=tmp_path / "api")
    assert by_command.digest() == by_api.digest()
    exported = sae.load(sae.export(by_command, "saelens", tmp_path / "exported"))
    acts_ND = ds.read(SITE, slice(0, 300))  # type: ignore[attr-defined]
    np.testing.assert_allclose(exported(acts_ND).numpy(), by_command(acts_ND).numpy(), atol=1e-4, rtol=1e-4)
    found = sae.evaluate(by_command, ds, split="train")
    assert found == sae.evaluate(by_api, ds, split="train")
    assert found == json.loads((Path(result["path"]) / "eval.json").read_text())


def test_a_text_names_every_field_of_every_architecture_of_its_optimiser_and_of_what_revives() -> None:
    found = sae_of_text(
        "topk:d_sae=64,k=4,site=a,revive=auxk,k_aux=7,aux_coefficient=.5,lr=1e-4,betas=0+.9,eps=1e-9,"
        "clip_norm=2,lr_warmup_rows=1e3,lr_decay=0,sparsity_warmup_rows=5,ema_decay=.9,seed=3"
    )
    optimiser = Optimiser(
        lr=1e-4, betas=(0.0, 0.9), eps=1e-9, clip_norm=2.0, lr_warmup_rows=1000, lr_decay=0.0,
        sparsity_warmup_rows=5, ema_decay=0.9, seed=3,
    )  # fmt: skip
    assert {f.name for f in fields(Optimiser)} == set(vars(optimiser))
    revive = sae.AuxK(k_aux=7, aux_coefficient=0.5)
    assert found == sae.TopK(d_sae=64, k=4, site="a", revive=revive, optimiser=optimiser)
    assert sae_of_text("topk:d_sae=64,k=4,revive=none") == sae.TopK(d_sae=64, k=4, revive=None)
    assert sae_of_text("matryoshka:d_sae=64,k=4,prefixes=8").prefixes == (8,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", EACH.values())
def test_what_run_json_holds_is_a_table_that_gives_the_same_sae(text: str) -> None:
    config = sae_of_text(text)
    written = json.loads(json.dumps(config_to_dict(config)))
    assert sae_of_table({k: v for k, v in written.items() if v is not None}) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topkk:d_sae=4,k=2", "architecture 'topkk' is not known; did you mean topk?"),
        ("topk:d_sea=4,k=2", "topk: key 'd_sea' is not known; did you mean d_sae?"),
        ("topk:d_sae=4", "topk needs k; e.g. k=32"),
        ("topk:d_sae=4,k=x", "topk: k is 'x'; it must be a whole number"),
        ("topk:d_sae=4,k=2.5", "topk: k is 2.5; it must be a whole number"),
        ("topk:d_sae=4,k=9", "topk: k is 9; it must be between 1 and d_sae = 4"),
        ("topk:d_sae=4,k=2,k=3", "k is given twice; keep one"),
        ("topk:d_sae", "'d_sae' is not KEY=VALUE; e.g. topk:d_sae=6144,k=32"),
        ("topk:d_sae=4,k=2,revive=auxx", "topk: revive 'auxx' is not known; did you mean auxk?"),
        ("standard:d_sae=4,l1_coefficient=1,k_aux=2", "standard: k_aux belongs to revive=auxk; add that"),
        ("standard:d_sae=4,l1_coefficient=1,decoder=unti", "decoder is 'unti'; it must be one of"),
        ("topk:d_sae=4,k=2,betas=.9", "betas is (0.9,); it must be 2 numbers"),
        ("topk:d_sae=4,k=2,lr=inf", "topk: lr is inf; it must be positive"),
        ("topk:d_sae=4,k=2,seed=1e30", "it must fit 64 bits"),
    ],
)
def test_a_wrong_text_is_one_line_with_the_nearest_name(
    text: str, message: str, dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_train(dataset, tmp_path / "o", "--site", SITE), "--sae", text]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


TOML = """
site = ["blocks.1.hook_resid_post"]
batch_size = 200

[training]
n_rows = 2000
lr = 1e-3
betas = [0.8, 0.99]

[[sae]]
architecture = "topk"
d_sae = 40
k = 4
revive = "auxk"
k_aux = 5

[[sae]]
architecture = "jumprelu"
d_sae = 48
target_l0 = 4
optimiser = { lr = 2e-3 }
"""


def test_a_toml_file_trains_what_it_says_and_the_command_line_comes_before_it(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'data = "{dataset.url}"\nout = "{tmp_path}/file"\n{TOML}')  # type: ignore[attr-defined]
    assert main(["train", "--config", str(file), "--json"]) == 0
    paths = [r["path"] for r in json.loads(capsys.readouterr().out)]
    assert [Path(p).name for p in paths] == ["topk-40-4", "jumprelu-48-4"]
    written = json.loads((tmp_path / "file" / "run.json").read_text())
    assert written["training"]["betas"] == [0.8, 0.99]
    assert written["saes"]["topk-40-4"]["revive"] == {"kind": "auxk", "k_aux": 5, "aux_coefficient": 1 / 32}
    assert sae.load(paths[1]).cfg["lr"] == 2e-3
    other = ["--out", str(tmp_path / "other"), "--lr", "5e-4", "--rows", "1000", "--sae", "topk:d_sae=8,k=2"]
    assert main(["train", "--config", str(file), *other]) == 0
    found = sae.load(tmp_path / "other" / "topk-8-2").cfg
    assert (found["lr"], found["rows"], found["batch_size"]) == (5e-4, 1000, 200)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 1", "key 'sed' is not known; did you mean seed"),
        ("batchsize = 1", "key 'batchsize' is not known; did you mean batch_size?"),
        ("batch_size = 'x'", "batch_size is 'x'; it must be a whole number"),
        ("[training]\nlrr = 1", "training key 'lrr' is not known; did you mean lr?"),
        ("[training]\nlr = true", "training: lr is True; it must be a number or none"),
        ("[[sae]]\narchitecture = 'topk'\nd_sae = 4\nkk = 2", "topk: key 'kk' is not known; did you mean k?"),
        ("sae = 3", "sae is 3; it wants tables, each headed [[sae]]"),
        ("a = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert main(["train", "--config", str(file), "--data", "d", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert message.removesuffix(" did you mean seed") in error
    assert error.count("\n") == 1


def test_a_preset_is_the_published_one_and_options_come_before_it(dataset: object, tmp_path: Path) -> None:
    preset = preset_of_text("openai_topk:d_sae=32768,k=32", n_rows=10**6)
    assert preset == openai_topk(d_sae=32768, k=32, n_rows=10**6)
    for name in PRESETS:
        with pytest.raises(ValueError, match=rf"{name}: key 'd_sea' is not known; did you mean d_sae\?"):
            preset_of_text(f"{name}:d_sea=4", 1)
    with pytest.raises(ValueError, match="preset openai_topk needs d_sae, k"):
        preset_of_text("openai_topk", 1)
    text = "batchtopk_gpt2:d_sae=40,k=4"
    assert main([*_train(dataset, tmp_path, "--site", SITE, "--preset", text, "--lr-decay", "0.5")]) == 0
    cfg = sae.load(tmp_path / "batchtopk-40-4").cfg
    assert (cfg["lr"], cfg["rows"], cfg["training"]["lr_decay"]) == (3e-4, 2000, 0.5)
    assert cfg["training"]["dead_after_rows"] == 5 * 4096
    assert main([*_train(dataset, tmp_path / "lr", "--site", SITE, "--preset", text, "--lr", "0.5e-4")]) == 0
    assert sae.load(tmp_path / "lr" / "batchtopk-40-4").cfg["lr"] == 0.5e-4
    series = ["--preset", "gpt2_series:d_sae=32+48,l1_coefficient=2"]
    assert main([*_train(dataset, tmp_path / "two", "--site", SITE, *series)]) == 0
    for name, width in (("standard-32-2", 32), ("standard-48-2", 48)):
        assert sae.load(tmp_path / "two" / name).W_dec.shape[0] == width


def test_ways_to_say_what_to_train_exclude_each_other(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _train(dataset, tmp_path / "o", "--site", SITE)
    assert main(command) == 2
    assert "error: say what to train: --d-sae 6144 --k 32, --sae" in capsys.readouterr().err
    assert main([*command, "--sae", "topk:d_sae=4,k=2", "--k", "3"]) == 2
    assert "--sae and --arch, --d-sae, --k and the like each say what to train" in capsys.readouterr().err
    assert main(["train", "--out", "o"]) == 2
    assert "error: --data is missing" in capsys.readouterr().err


def test_fine_tuning_starts_from_a_finished_sae_with_its_own_settings(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "batchtopk:d_sae=40,k=4,revive=none,lr=1e-3"
    assert main([*_train(dataset, tmp_path / "first", "--site", SITE), "--sae", text]) == 0
    first = sae.load(tmp_path / "first" / "batchtopk-40-4")
    command = _train(dataset, tmp_path / "second", "--site", SITE, "--start", first.path, "--lr", "1e-9")
    assert main(command) == 0
    second = sae.load(tmp_path / "second" / "batchtopk-40-4")
    assert second.cfg["revive"] is None
    assert (first.cfg["lr"], second.cfg["lr"]) == (1e-3, 1e-9)
    assert second.digest() != first.digest()
    np.testing.assert_allclose(second.W_dec.numpy(), first.W_dec.numpy(), atol=1e-5)
    written = json.loads((tmp_path / "second" / "run.json").read_text())
    assert written["start"] == {"batchtopk-40-4": first.digest()}
    capsys.readouterr()
    wrong = [
        *_train(dataset, tmp_path / "third", "--site", SITE, "--start", first.path),
        "--sae",
        "topk:d_sae=8,k=2",
    ]
    assert main(wrong) == 2
    error = capsys.readouterr().err
    assert "the SAE to start from is batchtopk with d_in" in error
    assert main([*_train(dataset, tmp_path / "o", "--start", tmp_path / "absent")]) == 1
    assert "does not exist; give a directory" in capsys.readouterr().err


def test_a_sweep_with_rungs_ends_in_one_table_of_80_columns_and_the_report_shows_it(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "topk:d_sae=40,k=4"
    command = _train(
        dataset, tmp_path / "run", "--site", SITE, "--rung", 600, "--rung", 1400, "--rung-keep", 0.5
    )
    for text in (f"{first},lr=1e-6", f"{first},lr=3e-3", f"{first},lr=3e-3,seed=1", "topk:d_sae=32,k=4"):
        command += ["--sae", text]
    assert main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{tmp_path / 'run'}/"
    assert shown[1].split() == ["SAE", "rows", "L0", "FVU", "(last", "batch)", "dead", "stopped"]
    assert max(map(len, shown[1:])) <= 80
    table = [line.split() for line in shown[2:]]
    assert [row[1] for row in table] == ["2,000", "1,400", "600", "2,000"], "rivals together, the best first"
    assert {row[0] for row in table[:2]} == {"topk-40-4-lr0.003", "topk-40-4-lr0.003-seed1"}
    assert [row[0] for row in table[2:]] == ["topk-40-4-lr1e-06", "topk-32-4"]
    assert [row[-1] == "yes" for row in table] == [False, True, True, False]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["rows"] for r in found][::3] == [600, 2000], "as listed"
    assert sorted(r.get("stopped_at_rung", 0) for r in found) == [0, 0, 600, 1400]
    assert main(["report", str(tmp_path / "run"), "--no-model"]) == 0
    assert "(2 of them stopped at rungs, on fewer)" in (tmp_path / "run" / "report.html").read_text()
    assert main(["progress", str(tmp_path / "run")]) == 0
    assert main([*_train(dataset, tmp_path / "twice", "--site", SITE), "--sae", first, "--sae", first]) == 2
    assert "the SAE topk-40-4 is listed twice; leave one out" in capsys.readouterr().err


def test_a_run_at_a_url_is_trained_by_command_line(
    dataset: object, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "memory://sae-command/run"
    command = [*_train(dataset, out, "--site", SITE), "--sae", "topk:d_sae=40,k=4", "--json"]
    assert main(command) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["path"] == f"{out}/topk-40-4"
    assert sae.load(result["path"]).cfg["rows"] == 2000
    assert main([*command, "--seed", "1"]) == 1
    assert "holds a run of other settings" in capsys.readouterr().err


def test_a_run_at_a_url_is_evaluated_as_a_local_copy_of_it(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "memory://sae-options/evaluated"
    for out in (url, tmp_path):
        assert main([*_train(dataset, out, "--site", SITE, "--d-sae", 24, "--k", 3, "--k", 4)]) == 0
    found = []
    capsys.readouterr()
    for path in (url, str(tmp_path), f"{url}/topk-24-4"):
        assert main(["eval", path, "--no-model", "--rows", "256", "--json"]) == 0
        found.append([(r["l0"], r["fvu"]) for r in json.loads(capsys.readouterr().out)])
    assert found[0] == found[1]
    assert found[2] == found[0][1:]
    assert main(["eval", "memory://sae-options/nothing", "--no-model"]) != 0
    assert "memory://sae-options/nothing holds no finished SAE" in capsys.readouterr().err


def test_a_wrong_site_is_one_line_that_names_those_there_are(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*_train(dataset, tmp_path / "o", "--site", "blocks.9.hook_resid_post"), "--sae", EACH["topk"]]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "blocks.9.hook_resid_post" in error
    assert SITE in error
    assert error.count("\n") == 1


def test_every_field_has_an_option_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--rung INTEGER" in text
    kinds = [*ARCHITECTURES.values(), *REVIVALS.values(), sae.Training]
    for name in {f.name for kind in kinds for f in fields(kind)} - {"n_rows", "rungs", "optimiser"}:
        assert f"--{name.replace('_', '-')} " in text.replace("\n", " "), name
    of_evals = {"every_rows": "every", "n_rows": "rows", "n_sequences": "sequences"}
    for field in fields(sae.EvalDuring):
        assert f"--eval-{of_evals.get(field.name, field.name).replace('_', '-')} " in text.replace(
            "\n", " "
        ), field
    for name in ("--sae", "--preset", "--config", "--start", "--log", "--rows"):
        assert name in text


def test_saes_are_evaluated_in_training_as_the_file_and_before_it_the_command_line_say(
    dataset: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[eval]\nevery_rows = 900\nn_sequences = 0\nn_rows = 256\n")
    out = tmp_path / "run"
    command = [*_train(dataset, out, "--site", SITE, "--config", file), "--sae", "topk:d_sae=40,k=4"]
    assert main([*command, "--eval-every", "2000", "--eval-wait-s", "120"]) == 0
    (line,) = (out / "topk-40-4" / "evals.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["rows"], found["n_rows"], found["n_sequences"]) == (2000, 256, 0)
    assert "waiting for the evaluation after 2,000 rows, at most 120 s" in caplog.text
    file.write_text("[eval]\nevry_rows = 900\n")
    assert main(command) == 2
    assert "eval key 'evry_rows' is not known; did you mean every_rows?" in capsys.readouterr().err
    file.write_text("[eval]\nn_sequences = 9\n")
    assert main(command) == 2
    assert (
        "n_sequences of evaluations during training: say how often with --eval-every"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_and_a_rerun_completes(
    dataset: object, tmp_path: Path
) -> None:
    """A real refusal by the kernel, in the middle of the run: metrics.jsonl outgrows the file-size limit."""

    def run(out: Path, limit_kib: object) -> subprocess.CompletedProcess[str]:
        # the checkpoint stays below the limit; the curves do not
        command = [sys.executable, "-m", "sae", *_train(dataset, out, "--site", SITE, "--log-every", 1)]
        command += ["--rows", "8000", "--batch-size", "20", "--checkpoint-every-rows", "1000"]
        command += ["--sae", "topk:d_sae=8,k=2"]
        return subprocess.run(
            ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "-", *command], capture_output=True, text=True
        )

    failed = run(tmp_path / "run", 32)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "too large" in last.lower()
    assert "The last checkpoint is intact" in last
    assert "Traceback" not in failed.stderr
    assert len(list(tmp_path.glob("run/checkpoints/*/done.json"))) == 1
    done = run(tmp_path / "run", "unlimited")
    assert done.returncode == 0, done.stderr
    assert "continuing after" in done.stderr
    assert run(tmp_path / "straight", "unlimited").returncode == 0
    assert (
        sae.load(tmp_path / "run" / "topk-8-2").digest()
        == sae.load(tmp_path / "straight" / "topk-8-2").digest()
    )


def test_read_file_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert read_file(tmp_path / "empty.toml") == {
        "storage_options": {}, "training": {}, "eval": {}, "sae": []
    }  # fmt: skip
