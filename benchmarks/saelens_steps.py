"""SAELens' own training step, timed when asked; run by an interpreter that has SAELens.

    python saelens_steps.py BATCHES.safetensors THREADS

Requests are JSON lines on standard input, answers JSON lines on standard output; between them it waits,
so that it can take turns with another process. {"job": ..., "dead": share} makes a trainer of
saelens_trainer.py's job; {"flags": NAME, "steps": n} takes n steps and answers {"seconds": s}.

Flags: `default`; `onednn`, float32 matmuls through oneDNN (`set_float32_matmul_precision("medium")`,
which on some processors computes in bfloat16); `autocast`, the forward pass in bfloat16.
"""

import contextlib
import itertools
import json
import sys
import time
from typing import Any

import torch
from sae_lens.training.sae_trainer import SAETrainer
from saelens_trainer import config, initialised
from safetensors.torch import load_file


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    batches = itertools.cycle(load_file(sys.argv[1])["batches_SND"])
    trainer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "job" in request:
            trainer = made(request["job"], request["dead"])
            answer: dict[str, Any] = {"parameters": sorted(trainer.sae.state_dict())}
        else:
            answer = {"seconds": timed(trainer, batches, request["flags"], request["steps"])}
        print(json.dumps(answer), flush=True)


def made(job: dict[str, Any], dead: int) -> SAETrainer[Any, Any]:
    """Their trainer; of every `dead` latents one is dead, and is known to be (0: none)."""
    trainer = SAETrainer(config(job), initialised(job), data_provider=iter(()))
    if dead:
        trainer.n_forward_passes_since_fired[::dead] = 10**9
    return trainer


def timed(trainer: SAETrainer[Any, Any], batches: Any, flags: str, steps: int) -> float:
    torch.set_float32_matmul_precision("medium" if flags == "onednn" else "highest")
    trainer.autocast_if_enabled = (
        torch.autocast(device_type="cpu", dtype=torch.bfloat16)
        if flags == "autocast"
        else contextlib.nullcontext()
    )
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(next(batches))
        trainer.n_training_steps += 1
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
