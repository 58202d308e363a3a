"""Repeating requests that met a transient fault: backoff, full jitter and a deadline, then one clear error.

The only place that repeats a request, so that bounds add up: the clients' own retries are turned off
unless the user asks for them (`store.open_store`). What a repeated write may meet is `store.py`'s matter.
"""

import errno
import itertools
import logging
import random
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .errors import ActcacheError, SpecError, StoreError

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How long a request is repeated."""

    deadline_s: float = 60.0
    """No attempt begins later than this after the first did. An attempt has time limits of its own."""
    first_delay_s: float = 0.1
    """Longest wait before the second attempt; it doubles from attempt to attempt."""
    longest_delay_s: float = 8.0
    """Longest wait of all."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise SpecError(f"{field.name} of a retry is {value!r}; wanted seconds, 0 or more")


class Transient(OSError):
    """A fault that the client did not notice, such as a short body: the request is repeated."""


def with_retries(work: Callable[[], T], retry: Retry, where: str) -> T:
    """`work()`, again after transient faults.

    Waits are uniform between 0 and a bound that doubles: clients that failed together do not return
    together (Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog).

    Raises:
        StoreError: a permanent fault at once, a transient one when the deadline is over; names `where`.
        FileNotFoundError: of `work`, as it is, unless a bucket is what is missing.
    """
    begun = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return work()
        except ActcacheError:
            raise
        except client_errors() as err:
            if isinstance(err, FileNotFoundError) and error_code(err) != "NoSuchBucket":
                raise
            if not is_transient(err):
                raise StoreError(f"{where}: {reason(err)}. {_remedy(err)}") from err
            bound = min(retry.longest_delay_s, retry.first_delay_s * 2.0 ** min(attempt - 1, 60))
            delay = random.uniform(0, bound)
            passed = time.monotonic() - begun
            if passed + delay > retry.deadline_s:
                tries = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                raise StoreError(
                    f"{where}: gave up after {tries} in {passed:.1f} s, the last of which met: {reason(err)}. "
                    "Check that the store can be reached; what was committed stays, so run again"
                ) from err
            log.debug("%s: %s; attempt %d follows in %.2f s", where, reason(err), attempt + 1, delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def client_errors() -> tuple[type[Exception], ...]:
    """What fsspec's file systems raise: OSError, and botocore's and aiohttp's own once s3fs is in use.

    aiohttp's are not botocore's: a body that is cut off passes through aiobotocore untranslated.
    """
    return (OSError, *_clients_own())


def is_transient(err: BaseException) -> bool:
    """Whether the same request may work in a moment."""
    unresolved = _resolver_error(err)
    if unresolved is not None:
        return unresolved.errno == socket.EAI_AGAIN  # else the name does not exist: a typo
    status = http_status(err)
    if status is not None:
        return (
            (status >= 500 and status != 501) or status in (408, 409, 425, 429) or error_code(err) in _CODES
        )
    if isinstance(err, Transient | ConnectionError | TimeoutError):
        return True
    if isinstance(err, OSError) and not isinstance(err, _clients_own()):
        return err.errno in _ERRNOS
    if isinstance(err, _classes("botocore.exceptions", "SSLError", "InvalidProxiesConfigError")):
        return False
    return isinstance(
        err,
        _classes("botocore.exceptions", "HTTPClientError", "ConnectionError", "IncompleteReadError")
        + _classes("botocore.exceptions", "FlexibleChecksumError")
        + _classes("botocore.parsers", "ResponseParserError")
        + _classes("aiohttp", "ClientError"),
    )


def _clients_own() -> tuple[type[Exception], ...]:
    return (
        _classes("botocore.exceptions", "BotoCoreError", "ClientError")
        + _classes("botocore.parsers", "ResponseParserError")
        + _classes("aiohttp", "ClientError")
    )


def _classes(module: str, *names: str) -> tuple[type[Exception], ...]:
    """Exception classes of a module, none if nobody has imported it."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded else ()


def http_status(err: BaseException) -> int | None:
    """Status of the reply that an error stands for; None if it was no reply."""
    status = _reply(err).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def error_code(err: BaseException) -> str:
    """S3's name for what is wrong, such as NoSuchBucket; empty if it was no reply of S3's."""
    return str(_reply(err).get("Error", {}).get("Code", ""))


def reason(err: BaseException) -> str:
    """The fault in one line."""
    text = getattr(err, "strerror", None) or str(err) or type(err).__name__
    status = http_status(err)
    code = error_code(err)
    named = f" (HTTP {status}{f', {code}' if not code.isdigit() and code else ''})" if status else ""
    return " ".join(str(text).split()).rstrip(".") + named


_CODES = frozenset(
    (
        "RequestTimeout",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    )
)
"""Codes of HTTP 400 that speak of a body damaged or cut off on the way."""
_ERRNOS = frozenset(
    (errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH)
)
_CREDENTIALS = (
    "Check the access key, secret and token (storage_options, or the environment) and what they may do there"
)
_REMEDIES = {
    "NoSuchBucket": "Create the bucket, or correct the URL",
    "NoCredentialsError": "Give key and secret in storage_options, or set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY; a public bucket wants anon=true",
    "EndpointConnectionError": "Check endpoint_url in storage_options",
}


def _remedy(err: BaseException) -> str:
    if isinstance(err, PermissionError) and http_status(err):
        return _CREDENTIALS
    return _REMEDIES.get(
        error_code(err) or type(err).__name__, "Check the URL, permissions and the space left"
    )


def _reply(err: BaseException) -> dict[str, Any]:
    """The parsed reply of a botocore ClientError, which s3fs turns into an OSError caused by it."""
    for candidate in (err, err.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _resolver_error(err: BaseException) -> socket.gaierror | None:
    """What looking up the host's name met, if that is what an error comes from."""
    seen: BaseException | None = err
    while seen is not None and not isinstance(seen, socket.gaierror):
        seen = seen.__cause__ or seen.__context__
    return seen
