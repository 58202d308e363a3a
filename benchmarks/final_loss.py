"""What SAEs end at: our trainer beside SAELens' on the same batches of a dataset, one JSON line.

TopK and BatchTopK, several seeds; both trainers read the stored rows in the same order, scaled to
mean norm sqrt(d_in), and start from decoder rows of the same directions, each at its own norms.
Adam at one constant learning rate, no warm-ups, nothing else set: the rest is each project's
default. Both SAEs are measured on the validation split by one function. FVU of each seed, mean,
standard deviation, and t of the paired differences. `--quick` proves that it runs.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sae"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before tests/, whose folders have the packages' names

import numpy as np
import torch
from ground_truth import jobs_running
from hardware import report
from safetensors.torch import save_file

import actcache
import sae
from sae.learner import Learner

BATCH_SIZE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a dataset with a validation split")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20 steps, two seeds; its figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.seeds = 20 * BATCH_SIZE, 2
    dataset = actcache.open(options.data)
    for kind, theirs in ((sae.TopK, "topk"), (sae.BatchTopK, "batchtopk")):
        with tempfile.TemporaryDirectory() as temporary:
            compare(dataset, kind(d_sae=options.d_sae, k=options.k), theirs, Path(temporary), options)


def compare(
    dataset: actcache.Dataset, config: sae.TopK, theirs: str, directory: Path, options: argparse.Namespace
) -> None:
    """Print one architecture's line."""
    site = dataset.sites[-1]
    scale = math.sqrt(dataset.d_in(site)) / dataset.stats(site)["mean_norm"]
    trainings = [training(options, seed) for seed in range(options.seeds)]
    jobs = [
        their_job(dataset, site, config, theirs, scale, each, directory / f"saelens-{each.seed}")
        for each in trainings
    ]
    ours: list[sae.SAE] = []
    for each in trainings:
        stream = dataset.stream(site, batch_size=BATCH_SIZE, seed=each.seed, metadata=False)
        ours += sae.train(stream, config, each)
    with jobs_running(jobs):
        pass
    acts_ND = dataset.split("validation").read(site, slice(0, 65_536))
    found = {
        "actcache": [fvu(s, acts_ND, 1.0) for s in ours],
        "saelens": [fvu(sae.load(job["out"]), acts_ND, scale) for job in jobs],
    }
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    spread = statistics.stdev(differences)
    report(
        "final-loss", arch=config.architecture, d_sae=config.d_sae, k=config.k, rows=options.rows, lr=options.lr,
        dataset=dataset.id, site=site, fvu={name: [round(v, 5) for v in values] for name, values in found.items()},
        mean={name: round(statistics.mean(values), 5) for name, values in found.items()},
        sd={name: round(statistics.stdev(values), 5) for name, values in found.items()},
        t=round(statistics.mean(differences) / (spread / math.sqrt(len(differences))), 1) if spread else None,
    )  # fmt: skip


def training(options: argparse.Namespace, seed: int) -> sae.Training:
    return sae.Training(
        n_rows=options.rows,
        lr=options.lr,
        seed=seed,
        betas=(0.9, 0.999),
        lr_warmup_rows=0,
        lr_decay=0.0,
        dead_after_rows=1001 * BATCH_SIZE,
        b_dec_init="zero",
        input_scale="sqrt_d",
    )


def their_job(
    dataset: actcache.Dataset,
    site: str,
    config: sae.TopK,
    theirs: str,
    scale: float,
    each: sae.Training,
    out: Path,
) -> dict[str, Any]:
    """What benchmarks/saelens_trainer.py is asked for: weights of norm 0.1, as SAELens starts."""
    out.mkdir(parents=True)
    p = Learner(config, dataset.d_in(site), 1.0, each.rules(config), each.seed).parameters
    W_dec = 0.1 * p["W_dec_FD"]
    save_file({"W_enc": W_dec.T.contiguous(), "W_dec": W_dec}, out / "initial.safetensors")
    return {
        "url": dataset.url,
        "site": site,
        "scale": scale,
        "batch_size": BATCH_SIZE,
        "n_rows": each.n_rows,
        "epochs": 1,
        "order_seed": each.seed,
        "lr": each.lr,
        "architecture": theirs,
        "options": {"k": config.k},
        "initial": str(out / "initial.safetensors"),
        "out": str(out),
        "threads": len(os.sched_getaffinity(0)),
    }


@torch.no_grad()
def fvu(s: sae.SAE, acts_ND: np.ndarray, scale: float) -> float:
    """Fraction of variance unexplained of the rows; those that SAELens' SAE saw were scaled."""
    x_ND = torch.from_numpy(acts_ND * np.float32(scale))
    error_ND = torch.cat([s(part) - part for part in x_ND.split(8192)]).double()
    return float(error_ND.square().sum() / (x_ND.double() - x_ND.double().mean(0)).square().sum())


if __name__ == "__main__":
    main()
