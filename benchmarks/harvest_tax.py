"""Harvest tokens/s over bare forward tokens/s: what capturing, quantising, encoding and storing cost.

An engine (this process, or one Ray actor with all cores) works off blocks as a harvest does, two in flight. The
bare pass runs the same batches through the plain HF model with the later blocks cut off. Pairs alternate over
the same blocks; the ratio is the median of the pairs' ratios. Start-up, calibration and the fidelity check are
left out (DESIGN, section 6). Then it prints where a harvest's time goes (`overlap.Times`, seconds).
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import report

import actcache
from actcache.corpus import tokenise
from actcache.driver import resolve
from actcache.engines import Engine, LocalEngine, Unit
from actcache.harvester import plan_block
from actcache.lm import load_lm, load_tokenizer
from actcache.ray_engine import RayEngine
from actcache.segments import RecordRows
from actcache.sources import resolve_corpus
from actcache.store import open_store

SITES = ("blocks.3.hook_resid_post", "blocks.3.hook_mlp_out")


def save_gpt2_small(directory: str) -> str:
    """A model of GPT-2's size (124 M parameters) with random weights and the bundled tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    path = f"{directory}/gpt2-small-random"
    GPT2LMHeadModel(GPT2Config()).save_pretrained(path)
    load_tokenizer("bundled:stdlib-gpt2").save_pretrained(path)
    return path


def work_off(engine: Engine, units: list[Unit]) -> float:
    """Seconds for the units."""
    start, left = time.perf_counter(), list(units)
    while left or engine.busy():
        while left and engine.free():
            engine.submit(left.pop(0))
        for unit, result in engine.completed():
            assert isinstance(result, RecordRows), (unit, result)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--sites", type=int, default=1, choices=(1, 2))
    parser.add_argument("--blocks", type=int, default=4, help="blocks of a pair")
    parser.add_argument("--block-rows", type=int, default=32_768)
    parser.add_argument("--lm-batch", type=int, default=32)
    parser.add_argument("--model", choices=("bundled", "gpt2-small"), default="bundled")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    options = parser.parse_args()
    directory = tempfile.mkdtemp()
    model = save_gpt2_small(directory) if options.model == "gpt2-small" else "bundled:stdlib-gpt2"
    spec = actcache.Spec(
        model=model,
        corpus=actcache.Corpus("bundled:stdlib", max_tokens=1_000_000),
        sites=SITES[: options.sites],
        context_size=256,
        n_tokens=1,
        block_rows=options.block_rows,
    )
    resolved = resolve(spec)
    root = open_store(directory)
    tokens = tokenise(spec, resolve_corpus(spec.corpus), resolved.tokenizer, root, progress=False)
    job = resolved.job(f"{directory}/dataset", tokens.store.url, lm_batch=options.lm_batch)
    bare = load_lm(spec.model).model.transformer
    bare.h = bare.h[:4]
    plans = [plan_block(tokens, resolved.identity, "train", b) for b in range(options.blocks)]
    n_tokens = sum(plan.input_ids_ST.size for plan in plans)
    units: list[Unit] = [("train", plan.block, resolved.sites) for plan in plans]

    def run_bare() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for plan in plans:
                for i in range(0, len(plan.input_ids_ST), options.lm_batch):
                    ids = torch.from_numpy(plan.input_ids_ST[i : i + options.lm_batch].astype(np.int64))
                    bare(ids, use_cache=False)
        return time.perf_counter() - start

    def run_harvest(engine: Engine) -> float:
        for part in ("train", "_records"):
            shutil.rmtree(Path(directory) / "dataset" / part, ignore_errors=True)
        return work_off(engine, units)

    cores: dict[str, Any] = {"placement": {"num_cpus": os.cpu_count()}}
    with LocalEngine(job) if options.engine == "local" else RayEngine(job, 1, 0, **cores) as engine:
        engine.prepare()
        run_bare(), run_harvest(engine)  # warm-up
        ratios, rates = [], []
        before = engine.workers()[0].times
        for pair in range(options.pairs):
            if pair % 2:
                bare_s, harvest_s = run_bare(), run_harvest(engine)
            else:
                harvest_s, bare_s = run_harvest(engine), run_bare()
            ratios.append(bare_s / harvest_s)
            rates.append((n_tokens / bare_s, n_tokens / harvest_s))
        after = engine.workers()[0].times
    report(
        "harvest_tax",
        model=options.model,
        engine=options.engine,
        sites=options.sites,
        lm_batch=options.lm_batch,
        block_rows=options.block_rows,
        ratio=round(statistics.median(ratios), 4),
        ratios=[round(r, 4) for r in ratios],
        bare_tokens_per_s=round(statistics.median(r[0] for r in rates)),
        harvest_tokens_per_s=round(statistics.median(r[1] for r in rates)),
        spent={name: round(after[name] - before.get(name, 0), 2) for name in after if name.endswith("_s")},
    )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
