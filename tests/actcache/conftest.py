"""What tests share and must not write to: a tiny dataset, and recorded forward passes."""

import pytest
from replayed import Recorded
from tiny_harvest import tiny_spec

import actcache


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(dataset, spec, root) of a finished local harvest: 3 train blocks, 2 sites, fvu:1e-3."""
    directory = tmp_path_factory.mktemp("tiny")
    spec = tiny_spec(directory)
    root = str(directory / "root")
    return actcache.harvest(spec, root, progress=False), spec, root


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Forward passes of the same Spec, for harvests that replay them into stores of their own."""
    return Recorded(tmp_path_factory.mktemp("recorded"))
