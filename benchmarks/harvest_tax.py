"""Harvest tokens/s over bare forward tokens/s: what capturing, quantising, encoding and storing cost.

Both run the bundled LM in this process over the same batches and stop after the same block; the bare
pass is the plain HF model with the later blocks cut off. Pairs alternate; the ratio is the median of
the pairs' ratios. Start-up, calibration and the fidelity check are left out (DESIGN, section 6).
"""

import argparse
import shutil
import statistics
import tempfile
import time

import numpy as np
import torch
from hardware import report

import actcache
from actcache.capture import load_lm
from actcache.corpus import resolve_corpus, tokenise
from actcache.driver import resolve
from actcache.harvester import Harvester, Job, plan_block
from actcache.store import open_store

SITES = ("blocks.3.hook_resid_post", "blocks.3.hook_mlp_out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sites", type=int, default=1, choices=(1, 2))
    parser.add_argument("--block-rows", type=int, default=65_536)
    parser.add_argument("--lm-batch", type=int, default=32)
    options = parser.parse_args()
    directory = tempfile.mkdtemp()
    spec = actcache.Spec(
        model="bundled:stdlib-gpt2",
        corpus=actcache.Corpus("bundled:stdlib"),
        sites=SITES[: options.sites],
        context_size=256,
        n_tokens=1,
        block_rows=options.block_rows,
    )
    resolved = resolve(spec)
    root = open_store(directory)
    tokens = tokenise(spec, resolve_corpus(spec.corpus), resolved.tokenizer, root, progress=False)
    job = Job(
        identity=resolved.identity,
        dataset_url=f"{directory}/dataset",
        tokens_url=tokens.store.url,
        storage_options={},
        model=spec.model,
        model_revision=None,
        sites=resolved.sites,
        lm_batch=options.lm_batch,
        device="cpu",
        threads=0,
    )
    harvester = Harvester(job)
    harvester.calibrate()
    bare = load_lm(spec.model).model.transformer
    bare.h = bare.h[:4]
    plans = [plan_block(tokens, resolved.identity, "train", b) for b in range(options.pairs + 1)]

    def run_bare(plan: object) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for i in range(0, len(plan.input_ids_ST), options.lm_batch):
                ids = torch.from_numpy(plan.input_ids_ST[i : i + options.lm_batch].astype(np.int64))
                bare(ids, use_cache=False)
        return time.perf_counter() - start

    def run_harvest(block: int) -> float:
        start = time.perf_counter()
        harvester.run_block("train", block, resolved.sites)
        return time.perf_counter() - start

    run_bare(plans[0]), run_harvest(0)  # warm-up
    ratios, rates = [], []
    for pair in range(1, options.pairs + 1):
        n_tokens = plans[pair].input_ids_ST.size
        if pair % 2:
            bare_s, harvest_s = run_bare(plans[pair]), run_harvest(pair)
        else:
            harvest_s, bare_s = run_harvest(pair), run_bare(plans[pair])
        ratios.append(bare_s / harvest_s)
        rates.append((n_tokens / bare_s, n_tokens / harvest_s))
    report(
        "harvest_tax",
        sites=options.sites,
        lm_batch=options.lm_batch,
        block_rows=options.block_rows,
        ratio=round(statistics.median(ratios), 4),
        ratios=[round(r, 4) for r in ratios],
        bare_tokens_per_s=round(statistics.median(r[0] for r in rates)),
        harvest_tokens_per_s=round(statistics.median(r[1] for r in rates)),
    )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
