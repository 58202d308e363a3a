"""A harvest of many sites of the bundled LM by Ray actors to an S3 server, checked to the last byte and by the LM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import actcache
from actcache.store import open_store

pytestmark = pytest.mark.slow
SITES = [f"blocks.{n}.hook_resid_post" for n in range(6)] + [
    "blocks.3.ln2.hook_normalized",
    "blocks.3.hook_mlp_out",
]


def run(*arguments, s3):
    options = [f"--storage-option={name}={value}" for name, value in _flat(s3)]
    command = [sys.executable, "-W", "ignore", "-m", "actcache", *arguments, *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


def _flat(options):
    for name, value in options.items():
        yield name, value if isinstance(value, str) else json.dumps(value)


def test_every_resid_post_and_one_layers_mlp_in_one_pass(s3):
    harvest = run(
        "harvest", "--root", "s3://bucket/many", "--site", "blocks.*.hook_resid_post",
        "--site", "blocks.3.{ln2.hook_normalized,hook_mlp_out}", "--tokens", "131072", "--block-rows", "32768",
        "--max-tokens", "400000", "--workers", "2", "--json", s3=s3,
    )  # fmt: skip
    described = json.loads(harvest.stdout)
    dataset = actcache.open(described["url"], storage_options=s3)
    assert sorted(dataset.sites) == sorted(SITES)
    assert dataset.n_rows == 131_072
    assert dataset.manifest.provenance["set_aside"] == []
    for site in SITES:
        assert dataset.stats(site)["fvu_core"] <= 1e-3
    verified = run("verify", dataset.url, "--deep", "--replay", "64", "--json", s3=s3)
    found = json.loads(verified.stdout)
    print(found)
    assert found["problems"] == []
    assert found["checked"]["rows replayed"] == 64
    assert found["checked"]["rows beyond the stated error"] == 0
    assert found["checked"]["unreferenced objects"] == 0
    assert not open_store("s3://bucket/many", s3).listing("_harvests")
