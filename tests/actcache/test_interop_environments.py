"""The libraries themselves take what we hand them: each set in an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_harvest import SITES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

TORCH = ["torch==2.13.0"]
READER = ["numpy", "zarr", "numcodecs", "google-crc32c", "fsspec", "s3fs", "pyarrow", "click", "rich"]
LOADERS = [*TORCH, *READER, "torchdata", "datasets", "xarray", "ray[data]"]
TRAINERS = [*TORCH, *READER, "sae-lens", "dictionary-learning", "nnsight", "wandb"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """python of an environment with these packages, made once each."""
    made = {}

    def python(packages, *pins):
        key = tuple(packages)
        if key not in made:
            directory = tmp_path_factory.mktemp("venv") / "venv"
            subprocess.run([sys.executable, "-m", "venv", directory], check=True)
            made[key] = directory / "bin" / "python"
            command = [made[key], "-m", "pip", "install", "-q", *pins, *packages]
            subprocess.run(command, check=True)
            # nothing here needs it, and its wheels do not load beside a CPU-only torch
            subprocess.run([made[key], "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
        return made[key]

    return python


def run(python, script, *arguments):
    """The script's last line of output."""
    settings = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled"}
    out = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | settings | {"HF_HUB_OFFLINE": "1"},
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return out.stdout.strip().splitlines()[-1]


LOADER = """
import json, sys
import numpy as np
import actcache
from actcache.torch_data import TorchStream
from torchdata.stateful_dataloader import StatefulDataLoader

def loader(url, site, workers):
    data = TorchStream(actcache.open(url), site, batch_size=200, lanes=8, epochs=2)
    options = {"multiprocessing_context": "spawn"} if workers else {}
    return StatefulDataLoader(data, batch_size=None, num_workers=workers, **options)

if __name__ == "__main__":
    url, site = sys.argv[1:]
    for workers in (0, 2):
        whole = [b[site].numpy().copy() for b in loader(url, site, workers)]
        for stop in (1, 7, len(whole) - 2):
            first = loader(url, site, workers)
            iterator = iter(first)
            for _ in range(stop):
                next(iterator)
            state = first.state_dict()
            del iterator
            again = loader(url, site, workers)
            again.load_state_dict(state)
            rest = [b[site].numpy() for b in again]
            assert len(rest) == len(whole) - stop, (workers, stop, len(rest), len(whole))
            assert all(np.array_equal(a, b) for a, b in zip(rest, whole[stop:], strict=True))
    print("resumed", len(whole))
"""


def test_the_stateful_loader_of_torchdata_resumes_at_the_next_batch(tiny, environment, tmp_path):
    script = tmp_path / "loader.py"  # spawned workers import it
    script.write_text(LOADER)
    code = f"import sys, runpy; sys.argv[0] = {str(script)!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    python = environment(LOADERS, "-c", ROOT / "constraints.txt")
    assert run(python, code, tiny[0].url, SITES[0]).startswith("resumed")


