"""SAELens and dictionary_learning, in their own process, compute what we do from what was exported, and the reverse.

Each hands over a directory and its own encode, decode and forward of the same rows.
"""

from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export_foreign import NAMES, acts, planted

import sae

pytestmark = pytest.mark.slow

PEERS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
from dictionary_learning.dictionary import (
    AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary

here = Path(sys.argv[1])
x = load_file(here / "acts.safetensors")["x"]
D, F, K = x.shape[1], 24, 3

@torch.no_grad()
def values(s, path):
    latents = s.encode(x)
    assert torch.allclose(s(x), s.decode(latents), atol=1e-5)
    out = {"latents": latents, "decoded": s.decode(latents), "forward": s(x)}
    save_file({name: t.contiguous() for name, t in out.items()}, path / "values.safetensors")

for path in sorted((here / "ours" / "saelens").iterdir()):
    s = SAE.load_from_disk(path)
    assert s.cfg.metadata.hook_name == "blocks.2.hook_resid_post", s.cfg
    values(s, path)
for path in sorted((here / "ours" / "dictionary_learning").iterdir()):
    ae, config = load_dictionary(str(path), "cpu")
    assert config["trainer"]["lm_name"] == "gpt2-small" and config["trainer"]["layer"] == 2, config
    assert config["buffer"]["ctx_len"] == 64
    values(ae, path)

g = torch.Generator().manual_seed(0)
@torch.no_grad()
def random(s):
    for name, p in s.named_parameters():
        p.copy_(torch.randn(p.shape, generator=g) / (4 if p.ndim == 1 else 1))
        if name == "threshold":
            p.abs_()
    return s

theirs = here / "theirs" / "saelens"
for name, kind, config in (
    ("standard", StandardSAE, StandardSAEConfig(d_in=D, d_sae=F)),
    ("standard-whole", StandardSAE, StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False)),
    ("gated", GatedSAE, GatedSAEConfig(d_in=D, d_sae=F)),
    ("gated-whole", GatedSAE, GatedSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False)),
    ("jumprelu", JumpReLUSAE, JumpReLUSAEConfig(d_in=D, d_sae=F)),
    ("topk", TopKSAE, TopKSAEConfig(d_in=D, d_sae=F, k=K)),
    ("topk-rescaled", TopKSAE, TopKSAEConfig(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True)),
):
    s = random(kind(config))
    s.save_model(theirs / name)
    values(s, theirs / name)
matryoshka = {"matryoshka_widths": [6, 12, F]}
for name, kind, config in (
    ("batchtopk", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)),
    ("matryoshka", MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=K, **matryoshka)),
):
    s = random(kind(config))
    s.topk_threshold.fill_(2.5)
    s.save_model(theirs / (name + "-training"))
    s.save_inference_model(theirs / name)
    s = SAE.load_from_disk(theirs / name)
    values(s, theirs / name)
    values(s, theirs / (name + "-training"))

theirs = here / "theirs" / "dictionary_learning"
for ae, more in (
    (AutoEncoder(D, F), {}),
    (AutoEncoderNew(D, F), {}),
    (GatedAutoEncoder(D, F), {}),
    (JumpReluAutoEncoder(D, F), {}),
    (AutoEncoderTopK(D, F, K), {"k": K}),
    (BatchTopKSAE(D, F, K), {"k": K}),
    (MatryoshkaBatchTopKSAE(D, F, K, [6, 6, 12]), {"k": K}),
):
    name = type(ae).__name__
    random(ae)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        ae.threshold.fill_(0.9)
    path = theirs / name
    path.mkdir(parents=True)
    torch.save(ae.state_dict(), path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 2, "lm_name": "gpt2", **more}
    (path / "config.json").write_text(json.dumps({"trainer": trainer}))
    values(load_dictionary(str(path), "cpu")[0], path)
"""


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("peers")
    save_file({"x": acts()}, here / "acts.safetensors")
    for format in ("saelens", "dictionary_learning"):
        for name in NAMES:
            path = here / "ours" / format / name
            sae.export(planted(name), format, path, model_name="gpt2-small")
    peers.run(PEERS, here)
    return here


def _assert_same(s: sae.SAE, directory: Path) -> None:
    theirs = load_file(directory / "values.safetensors")
    x = acts()
    latents = s.encode(x)
    assert 0.02 < (latents > 0).float().mean() < 0.9
    assert torch.allclose(latents, theirs["latents"], atol=1e-5), (latents - theirs["latents"]).abs().max()
    assert torch.allclose(s.decode(theirs["latents"]), theirs["decoded"], atol=1e-5)
    assert torch.allclose(s(x), theirs["forward"], atol=1e-5), (s(x) - theirs["forward"]).abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
def test_they_compute_what_we_do_from_what_we_export(handed_over: Path, format: str, name: str) -> None:
    _assert_same(planted(name), handed_over / "ours" / format / name)


SAELENS = ["standard", "standard-whole", "gated", "gated-whole", "jumprelu", "topk", "topk-rescaled"]
SAELENS += ["batchtopk", "batchtopk-training", "matryoshka", "matryoshka-training"]
CLASSES = ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK"]
CLASSES += ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"]


@pytest.mark.parametrize(
    "where", [*(f"saelens/{n}" for n in SAELENS), *(f"dictionary_learning/{n}" for n in CLASSES)]
)
def test_we_compute_what_they_do_from_what_they_save(handed_over: Path, where: str) -> None:
    directory = handed_over / "theirs" / where
    _assert_same(sae.load(directory), directory)
