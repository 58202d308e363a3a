"""The native directory and other projects' formats: what is written is what is read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from actcache.errors import ActcacheError, CorruptObject, FormatError
from sae.__main__ import main

D, F, K = 16, 48, 4
SITE = "blocks.2.hook_mlp_out"
CONFIGS = [
    sae.TopK(d_sae=F, k=K),
    sae.BatchTopK(d_sae=F, k=K),
    sae.Matryoshka(d_sae=F, k=K),
    sae.Standard(d_sae=F, l1_coefficient=1),
    sae.Gated(d_sae=F, l1_coefficient=1),
    sae.JumpReLU(d_sae=F, l0_coefficient=1),
]
NAMES = ["topk-48-4", "batchtopk-48-4", "matryoshka-48-4", "standard-48-1", "gated-48-1", "jumprelu-48-1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    stream = sae.ArrayStream(_acts(), batch_size=200, site=SITE)
    sae.train(stream, CONFIGS, sae.Training(n_rows=10_000, lr=1e-3), out=out)
    return out


def _acts(n: int = 3000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return 5 * rng.standard_t(5, (n, D)).astype(np.float32) @ rng.standard_normal((D, D)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_sae_loads_as_it_was(run: Path, tmp_path: Path, name: str) -> None:
    s = sae.load(run / name)
    s.save(tmp_path / "copy")
    again = sae.load(tmp_path / "copy")
    assert again.path == tmp_path / "copy"
    assert again.cfg == s.cfg
    assert torch.equal(again.encode(_acts()), s.encode(_acts()))
    assert torch.equal(again(_acts()), s(_acts()))
    assert {k: s.cfg[k] for k in ("d_in", "d_sae", "site")} == {"d_in": D, "d_sae": F, "site": SITE}
    assert s.cfg.get("k", K) == K
    assert again.digest() == s.digest()


@pytest.mark.parametrize("name", NAMES)
def test_saelens_export_reloads_with_equal_values(run: Path, tmp_path: Path, name: str) -> None:
    s = sae.load(run / name)
    sae.export(s, "saelens", tmp_path, model_name="gpt2", context_size=128)
    again = sae.load(tmp_path)
    acts = _acts()
    assert torch.equal(again.encode(acts), s.encode(acts))
    assert torch.equal(again.decode(s.encode(acts)), s.decode(s.encode(acts)))
    assert torch.equal(again(acts), s(acts))
    assert again.cfg["site"] == SITE
    assert again.cfg["model"] == "gpt2"


def test_saelens_config_holds_what_its_reader_wants(run: Path, tmp_path: Path) -> None:
    cfg = {}
    for name in ("topk-48-4", "batchtopk-48-4"):
        sae.export(sae.load(run / name), "saelens", tmp_path / name, model_name="gpt2", context_size=128)
        cfg[name] = json.loads((tmp_path / name / "cfg.json").read_text())
        metadata = cfg[name].pop("metadata")
        assert int(metadata["sae_lens_version"].split(".")[0]) >= 6  # else its converter of old files runs
        assert (metadata["model_name"], metadata["hook_name"], metadata["context_size"]) == (
            "gpt2",
            SITE,
            128,
        )
    shared = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert cfg["topk-48-4"] == {
        "architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False, **shared
    }  # fmt: skip
    assert cfg["batchtopk-48-4"] == {"architecture": "jumprelu", **shared}
    shapes = {
        n: tuple(t.shape) for n, t in load_file(tmp_path / "batchtopk-48-4/sae_weights.safetensors").items()
    }
    assert shapes == {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}


def test_a_value_exactly_at_the_threshold_stays_active_through_the_export(tmp_path: Path) -> None:
    """SAELens compares strictly; ours is active at the threshold."""
    theta = torch.tensor(0.7)
    eye = torch.eye(3)
    cfg = {"architecture": "batchtopk", "d_in": 3, "d_sae": 3, "k": 1}
    s = sae.SAE(cfg, eye, torch.zeros(3), eye.clone(), torch.zeros(3), threshold=theta)
    below = torch.nextafter(theta, torch.tensor(0.0))
    x = torch.stack([theta, below, torch.tensor(0.9)])[None]
    wanted = torch.stack([theta, torch.tensor(0.0), torch.tensor(0.9)])[None]
    assert torch.equal(s.encode(x), wanted)
    sae.export(s, "saelens", tmp_path)
    written = load_file(tmp_path / "sae_weights.safetensors")["threshold"]
    assert torch.equal((x > written) * x, wanted)  # SAELens' formula
    assert torch.equal(sae.load(tmp_path).encode(x), wanted)


def _saelens_directory(path: Path, architecture: str, **options: object) -> dict[str, torch.Tensor]:
    """As SAELens would write it, by hand."""
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (F,)
    w = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(w, path / "sae_weights.safetensors")
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", **options}
    (path / "cfg.json").write_text(json.dumps(cfg))
    return w


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_saelens_topk_options_are_folded(tmp_path: Path, rescale: bool, subtract: bool) -> None:
    options = {"k": K, "rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": subtract}
    w = _saelens_directory(tmp_path, "topk", **options)
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    pre = (x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1) if rescale else torch.ones(F)
    top = torch.topk(pre * norms, K)
    latents = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    s = sae.load(tmp_path)
    assert torch.allclose(s.encode(x), latents, atol=1e-4)
    assert torch.allclose(s(x), (latents / norms) @ w["W_dec"] + w["b_dec"], atol=1e-4)


@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
def test_saelens_jumprelu_and_standard_follow_their_formulas(tmp_path: Path, architecture: str) -> None:
    w = _saelens_directory(tmp_path, architecture, metadata={"hook_name": SITE})
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = pre.relu() * (pre > w["threshold"]) if architecture == "jumprelu" else pre.relu()
    s = sae.load(tmp_path)
    assert torch.allclose(s.encode(x), latents, atol=1e-5)
    assert torch.allclose(s(x), latents @ w["W_dec"] + w["b_dec"], atol=1e-4)
    assert s.cfg["site"] == SITE


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (
            "temporal",
            {},
            "holds a SAELens 'temporal' SAE; this version reads standard, topk, gated, jumprelu, batchtopk",
        ),
        ("topk", {}, "lacks k"),
        ("topk", {"k": 4, "normalize_activations": "layer_norm"}, "normalize_activations to 'layer_norm'"),
        ("standard", {"reshape_activations": "hook_z"}, "reshape_activations to 'hook_z'"),
        ("standard", {"dtype": "int4"}, "dtype 'int4'"),
        ("standard", {"d_in": 17}, r"W_enc has shape \(16, 48\), but d_in 17"),
    ],
)
def test_what_can_not_be_represented_is_refused(
    tmp_path: Path, architecture: str, options: dict, message: str
) -> None:
    _saelens_directory(tmp_path, architecture, **options)
    with pytest.raises(ActcacheError, match=message):
        sae.load(tmp_path)


def test_damaged_or_missing_directories_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds runs: batchtopk-48-4, gated-48-1, .*, topk-48-4\. Name one"
    ):
        sae.load(run)
    with pytest.raises(
        FileNotFoundError,
        match=r"has neither sae\.json nor the files of saelens or dictionary_learning; it has no files",
    ):
        sae.load(tmp_path)
    sae.load(run / "topk-48-4").save(tmp_path)
    settings = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**settings, "format": 9}))
    with pytest.raises(FormatError, match="holds SAE format 9; this version reads 1"):
        sae.load(tmp_path)
    (tmp_path / "sae.json").write_text("{")
    with pytest.raises(CorruptObject, match=r"sae\.json is not JSON"):
        sae.load(tmp_path)
    (tmp_path / "sae.json").write_text(json.dumps({**settings, "weights_crc32c": None}))
    (tmp_path / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CorruptObject, match="not a whole safetensors file"):
        sae.load(tmp_path)


def test_an_unknown_format_names_the_known_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="format 'onnx' is not known; there are saelens, dictionary_learning"
    ):
        sae.export(sae.load(run / "topk-48-4"), "onnx", tmp_path)


def test_the_command_line_exports_and_fails_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run / "topk-48-4"), "--out", str(tmp_path), "--model-name", "gpt2"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}\n"
    assert sae.load(tmp_path).cfg["model"] == "gpt2"
    assert main(["export", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert main(["train", "--dsae", "4"]) == 2
    assert "--d-sae" in capsys.readouterr().err
    arguments = ["train", "--data", str(tmp_path), "--d-sae", "4", "--k", "2", "--out", str(tmp_path / "o")]
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: no committed actcache dataset at")


def test_every_training_option_has_a_help_text() -> None:
    from sae.__main__ import train_command

    for option in train_command().params:
        assert option.help, option.name  # type: ignore[attr-defined]
        assert len(option.help) > 20 or option.name == "json"  # type: ignore[attr-defined]


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from sae.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("subtract", [False, True])
def test_saelens_gated_follows_its_formula_and_is_written_as_itself(tmp_path: Path, subtract: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_gate": (F,), "b_mag": (F,), "r_mag": (F,), "W_dec": (F, D), "b_dec": (D,)}
    w = {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    (tmp_path / "in").mkdir()
    save_file(w, tmp_path / "in" / "sae_weights.safetensors")
    cfg = {
        "architecture": "gated",
        "d_in": D,
        "d_sae": F,
        "dtype": "float64",
        "apply_b_dec_to_input": subtract,
    }
    (tmp_path / "in" / "cfg.json").write_text(json.dumps(cfg))
    x = torch.randn(50, D, generator=g, dtype=torch.float64)
    centred = x - w["b_dec"] if subtract else x
    gate = (centred @ w["W_enc"] + w["b_gate"] > 0).double()
    wanted = gate * torch.relu(centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    s = sae.load(tmp_path / "in")
    assert (s.encode(x) - wanted).abs().max() < 1e-12
    assert (s(x) - (wanted @ w["W_dec"] + w["b_dec"])).abs().max() < 1e-11
    sae.export(s, "saelens", tmp_path / "out")
    written = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in written.items()} == shapes  # and no b_enc
    assert torch.equal(sae.load(tmp_path / "out").encode(x), s.encode(x))