ARROW_LIKES = """
import sys
import numpy as np
import actcache
from actcache import interop
url, site = sys.argv[1:]
ds = actcache.open(url)
acts, rows = ds.read(site, slice(None)), ds.rows(slice(None))

hf = interop.hf_dataset(ds, site, n_shards=4)
assert hf.num_shards == 4
got = list(hf)
assert np.array_equal(np.array([r[site] for r in got], np.float32), acts)
assert np.array_equal([r["token_id"] for r in got], rows.token_id)
half = [list(hf.shard(2, i)) for i in (0, 1)]
assert sorted(len(h) for h in half) == sorted([len(got) - len(half[1]), len(half[1])])
batch = next(iter(hf.with_format("numpy").iter(100)))
assert np.array_equal(batch[site], acts[:100])

import xarray as xr, zarr
group = zarr.open_group(ds.url, mode="r")["train"]
part = group[site]
lazily = xr.Dataset(
    {"codes": (("row", "channel"), part["codes"]), "scale": ("row", part["scale"][:]),
     "multiple": ("channel", part["channel"][:]), "offset": ("channel", part["offset"][:])},
    coords={"token_id": ("row", group["token_id"][:]), "position": ("row", group["position"][:])},
)
some = lazily.where(lazily.position == 3, drop=True)
decoded = (some.codes * some.scale * some.multiple + some.offset).transpose("row", "channel")
assert np.allclose(decoded, acts[rows.position == 3], atol=1e-5)

import ray, ray.data
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
data = ray.data.read_datasource(interop.ray_datasource(ds), override_num_blocks=3)
assert data.count() == ds.n_rows
found = data.sort(["sequence", "position"]).take_batch(ds.n_rows)
order = np.lexsort((rows.position, rows.sequence))
assert np.array_equal(np.stack(found[site]), acts[order])
assert np.array_equal(found["token_id"], rows.token_id[order])
norms = data.map_batches(lambda b: {"norm": np.linalg.norm(np.stack(b[site]), axis=1)}).mean("norm")
assert np.isclose(norms, np.linalg.norm(acts, axis=1).mean(), rtol=1e-4)
ray.shutdown()
print("read", len(got))
"""


def test_hugging_face_xarray_and_ray_data_read_the_rows(tiny, environment):
    python = environment(LOADERS, "-c", ROOT / "constraints.txt")
    assert run(python, ARROW_LIKES, tiny[0].url, SITES[0]) == f"read {tiny[0].n_rows}"


SAELENS = """
import sys
import torch
import actcache
from actcache.torch_data import ActivationProvider
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
url, site = sys.argv[1:]
ds = actcache.open(url)
torch.manual_seed(0)
provider = ActivationProvider(ds, site, batch_size=256, lanes=8)
sae = TopKTrainingSAE(TopKTrainingSAEConfig(
    d_in=ds.d_in(site), d_sae=64, k=8, normalize_activations="expected_average_only_in"))
logger = LoggingConfig(log_to_wandb=False)
config = SAETrainerConfig(
    n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=256 * 300,
    device="cpu", autocast=False, lr=3e-3, lr_end=3e-3, lr_scheduler_name="constant", lr_warm_up_steps=0,
    adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=256,
    dead_feature_window=1000, feature_sampling_window=2000, logger=logger)
acts = torch.from_numpy(ds.read(site, slice(None)))
def unexplained():
    with torch.no_grad():
        return float(((sae(acts) - acts) ** 2).sum() / ((acts - acts.mean(0)) ** 2).sum())
SAETrainer(config, sae, provider).fit()
provider.close()
fvu = unexplained()
assert fvu < 0.5, fvu
print("trained", fvu)
"""


def test_saelens_trains_on_the_provider(tiny, environment):
    assert run(environment(TRAINERS), SAELENS, tiny[0].url, SITES[0]).startswith("trained")


DICTIONARY_LEARNING = """
import json, sys
import torch
import actcache
from actcache.torch_data import ActivationProvider
from dictionary_learning.training import trainSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
url, site, out = sys.argv[1:]
ds = actcache.open(url)
buffer = ActivationProvider(ds, site, batch_size=256, lanes=8)
trainer = {"trainer": TopKTrainer, "dict_class": AutoEncoderTopK, "activation_dim": ds.d_in(site), "dict_size": 64,
    "k": 8, "layer": 1, "lm_name": "tiny", "device": "cpu", "steps": 200, "warmup_steps": 10, "seed": 0,
    "decay_start": None, "lr": 3e-3}
trainSAE(data=buffer, trainer_configs=[trainer], steps=200, save_dir=out, use_wandb=False, device="cpu",
    normalize_activations=True, autocast_dtype=torch.float32)
buffer.close()
config = json.load(open(out + "/trainer_0/config.json"))
assert config["buffer"]["site"] == site
print("trained")
"""


def test_dictionary_learning_trains_on_the_provider(tiny, environment, tmp_path):
    python = environment(TRAINERS)
    assert run(python, DICTIONARY_LEARNING, tiny[0].url, SITES[0], tmp_path / "out") == "trained"
