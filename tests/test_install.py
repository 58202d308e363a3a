"""What other projects get: the base install reads without torch or Ray, and plain zarr needs none of us."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from venvs import copy_source, make_venv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "actcache"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """A tiny dataset, and the same rows by an unbatched forward pass of the plain HF model, saved as .npy."""
    import torch
    from tiny_harvest import SITES, tiny_spec
    from transformers import AutoModelForCausalLM

    import actcache

    directory = tmp_path_factory.mktemp("install")
    spec = tiny_spec(directory)
    dataset = actcache.harvest(spec, str(directory / "root"), progress=False)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).eval()
    hidden = []
    with torch.inference_mode():
        for sequence in range(dataset.n_sequences):
            input_ids = torch.from_numpy(dataset.context(sequence).astype(np.int64))[None]
            states = model(input_ids, output_hidden_states=True).hidden_states[2][0].numpy()
            hidden.append(np.pad(states, ((0, spec.context_size - len(states)), (0, 0))))
    np.save(directory / "direct.npy", np.stack(hidden))
    return dataset, SITES[0], directory / "direct.npy"


PLAIN_ZARR = """
import importlib.util, sys
import numpy as np, zarr
assert importlib.util.find_spec("actcache") is None
url, site, direct = sys.argv[1:]
train = zarr.open_group(url, mode="r")["train"]
g = train[site]
acts = g["codes"][:] * g["scale"][:][:, None] * g["channel"][:] + g["offset"][:]
expected = np.load(direct)[train["sequence"][:], train["position"][:]]
print(len(acts), ((acts - expected) ** 2).sum() / ((expected - expected.mean(0)) ** 2).sum())
"""


def test_plain_zarr_without_actcache_gives_the_forward_pass(harvested, tmp_path):
    dataset, site, direct = harvested
    python = make_venv(tmp_path / "venv", "zarr")
    command = [python, "-W", "error", "-c", PLAIN_ZARR, dataset.url, site, direct]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    n_rows, fvu = out.split()
    assert int(n_rows) == dataset.n_rows
    assert 1e-4 < float(fvu) <= 1e-3


BASE_READER = """
import importlib.util, sys
for absent in ("torch", "ray", "transformers"):
    assert importlib.util.find_spec(absent) is None, absent
import actcache
ds = actcache.open(sys.argv[1])
rows = sum(len(batch) for batch in ds.stream(sys.argv[2], batch_size=100))
print(rows, ds.read(sys.argv[2], [0]).shape[1], len(ds.context(0)))
"""


@pytest.fixture(scope="module")
def base_python(tmp_path_factory):
    """The python of an environment that holds only the base install."""
    directory = tmp_path_factory.mktemp("base")
    source = copy_source(directory / "source")
    return make_venv(directory / "venv", str(source))


def test_readme_block_reads_from_s3_in_the_base_install(harvested, base_python, s3, tmp_path):
    """README's "Read from another project", as it stands but for the URL, the credentials and the site."""
    from tiny_harvest import tiny_spec

    import actcache

    _, site, _ = harvested
    spec = tiny_spec(tmp_path, n_tokens=1024)
    dataset = actcache.harvest(spec, "s3://bucket/readme", storage_options=s3, progress=False)
    section = (ROOT / "README.md").read_text().split("## Read from another project")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    opened = 'actcache.open("data/NAME")'
    assert opened in code
    code = code.replace(opened, f"actcache.open({dataset.url!r}, storage_options={s3!r})")
    code = code.replace("blocks.3.hook_resid_post", site)
    absent = "import importlib.util\n" + "".join(
        f"assert importlib.util.find_spec({name!r}) is None\n" for name in ("torch", "ray", "transformers")
    )
    shown = f"print(ds.read({site!r}, [5, 17, 1_000]).sum(), acts.shape[1], int(row.sequence[0]))\n"
    command = [base_python, "-W", "error", "-c", absent + code + shown]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    total, width, sequence = done.stdout.split()
    assert float(total) == pytest.approx(float(dataset.read(site, [5, 17, 1_000]).sum()), rel=1e-6)
    assert (int(width), int(sequence)) == (32, int(dataset.rows([17]).sequence[0]))


def test_base_install_reads_without_torch_or_ray(harvested, base_python, tmp_path):
    dataset, site, _ = harvested
    python = base_python
    command = [python, "-W", "error", "-c", BASE_READER, dataset.url, site]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert out.split() == [str(dataset.n_rows), "32", "16"]
    info = subprocess.run(
        [python, "-m", "actcache", "info", dataset.url],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "FVU core" in info.stdout
    failed = subprocess.run(
        [python, "-m", "actcache", "harvest", "--root", "x"], capture_output=True, text=True, cwd=tmp_path
    )
    assert failed.returncode != 0
    assert "pip install" in failed.stderr.splitlines()[-1]
