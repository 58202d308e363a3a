"""Formats of other projects: values survive the way there and back, and bad files are refused in one line."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sae
from actcache.errors import ActcacheError, CorruptObject, FormatError, SpecError
from sae.export import for_saebench

D, F, K = 8, 24, 3
SITE = "blocks.2.hook_resid_post"
NAMES = ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]


def planted(architecture: str, *, norm: float = 1.0, dtype: torch.dtype = torch.float32) -> sae.SAE:
    """An SAE of random weights, every tensor of which matters; some latents sit exactly at the threshold."""
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    norms = 1 + (norm - 1) * torch.rand(F, 1, generator=g)
    tensors = {
        "W_enc": torch.randn(D, F, generator=g),
        "b_enc": torch.randn(F, generator=g) / 4,
        "W_dec": W_dec * norms,
        "b_dec": torch.randn(D, generator=g),
    }
    if architecture == "gated":
        tensors |= {name: torch.randn(F, generator=g) / 4 for name in ("b_gate", "r_mag")}
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(F, generator=g)
    if architecture in ("batchtopk", "matryoshka"):
        tensors["threshold"] = torch.tensor(0.7)
    cfg: dict[str, Any] = {"architecture": architecture, "d_in": D, "d_sae": F, "site": SITE, "model": "gpt2"}
    cfg |= {"k": K, "context_size": 64, "dtype": str(dtype).removeprefix("torch.")}
    return sae.SAE(cfg, **{name: t.to(dtype) for name, t in tensors.items()})


def acts(n: int = 500) -> torch.Tensor:
    return 2 * torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def assert_same(found: sae.SAE, wanted: sae.SAE, atol: float = 1e-5) -> None:
    x = acts()
    latents = wanted.encode(x)
    assert 0 < (latents > 0).float().mean() < 1
    assert torch.allclose(found.encode(x), latents, atol=atol)
    assert torch.allclose(found.decode(latents), wanted.decode(latents), atol=atol)
    assert torch.allclose(found(x), wanted(x), atol=atol)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("name", NAMES)
def test_values_survive_the_way_there_and_back(tmp_path: Path, name: str, format: str) -> None:
    s = planted(name)
    assert sae.export(s, format, tmp_path, model_name="gpt2-small") == tmp_path
    again = sae.load(tmp_path)
    assert_same(again, s)
    assert again.cfg["loaded_from"] == format
    assert (again.cfg["site"], again.cfg["model"], again.cfg["context_size"]) == (SITE, "gpt2-small", 64)
    if format == "dictionary_learning" or name not in ("batchtopk", "matryoshka"):
        assert again.cfg["architecture"] == name  # SAELens has them as jumprelu
    sae.export(again, format, tmp_path / "twice")
    assert_same(sae.load(tmp_path / "twice"), s)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_value_at_the_threshold_stays_active(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    theta = torch.tensor(0.7).to(dtype)
    below = torch.nextafter(theta, torch.tensor(0.0, dtype=dtype))
    eye = torch.eye(3, dtype=dtype)
    cfg = {"architecture": "batchtopk", "d_in": 3, "d_sae": 3, "k": 1, "dtype": str(dtype)}
    s = sae.SAE(cfg, eye, eye[0] * 0, eye.clone(), eye[0] * 0, threshold=theta)
    sae.export(s, format, tmp_path)
    x = torch.stack([theta, below, torch.tensor(0.9, dtype=dtype)])[None]
    exact = dtype != torch.float64 or format == "saelens"  # the other is float32, where these two are one
    wanted = [True, False, True] if exact else [True, True, True]
    assert (sae.load(tmp_path).encode(x) > 0).tolist() == [wanted]


def _write_dl(directory: Path, dict_class: str, state: dict[str, Any], **trainer: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / "ae.pt")
    sizes = {"activation_dim": D, "dict_size": F, "submodule_name": SITE}
    config = {"trainer": {"dict_class": dict_class, **sizes, **trainer}, "buffer": {"ctx_len": 64}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _linear(g: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": torch.randn(F, D, generator=g),
        "encoder.bias": torch.randn(F, generator=g),
        "decoder.weight": torch.randn(F, D, generator=g).T,  # as a Linear whose weight was assigned so
    }


def test_dictionary_learning_autoencoder_is_read_as_its_loader_gives_it(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w = _linear(g) | {"bias": torch.randn(D, generator=g)}
    s = sae.load(_write_dl(tmp_path, "AutoEncoder", w))
    norms = w["decoder.weight"].norm(dim=0)
    latents = torch.relu((acts() - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])
    assert torch.allclose(s.encode(acts()), latents * norms, atol=1e-4)
    assert torch.allclose(s(acts()), latents @ w["decoder.weight"].T + w["bias"], atol=1e-4)
    assert torch.allclose(s.W_dec.norm(dim=1), torch.ones(F))


def test_dictionary_learning_april_update_does_not_subtract_the_bias(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w = _linear(g) | {"decoder.bias": torch.randn(D, generator=g)}
    s = sae.load(_write_dl(tmp_path, "AutoEncoderNew", w))
    latents = torch.relu(acts() @ w["encoder.weight"].T + w["encoder.bias"])
    assert torch.allclose(s.encode(acts()), latents, atol=1e-4)
    assert torch.allclose(s(acts()), latents @ w["decoder.weight"].T + w["decoder.bias"], atol=1e-4)


@pytest.mark.parametrize("prefixes", [None, [4, 10], "random"])
def test_matryoshka_prefixes_become_groups(tmp_path: Path, prefixes: Any) -> None:
    s = planted("matryoshka")
    random = prefixes == "random"
    s.cfg |= {"prefixes": None if random else prefixes, "n_random_prefixes": 5 if random else 0}
    sae.export(s, "dictionary_learning", tmp_path)
    groups = torch.load(tmp_path / "ae.pt", weights_only=True)["group_sizes"].tolist()
    assert groups == ([F] if random else [4, 6, 14] if prefixes else [2, 3, 6, 13])
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["group_sizes"] == groups


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_training_saves_are_read_with_their_threshold(
    tmp_path: Path, name: str, rescale: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    w = {n: torch.randn(*shape, generator=g) for n, shape in shapes.items()}
    save_file(
        w | {"topk_threshold": torch.tensor(2.0, dtype=torch.float64)}, tmp_path / "sae_weights.safetensors"
    )
    cfg = {"architecture": name, "d_in": D, "d_sae": F, "dtype": "float32", "k": 2.5}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"rescale_acts_by_decoder_norm": rescale}))
    norms = w["W_dec"].norm(dim=1) if rescale else torch.ones(F)
    pre = ((acts() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() * norms
    latents = pre * (pre > 2)
    s = sae.load(tmp_path)
    assert s.cfg["architecture"] == name.split("_")[0]
    assert torch.allclose(s.encode(acts()), latents, atol=1e-4)
    assert torch.allclose(s(acts()), (latents / norms) @ w["W_dec"] + w["b_dec"], atol=1e-4)
    at_two = sae.SAE(s.cfg, torch.eye(D, F), torch.zeros(F), s.W_dec, torch.zeros(D), threshold=s.threshold)
    assert at_two.encode(2 * torch.eye(1, D)).sum() == 0  # strictly above, as there


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def _bad(tmp_path: Path, what: str) -> None:
    """A directory as dictionary_learning would write it, but for one thing."""
    s = planted("topk")
    sae.export(s, "dictionary_learning", tmp_path)
    ae, config = tmp_path / "ae.pt", tmp_path / "config.json"
    state = torch.load(ae, weights_only=True)
    settings = json.loads(config.read_text())
    if what == "code":
        torch.save(state | {"bias": _Bomb()}, ae)
    elif what == "plain pickle":
        ae.write_bytes(pickle.dumps(_Bomb()))
    elif what == "cut":
        ae.write_bytes(ae.read_bytes()[:300])
    elif what == "empty":
        ae.write_bytes(b"")
    elif what == "a list":
        torch.save([1, 2], ae)
    elif what == "lacks":
        torch.save({n: t for n, t in state.items() if n != "b_dec"}, ae)
    elif what == "huge":
        torch.save(state | {"encoder.weight": torch.zeros(1).expand(10**7, 10**7)}, ae)
    elif what == "integers":
        torch.save(state | {"b_dec": torch.zeros(D, dtype=torch.int8)}, ae)
    elif what == "vector":
        torch.save(state | {"encoder.weight": torch.zeros(F)}, ae)
    elif what == "sparse":
        torch.save(state | {"b_dec": torch.zeros(D).to_sparse()}, ae)
    elif what == "no config":
        config.unlink()
    elif what == "config":
        config.write_text("[" * 100_000)
    elif what == "class":
        config.write_text(json.dumps(settings | {"trainer": {"dict_class": "CrossCoder"}}))
    elif what == "trainer":
        config.write_text('{"trainer": "top_k"}')
    else:
        value = {"k is text": {"k": "3"}, "width": {"activation_dim": 5}, "width is text": {"dict_size": "x"}}
        config.write_text(json.dumps({"trainer": settings["trainer"] | value[what]}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("code", r"ae\.pt is not a file of tensors alone .* would run code"),
        ("plain pickle", r"ae\.pt is not a file of tensors alone"),
        ("cut", r"ae\.pt is not a file of tensors alone"),
        ("empty", r"ae\.pt is not a file of tensors alone"),
        ("a list", r"ae\.pt is no state dict of tensors"),
        ("lacks", r"ae\.pt lacks b_dec"),
        ("huge", r"holds less data than its encoder\.weight \(10000000, 10000000\)"),
        ("integers", r"ae\.pt lacks b_dec of floating point"),
        ("vector", r"W_enc has shape \(24,\), but d_in 8 and d_sae 24 want \(8, 24\)"),
        ("sparse", r"holds less data than its b_dec"),
        ("no config", r"has ae\.pt but no config\.json"),
        ("config", r"config\.json is not JSON"),
        ("class", r"holds a dictionary_learning 'CrossCoder'; this version reads AutoEncoder, Gated"),
        ("trainer", r"config\.json has no object 'trainer'"),
        ("k is text", r"a topk SAE has k '3'; it must be a whole number between 1 and d_sae = 24"),
        ("width", r"W_enc has shape \(8, 24\), but d_in 5"),
        ("width is text", r"d_in is 8 and d_sae 'x'; both must be whole numbers"),
    ],
)
def test_a_bad_dictionary_is_refused_in_one_line_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _bad(tmp_path / "sae", what)
    with pytest.raises(ActcacheError, match=message) as caught:
        sae.load(tmp_path / "sae")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "sae") in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"metadata": [1]}, CorruptObject, "metadata that is no object"),
        ({"k": "3"}, SpecError, "a topk SAE has k '3'"),
        ({"architecture": ["topk"]}, FormatError, r"holds a SAELens \['topk'\] SAE"),
        ({"d_sae": None}, SpecError, "d_sae None"),
        ({"d_in": 5, "rescale_acts_by_decoder_norm": True}, CorruptObject, r"W_enc has shape"),
        (
            {"architecture": "standard", "activation_fn_str": "topk"},
            FormatError,
            "before version 6 and sets activation_fn_str to 'topk'",
        ),
    ],
)
def test_a_bad_saelens_config_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    sae.export(planted("topk"), "saelens", tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(kind, match=message) as caught:
        sae.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_load_says_what_it_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a directory"):
        sae.load(tmp_path / "nowhere")
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"it has readme\.md\. Give a directory"):
        sae.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"readme\.md is a file; give a directory"):
        sae.load(tmp_path / "readme.md")
    for i in range(2):
        sae.export(planted("topk"), "dictionary_learning", tmp_path / f"trainer_{i}")
    with pytest.raises(FileNotFoundError, match=r"it holds SAEs: trainer_0, trainer_1\. Name one"):
        sae.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "sae.safetensors").write_bytes(b"")
    with pytest.raises(
        FormatError, match=r"holds a sparsify SAE \(sae\.safetensors\); this version reads saelens"
    ):
        sae.load(tmp_path)


def test_an_sae_that_dictionary_learning_can_not_hold_is_refused(tmp_path: Path) -> None:
    s = planted("batchtopk")
    s.cfg["k"] = None
    with pytest.raises(SpecError, match="k is None; dictionary_learning needs a whole number"):
        sae.export(s, "dictionary_learning", tmp_path)
    s = planted("batchtopk")
    s.threshold = torch.rand(F)
    with pytest.raises(SpecError, match="a threshold for each latent; dictionary_learning has one for all"):
        sae.export(s, "dictionary_learning", tmp_path)
    state = _linear(torch.Generator().manual_seed(0)) | {
        "b_dec": torch.zeros(D),
        "threshold": torch.tensor(-1.0),
    }
    with pytest.raises(FormatError, match="has no threshold yet"):
        sae.load(_write_dl(tmp_path, "BatchTopKSAE", state, k=2))


# what SAEBench 0.6.0 reads of a custom SAE: its BaseSAE, CustomSAEConfig, load_and_format_sae, evals/core/main.py
SAEBENCH_FIELDS = [
    "model_name",
    "d_in",
    "d_sae",
    "hook_layer",
    "hook_name",
    "context_size",
    "hook_head_index",
    "architecture",
    "apply_b_dec_to_input",
    "finetuning_scaling_factor",
    "activation_fn_str",
    "activation_fn_kwargs",
    "prepend_bos",
    "normalize_activations",
    "dtype",
    "device",
    "model_from_pretrained_kwargs",
    "dataset_path",
    "dataset_trust_remote_code",
    "seqpos_slice",
    "training_tokens",
    "sae_lens_training_version",
    "neuronpedia_id",
]


@pytest.mark.parametrize("name", NAMES)
def test_saebench_finds_all_that_it_reads(name: str) -> None:
    s = planted(name, norm=3.0)
    it = for_saebench(s, model_name="gpt2-small")
    assert [f for f in SAEBENCH_FIELDS if not hasattr(it.cfg, f)] == []
    json.dumps(it.cfg.to_dict())
    assert (it.cfg.model_name, it.cfg.hook_name, it.cfg.hook_layer) == ("gpt2-small", SITE, 2)
    assert (it.cfg.d_in, it.cfg.d_sae) == (D, F)
    for added in ("exclude_special_tokens", "architecture_str"):  # as _standardize_sae_cfg does
        setattr(it.cfg, added, None)
    assert isinstance(it, torch.nn.Module)
    shapes = {n: tuple(getattr(it, n).shape) for n in ("W_enc", "W_dec", "b_enc", "b_dec", "b_mag")}
    assert shapes == {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "b_mag": (F,)}
    norms = it.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(F), atol=1e-5) == (name != "topk")
    x = acts(12).view(3, 4, D)
    assert it.encode(x).shape == (3, 4, F)
    assert torch.allclose(it(x), s(x), atol=1e-4)
    assert torch.allclose(it(x.flatten(0, 1)).view_as(x), it.decode(it.encode(x)), atol=1e-5)
    same = s.encode(x) * (1 if name == "topk" else s.W_dec.norm(dim=1))
    assert torch.allclose(it.encode(x), same, atol=1e-4)
    half = it.to(device="cpu", dtype=torch.bfloat16)
    assert half is it
    assert (it.dtype, it.device.type, it.W_enc.dtype) == (torch.bfloat16, "cpu", torch.bfloat16)
    assert it(x.bfloat16()).dtype == torch.bfloat16
    assert s.dtype == torch.float32  # the SAE itself is left alone


def test_saebench_must_know_the_model_and_the_place() -> None:
    s = planted("topk")
    s.cfg |= {"model": None, "site": None}
    with pytest.raises(SpecError, match="SAEBench needs model_name, hook_name, hook_layer"):
        for_saebench(s)
    it = for_saebench(s, model_name="gpt2-small", hook_name="hook_embed", hook_layer=0)
    assert it.cfg.hook_layer == 0
