"""What is repeated, how often, and how it ends."""

import errno
import logging
import socket

import botocore.exceptions
import pytest

from actcache.errors import SpecError, StoreError
from actcache.retry import Retry, Transient, is_transient, with_retries
from actcache.store import open_store

NO_WAIT = Retry(deadline_s=10, first_delay_s=0)


def reply(status, code):
    """The error that s3fs raises for a reply: an OSError caused by botocore's."""
    cause = botocore.exceptions.ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )
    err = OSError(errno.EINVAL, code)
    err.__cause__ = cause
    return err


def failing(*faults):
    """Work that meets each fault once and then returns how often it was called."""
    left = list(faults)

    def work():
        if left:
            raise left.pop(0)
        return len(faults) + 1

    return work


TRANSIENT = [
    reply(503, "SlowDown"),
    reply(500, "InternalError"),
    reply(409, "ConditionalRequestConflict"),
    reply(429, "TooManyRequests"),
    reply(400, "RequestTimeout"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    Transient("3 bytes came of 4"),
    OSError(errno.EBUSY, "busy"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://127.0.0.1:1"),
    socket.gaierror(socket.EAI_AGAIN, "the resolver did not answer"),
]
PERMANENT = [
    reply(403, "AccessDenied"),
    reply(404, "NoSuchBucket"),
    reply(400, "InvalidArgument"),
    reply(501, "NotImplemented"),
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.ENOSPC, "No space left on device"),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.SSLError(endpoint_url="https://127.0.0.1:1", error="certificate"),
    socket.gaierror(socket.EAI_NONAME, "no such host"),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
def test_transient_faults_are_repeated_until_the_work_is_done(fault):
    assert is_transient(fault)
    assert with_retries(failing(fault, fault, fault), NO_WAIT, "s3://b/k") == 4


@pytest.mark.parametrize("fault", PERMANENT, ids=repr)
def test_permanent_faults_end_at_the_first_attempt_in_one_line_that_names_the_key(fault):
    with pytest.raises(StoreError) as failed:
        with_retries(failing(fault), NO_WAIT, "s3://b/k")
    assert str(failed.value).startswith("s3://b/k: ")
    assert "\n" not in str(failed.value)
    assert failed.value.__cause__ is fault


def test_a_missing_object_is_not_a_fault_but_a_missing_bucket_is():
    with pytest.raises(FileNotFoundError, match="gone"):
        with_retries(failing(FileNotFoundError("gone")), NO_WAIT, "s3://b/k")
    missing = FileNotFoundError("no bucket")
    missing.__cause__ = reply(404, "NoSuchBucket").__cause__
    with pytest.raises(StoreError, match="Create the bucket"):
        with_retries(failing(missing), NO_WAIT, "s3://b/k")


def test_the_deadline_ends_it_with_key_attempts_and_last_cause():
    def work():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    retry = Retry(deadline_s=0.1, first_delay_s=0.01, longest_delay_s=0.02)
    with pytest.raises(StoreError, match=r"s3://b/k: gave up after \d+ attempts in .* reset by peer"):
        with_retries(work, retry, "s3://b/k")
    with pytest.raises(StoreError, match="gave up after 1 attempt in"):
        with_retries(work, Retry(deadline_s=0, first_delay_s=1e9, longest_delay_s=1e9), "s3://b/k")


def test_waits_are_random_below_a_bound_that_doubles(monkeypatch):
    waits, bounds = [], []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("random.uniform", lambda low, high: bounds.append((low, high)) or high)
    retry = Retry(deadline_s=1e9, first_delay_s=0.5, longest_delay_s=3)
    with_retries(failing(*[TimeoutError()] * 5), retry, "s3://b/k")
    assert bounds == [(0, 0.5), (0, 1), (0, 2), (0, 3), (0, 3)]
    assert waits == [0.5, 1, 2, 3, 3]


def test_each_repetition_is_logged_for_those_who_ask(caplog):
    with caplog.at_level(logging.DEBUG, "actcache.retry"):
        with_retries(failing(TimeoutError("slow")), NO_WAIT, "s3://b/k")
    assert "s3://b/k: slow; attempt 2 follows" in caplog.text


def test_the_storage_option_sets_the_deadline_and_a_typo_names_the_fields(tmp_path):
    store = open_store("memory://x", {"actcache_retry": {"deadline_s": 3}})
    assert store._retry == store.sub("y")._retry == Retry(deadline_s=3)
    with pytest.raises(SpecError, match="wanted a mapping of deadline_s, first_delay_s, longest_delay_s"):
        open_store(str(tmp_path), {"actcache_retry": {"deadlines": 3}})
    with pytest.raises(SpecError, match="wanted seconds, 0 or more"):
        open_store(str(tmp_path), {"actcache_retry": {"deadline_s": "3"}})
