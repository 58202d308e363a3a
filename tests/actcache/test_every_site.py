"""Whole harvests of every site of every family, against a forward pass of one sequence at a time."""

import numpy as np
import pytest
import torch
from tiny_harvest import tiny_spec
from tiny_models import FAMILIES, shared_model

import actcache
from actcache.capture import run_capture
from actcache.families import site_names
from actcache.lm import load_lm


@pytest.mark.parametrize(
    "family", [f if f == "gpt2" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_every_site_holds_an_unbatched_forward_pass_within_its_precision(tmp_path, family):
    """Over the whole corpus, so that the rows are those that the step was taken from."""
    sites = site_names(shared_model(family))
    spec = tiny_spec(
        tmp_path,
        family,
        sites=sites,
        n_tokens=10**6,
        precision="fvu:1e-2",
        validation_blocks=0,
        test_blocks=0,
    )
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    model = load_lm(spec.model).model
    assert sorted(dataset.sites) == sorted(sites)
    rows = dataset.rows(slice(None))
    direct = {site: np.empty((dataset.n_rows, dataset.d_in(site)), np.float32) for site in dataset.sites}
    for sequence in np.unique(rows.sequence):
        input_ids = torch.from_numpy(dataset.context(int(sequence)).astype(np.int64))[None]
        with torch.inference_mode():
            acts = run_capture(model, input_ids, dataset.sites)
        mine = rows.sequence == sequence
        for site in dataset.sites:
            direct[site][mine] = acts[site][0].numpy()[rows.position[mine]]
    for site in dataset.sites:
        stored_ND = dataset.read(site, slice(None))
        bound = dataset.stats(site)["max_error"]
        largest = np.abs(direct[site]).max()
        # the stated bound, and what batching perturbs: some float32 roundings of the largest value
        assert np.abs(stored_ND - direct[site]).max() <= bound + 1e-5 * largest, site
        assert dataset.stats(site)["fvu_core"] <= 1e-2, site
