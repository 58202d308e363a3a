"""SAELens' trainer on a dataset of ours, from given weights; run by an interpreter that has SAELens.

    python saelens_trainer.py JOB.json ...

Knows nothing of our `sae`; the rows come through `actcache` in the order that our trainer gets them.
The job: url, site, batch_size, n_rows, order_seed, lr, architecture, options (of SAELens' config),
initial (safetensors), out; a factor `scale` of the rows and `threads`, if not 1. With `record` (steps) it writes recorded.safetensors in place of training
to the end: parameters, loss and gradients before clipping of each of these steps. A job that ends leaves
done.json, a copy of itself, in its `out`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

import actcache


def main() -> None:
    for path in sys.argv[1:]:
        run(json.loads(Path(path).read_text()))


def run(job: dict[str, Any]) -> None:
    """One job, from its first weights to its files."""
    torch.set_num_threads(job.get("threads", 1))  # the smallest SAEs are slower on two
    sae = initialised(job)
    trainer = SAETrainer(config(job), sae, rows(job))
    if job.get("record"):
        save_file(record(trainer, job["record"]), Path(job["out"]) / "recorded.safetensors")
    else:
        trainer.fit()
        sae.save_inference_model(job["out"])
    (Path(job["out"]) / "done.json").write_text(json.dumps(job))


def initialised(job: dict[str, Any]) -> Any:
    """Their SAE with the given weights."""
    kind, settings = get_sae_training_class(job["architecture"])
    given = load_file(job["initial"])
    d_in, d_sae = given["W_enc"].shape
    sae = kind(settings(d_in=d_in, d_sae=d_sae, normalize_activations="none", **job["options"]))
    with torch.no_grad():
        for name, tensor in given.items():
            getattr(sae, name).copy_(tensor)
    return sae


def rows(job: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Batches in our order."""
    dataset = actcache.open(job["url"])
    stream = dataset.stream(
        job["site"],
        batch_size=job["batch_size"],
        seed=job["order_seed"],
        epochs=job["epochs"],
        metadata=False,
    )
    for batch in stream:
        yield torch.from_numpy(batch[job["site"]] * np.float32(job.get("scale", 1)))


def config(job: dict[str, Any]) -> SAETrainerConfig:
    """As their `train_toy_sae`: Adam at a constant learning rate, gradients clipped at 1."""
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=job["n_rows"],
        device="cpu",
        autocast=False,
        lr=job["lr"],
        lr_end=job["lr"],
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=job["batch_size"],
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )


def record(trainer: SAETrainer[Any, Any], n_steps: int) -> dict[str, torch.Tensor]:
    """`step.NAME` and `step.NAME.grad` of each parameter, and `losses` [steps]."""
    found: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def noting(parameters: Any, *arguments: Any, **options: Any) -> Any:
        step = len(losses)
        for name, p in trainer.sae.named_parameters():
            found[f"{step}.{name}"] = p.detach().clone()
            found[f"{step}.{name}.grad"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        return clip(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = noting
    for _ in range(n_steps):
        losses.append(trainer.step(next(trainer.data_provider)).loss.item())
        trainer.n_training_steps += 1
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)}


if __name__ == "__main__":
    main()
