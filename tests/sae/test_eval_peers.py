"""SAELens' evals and SAEBench's core metrics give our figures on one exported SAE, its tokens and float32 rows.

Their functions are called as they are, each in its own environment, on a real HookedTransformer that has
the weights of the tiny GPT-2. BOS is the one token that neither they nor we count.
"""

import json
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from toy_dataset import BOS, tiny_lm, toy_dataset

import sae
from sae.evals import evaluate
from sae.evals.latents import read_parquet

pytestmark = pytest.mark.slow

SITE = "blocks.0.hook_resid_post"
D_MODEL, D_SAE, N_SEQUENCES, N_TOKENS = 24, 40, 64, 16

MODEL = """
import json, sys
from pathlib import Path
import numpy as np, torch
from transformers import GPT2LMHeadModel
from transformer_lens import HookedTransformer, HookedTransformerConfig

here = Path(sys.argv[1])
torch.set_grad_enabled(False)
hf = GPT2LMHeadModel.from_pretrained(here / "model").eval()
c = hf.config
cfg = HookedTransformerConfig(
    n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
    d_mlp=4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN",
    eps=c.layer_norm_epsilon, original_architecture="GPT2LMHeadModel", device="cpu", default_prepend_bos=False)
try:
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
except ImportError:
    from transformer_lens.loading_from_pretrained import convert_gpt2_weights
model = HookedTransformer(cfg)
model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
tokens = torch.from_numpy(np.load(here / "tokens.npy"))
assert torch.allclose(model(tokens[:2]), hf(tokens[:2]).logits, atol=1e-3)

class Store:
    "What their evals ask of an activation store: the recorded batches of 16 sequences, in order."
    store_batch_size_prompts, context_size = 16, tokens.shape[1]
    def __init__(self): self.reset_input_dataset()
    def reset_input_dataset(self): self.batches = iter(tokens.split(16))
    def get_batch_tokens(self, n): return next(self.batches)
n = len(tokens) // 16
flags = dict(compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
             compute_variance_metrics=True, compute_featurewise_density_statistics=True)
"""

SAELENS = (
    MODEL
    + """
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
s = SAE.load_from_disk(here / "saelens")
config = EvalConfig(batch_size_prompts=16, n_eval_reconstruction_batches=n, n_eval_sparsity_variance_batches=n, **flags)
found, by_latent = run_evals(s, Store(), model, ActivationScaler(), config, exclude_special_tokens=[0])
print(json.dumps([found, by_latent]))
"""
)

SAEBENCH = (
    MODEL
    + """
from sae_lens import SAE
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
class Ours(torch.nn.Module):
    "The surface of a custom SAE of SAEBench around SAELens' one."
    def __init__(self, s):
        super().__init__()
        from types import SimpleNamespace
        self.s, self.device = s, torch.device("cpu")
        self.cfg = SimpleNamespace(hook_name="blocks.0.hook_resid_post", hook_layer=0, hook_head_index=None, d_sae=s.cfg.d_sae)
    def encode(self, x): return self.s.encode(x)
    def decode(self, f): return self.s.decode(f)
config = CoreEvalConfig(model_name="tiny", batch_size_prompts=16, n_eval_reconstruction_batches=n,
                        n_eval_sparsity_variance_batches=n, exclude_special_tokens_from_reconstruction=True, **flags)
found, by_latent = run_evals(Ours(SAE.load_from_disk(here / "saelens")), Store(), model, config, ignore_tokens={0})
print(json.dumps([found, by_latent]))
"""
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """An exported SAE, the model and tokens on disk, and our figures."""
    here = tmp_path_factory.mktemp("evalpeers")
    lm = tiny_lm()
    ds = toy_dataset(lm, n_sequences=N_SEQUENCES, n_tokens=N_TOKENS)
    view = ds.split("validation")
    view.length[:] = N_TOKENS  # they know no padding: what lies behind the end is BOS, which nobody counts
    lm.model.save_pretrained(here / "model")
    np.save(here / "tokens.npy", view.input_ids)
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=g), dim=1)
    cfg = {"architecture": "topk", "d_in": D_MODEL, "d_sae": D_SAE, "k": 8, "site": SITE}
    b_dec = torch.from_numpy(ds.stats(SITE)["mean"]).float()
    s = sae.SAE(cfg, W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, b_dec)
    sae.export(s, "saelens", here / "saelens", model_name="gpt2-small")
    s.path = here / "ours"
    s.path.mkdir()
    ours = evaluate(s, ds, lm, n_sequences=N_SEQUENCES, compat="saelens")
    assert (view.input_ids[view.kept] != BOS).all()
    return here, ours


def compared(ours: dict, theirs: dict, here: Path, by_latent: dict) -> None:
    names = {
        ("model_behavior_preservation", "kl_div_score"): "kl_score",
        ("model_behavior_preservation", "kl_div_with_sae"): "kl",
        ("model_behavior_preservation", "kl_div_with_ablation"): "kl_zero",
        ("model_performance_preservation", "ce_loss_score"): "ce_recovered_zero",
        ("model_performance_preservation", "ce_loss_with_sae"): "ce_spliced",
        ("model_performance_preservation", "ce_loss_with_ablation"): "ce_zero",
        ("model_performance_preservation", "ce_loss_without_sae"): "ce_clean",
        ("reconstruction_quality", "explained_variance_legacy"): "explained_variance_legacy",
        ("reconstruction_quality", "cossim"): "cosine",
        ("shrinkage", "l2_ratio"): "l2_ratio",
        ("shrinkage", "relative_reconstruction_bias"): "relative_bias_saebench",
        ("sparsity", "l0"): "l0",
        ("sparsity", "l1"): "l1",
    }
    for (group, name), mine in names.items():
        assert ours[mine] == pytest.approx(theirs[group][name], rel=1e-3, abs=1e-4), name
    rows = read_parquet(here / "ours" / "latents.parquet")
    density = [row["density"] for row in rows]
    assert density == pytest.approx(by_latent["feature_density"], rel=1e-3)
    consistent = [row["fires"] / row["prompts"] if row["prompts"] else np.nan for row in rows]
    assert consistent == pytest.approx(by_latent["consistent_activation_heuristic"], rel=1e-3, nan_ok=True)


def test_saelens_gives_our_figures(shared):
    here, ours = shared
    theirs, by_latent = json.loads(peers.run(SAELENS, here).splitlines()[-1])
    compared(ours, theirs, here, by_latent)
    quality = theirs["reconstruction_quality"]
    assert ours["explained_variance"] == pytest.approx(quality["explained_variance"], rel=1e-3)
    assert ours["mse"] == pytest.approx(quality["mse"], rel=1e-3)


def test_saebench_gives_our_figures_and_its_own_mistake(shared):
    here, ours = shared
    printed = peers.run(SAEBENCH, here, interpreter=peers.saebench_python())
    theirs, by_latent = json.loads(printed.splitlines()[-1])
    compared(ours, theirs, here, by_latent)
    quality = theirs["reconstruction_quality"]
    assert ours["explained_variance_saebench_wrong"] == pytest.approx(quality["explained_variance"], rel=1e-3)
    assert ours["mse_saebench"] == pytest.approx(quality["mse"], rel=1e-3)
    assert ours["explained_variance"] != pytest.approx(quality["explained_variance"], abs=1e-2)
