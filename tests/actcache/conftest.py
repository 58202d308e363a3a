"""A tiny dataset that the reading tests share; they must not write to it."""

import pytest
from tiny_harvest import tiny_spec

import actcache


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(dataset, spec, root) of a finished local harvest: 3 train blocks, 2 sites, fvu:1e-3."""
    directory = tmp_path_factory.mktemp("tiny")
    spec = tiny_spec(directory)
    root = str(directory / "root")
    return actcache.harvest(spec, root, progress=False), spec, root
