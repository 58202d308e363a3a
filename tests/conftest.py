"""Settings for every test: one thread per test process, no network, no telemetry."""

import os
import signal

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job; what it starts would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)


@pytest.fixture(scope="session")
def ray_session():
    """One small local Ray for all the tests that need one."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def s3():
    """storage_options of an S3 server that honours conditional writes, with an empty bucket "bucket"."""
    import s3_servers

    with s3_servers.ministack() as options:
        s3_servers.make_bucket(options, "bucket")
        yield options


@pytest.fixture(scope="session")
def signed_s3(tmp_path_factory):
    """storage_options of an S3 server that refuses a wrong secret, with an empty bucket "bucket"."""
    import s3_servers

    directory = tmp_path_factory.mktemp("rclone")
    (directory / "bucket").mkdir()
    with s3_servers.rclone(directory) as options:
        yield options


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """Tiny models are several times slower on two threads than on one."""
    import torch

    torch.set_num_threads(1)
