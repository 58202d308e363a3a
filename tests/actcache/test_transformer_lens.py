"""Our sites against TransformerLens' `run_with_cache` of the same weights, in an environment of its own."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, N_BLOCKS, save_tiny_lm, shared_model, tokens
from venvs import make_venv

from actcache.capture import run_capture, site_names

pytestmark = pytest.mark.slow

# The last release with HookedTransformer, which has layers of its own; 4.0 only wraps Hugging Face's.
TRANSFORMER_LENS = "transformer-lens==3.9.0"
SCRIPT = Path(__file__).with_name("lens_cache.py")

# A value passes up to 4 matrix products in each of 3 blocks, each a sum of up to 128 products in
# another order: 128 * 2**-24 of its terms' size at worst.
TOLERANCE = 4 * N_BLOCKS * 128 * 2**-24


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    """{family: {hook name: value}} of every tiny model by TransformerLens."""
    directory = tmp_path_factory.mktemp("lens")
    python = make_venv(directory / "venv", "torch", TRANSFORMER_LENS)
    np.save(directory / "ids.npy", tokens().numpy())
    models = [save_tiny_lm(directory / family, family, tokenizer=False) for family in FAMILIES]
    command = [python, "-W", "ignore", SCRIPT, directory / "ids.npy", *models]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {model.name: dict(np.load(model / "lens.npz")) for model in models}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_that_of_transformer_lens(lens, family):
    model, theirs = shared_model(family), lens[family]
    acts = run_capture(model, tokens(), site_names(model))
    for site, ours_BTD in acts.items():
        value = theirs[site].reshape(ours_BTD.shape)  # their heads have an axis of their own
        if site.endswith(".hook_normalized"):  # theirs lies before the norm's weight and bias
            norm = site.removesuffix(".hook_normalized")
            value = value * theirs[f"{norm}.w"] + theirs.get(f"{norm}.b", 0)
        np.testing.assert_allclose(
            ours_BTD, value, rtol=0, atol=TOLERANCE * np.abs(value).max(), err_msg=site
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_site_of_theirs_with_a_name_of_ours_is_left_out(lens, family):
    """Sites that we name in any family and TransformerLens has in this one, we have too."""
    known = {site for other in FAMILIES for site in site_names(shared_model(other))}
    assert known & set(lens[family]) == set(site_names(shared_model(family)))
