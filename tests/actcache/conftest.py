"""What tests share and must not write to: a tiny dataset, and recorded forward passes."""

from pathlib import Path

import pytest
from replayed import Recorded
from tiny_harvest import SITES, tiny_spec, write_corpus

import actcache
from actcache.spec import Corpus


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(dataset, spec, root) of a finished local harvest: 3 train blocks, 2 sites, fvu:1e-3."""
    directory = tmp_path_factory.mktemp("tiny")
    spec = tiny_spec(directory)
    root = str(directory / "root")
    return actcache.harvest(spec, root, progress=False), spec, root


@pytest.fixture(scope="session")
def directory(tiny):
    """Where the dataset of `tiny` lies."""
    return Path(tiny[0].url)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another corpus than that of `tiny`, the same model."""
    directory = tmp_path_factory.mktemp("other")
    corpus = Corpus(write_corpus(directory / "corpus", seed=5), validation_share=0.1, test_share=0.1)
    return actcache.harvest(
        tiny_spec(directory, corpus=corpus, n_tokens=1500), directory / "root", progress=False
    )


@pytest.fixture(scope="session")
def aligned(tiny, tmp_path_factory):
    """Another model on the tokens of `tiny`, in larger chunks and with fewer blocks."""
    _, spec, root = tiny
    directory = tmp_path_factory.mktemp("aligned")
    other = tiny_spec(
        directory,
        "llama",
        corpus=spec.corpus,
        n_tokens=1500,
        chunk_rows=256,
        precision="bf16",
        sites=[SITES[0]],
    )
    return actcache.harvest(other, root, progress=False)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Forward passes of the same Spec, for harvests that replay them into stores of their own."""
    return Recorded(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="session", params=["bf16", "fp16", "fp32"])
def lossless(request, tmp_path_factory):
    """A small finished dataset of each lossless precision."""
    spec = tiny_spec(
        tmp_path_factory.mktemp(request.param), n_tokens=1500, test_blocks=0, precision=request.param
    )
    return actcache.harvest(spec, str(tmp_path_factory.mktemp("root")), progress=False)


@pytest.fixture(scope="session")
def rotated(tmp_path_factory):
    """A small finished dataset of rotated codes."""
    spec = tiny_spec(
        tmp_path_factory.mktemp("rotated"), n_tokens=1500, test_blocks=0, precision="rotated:1e-3"
    )
    return actcache.harvest(spec, str(tmp_path_factory.mktemp("root")), progress=False)
