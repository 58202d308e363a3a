"""S3 through s3fs: one request for each read or write, conditions on writes, no body that is cut short.

Owns what differs on S3 from other fsspec file systems; `store.py` says what a store promises.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import fsspec

from .errors import StoreError
from .retry import Retry, Transient, error_code, http_status, reason
from .store import ABSENT, ObjectStore

T = TypeVar("T")

_CONDITIONS = (
    ("PutObject", "IfNoneMatch"),
    ("PutObject", "IfMatch"),
    ("CompleteMultipartUpload", "IfNoneMatch"),
)
_SLOWEST_BYTES_PER_S = 100_000.0
"""A request that moves its bytes more slowly than this is cut off as stalled, and repeated."""


class S3Store(ObjectStore):
    """S3 through s3fs, one request for each read or write (multipart from 100 MB).

    s3fs's own reads are not used: they ask for the size first, and a body that ends early comes back short
    or as an error that s3fs does not know.
    """

    concurrent_reads = 8  # each of several parts

    def __init__(self, url: str, storage_options: dict[str, Any], retry: Retry | None = None) -> None:
        options = {
            **storage_options,
            "config_kwargs": _client_config() | dict(storage_options.get("config_kwargs") or {}),
        }
        super().__init__(url, options, retry)
        self._fs.retries = 1  # s3fs's own loop around every request; the instance is ours by config_kwargs
        self._connected = self._keeps_conditions = False
        timeouts = options["config_kwargs"]
        # twice what each step may take: only a peer that stays just below those limits gets here
        self._attempt_s = 2.0 * sum(
            timeouts.get(name) or getattr(self._fs, name) for name in ("connect_timeout", "read_timeout")
        )

    def _repeated(self, work: Callable[[], T], key: str) -> T:
        def connected() -> T:
            if not self._connected:
                try:
                    self._fs.connect()
                except (ValueError, TypeError, KeyError) as err:
                    raise StoreError(f"cannot open {self.url}: {reason(err)}. Check storage_options") from err
                self._connected = True
            return work()

        return super()._repeated(connected, key)

    def _get(self, path: str, start: int, stop: int | None) -> tuple[bytes, str | None]:
        if stop is not None and stop <= start:
            return b"", None
        try:
            return self._request(lambda limit: self._reply(path, start, stop, limit), 0)
        except OSError as err:
            if (start or stop is not None) and http_status(err) == 416:  # the object ends before `start`
                return b"", None
            raise

    async def _reply(
        self, path: str, start: int, stop: int | None, limit: asyncio.Timeout
    ) -> tuple[bytes, str | None]:
        """One whole reply to a GET."""
        whole = start == 0 and stop is None
        wanted = {} if whole else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        bucket, name, _ = self._fs.split_path(path)
        reply = await self._fs._call_s3("get_object", Bucket=bucket, Key=name, **wanted)
        length = reply.get("ContentLength")
        _extend(limit, length or 0)
        try:
            data = bytes(await reply["Body"].read())
        finally:
            reply["Body"].close()
        headers = reply["ResponseMetadata"].get("HTTPHeaders", {})
        if length is None and headers.get("transfer-encoding", "").lower() != "chunked":
            raise Transient("the reply states no length, so its end cannot be told from a cut")
        if length is not None and len(data) != length:
            raise Transient(f"{len(data)} bytes came of {length}")
        came = reply.get("ContentRange")  # rclone sends it with status 200
        if wanted and came and not came.startswith(f"bytes {start}-"):
            raise Transient(f"{came} came, wanted bytes from {start}")
        if wanted and not came and reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
            data = data[start:stop]  # a server may answer a range with the whole
        return data, reply.get("ETag")

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """By one call into s3fs's loop: its threads' hand-overs cost as much as the requests."""

        async def gathered() -> list[Any]:
            requests = (
                self._bounded(partial(self._reply, self._path(key), start, stop), 0)
                for key, start, stop in parts
            )
            return await asyncio.gather(*requests, return_exceptions=True)

        found = self._repeated(lambda: fsspec.asyn.sync(self._fs.loop, gathered), "")
        return [reply[0] if isinstance(reply, tuple) else None for reply in found]

    def ignored_condition(self, key: str, content: bytes) -> str:
        try:
            if ignored := super().ignored_condition(key, content):
                return ignored
        except StoreError as err:
            if err.__cause__ is not None and http_status(err.__cause__) == 501:
                return f"has no conditional writes ({reason(err.__cause__)})"
            raise
        path = self._path(key)
        _, etag = self._repeated(lambda: self._get(path, 0, None), key)
        if etag is None:
            return "names no content of an object (it sends no ETag)"
        if self._repeated(lambda: self._put(path, content, f'"{"0" * 32}"'), key):
            return "replaces an object that changed since it was read (it ignores If-Match)"
        if not self._repeated(lambda: self._put(path, content, etag), key):
            # equal bytes have an equal ETag, also if a reply was lost and this is the second attempt
            return "refuses to replace an object that is as it was read (If-Match)"
        return ""

    def _check_client(self) -> None:
        """Refuse to write with clients that drop the conditions of a write without a word: s3fs filters arguments.

        Raises:
            StoreError: names the versions that are too old.
        """
        if self._keeps_conditions:
            return
        service = self._fs.s3.meta.service_model
        lost = [
            f"{name} of {operation}"
            for operation, name in _CONDITIONS
            if name not in service.operation_model(operation).input_shape.members
        ]
        if "mode" not in inspect.signature(self._fs._pipe_file).parameters:
            lost.append("exclusive creation")
        if lost:
            found = ", ".join(f"{name} {version(name)}" for name in ("s3fs", "aiobotocore", "botocore"))
            raise StoreError(
                f"{found}: these know nothing of {', '.join(lost)}, so a write would replace what another writer stored. "
                "Nothing was written; pip install -U 's3fs>=2024.12' 'aiobotocore>=2.16'"
            )
        self._keeps_conditions = True

    def _put(self, path: str, data: bytes, condition: str | None) -> bool:
        if condition is not None:
            self._check_client()

        async def put(_: asyncio.Timeout) -> None:
            if condition == ABSENT:
                await self._fs._pipe_file(path, data, mode="create")
                return
            # one request whatever its size: s3fs drops If-Match from a multipart upload
            bucket, name, _ = self._fs.split_path(path)
            match = {} if condition is None else {"IfMatch": condition}
            await self._fs._call_s3("put_object", Bucket=bucket, Key=name, Body=data, **match)

        try:
            self._request(put, len(data))
        except FileExistsError:  # how s3fs calls a 412 that states its condition
            return False
        except FileNotFoundError as err:
            if condition not in (ABSENT, None) and error_code(err) == "NoSuchKey":
                return False  # If-Match of an object that is gone
            raise
        except OSError as err:
            if http_status(err) in (409, 412):  # 409: another's conditional write is under way
                return False
            raise
        return True

    def _request(self, work: Callable[[asyncio.Timeout], Awaitable[T]], size_bytes: int) -> T:
        """Run `work` in s3fs's loop, cut off when it takes longer than its bytes can."""
        result: T = fsspec.asyn.sync(self._fs.loop, self._bounded, work, size_bytes)
        return result

    async def _bounded(self, work: Callable[[asyncio.Timeout], Awaitable[T]], size_bytes: int) -> T:
        limit = asyncio.timeout(self._attempt_s)
        try:
            async with limit:
                _extend(limit, size_bytes)
                return await work(limit)
        except TimeoutError as err:
            raise Transient("the request stalled") from err


def _extend(limit: asyncio.Timeout, size_bytes: int) -> None:
    """Allow for the transfer of `size_bytes` more."""
    when = limit.when()
    assert when is not None
    limit.reschedule(when + size_bytes / _SLOWEST_BYTES_PER_S)


def _client_config() -> dict[str, Any]:
    """One attempt a request, since retries are ours; and no checksums of replies, since what we read has its own.

    A server that sends the whole object's checksum with a part of it (rclone) could not be read by range.
    """
    from botocore.config import Config

    config: dict[str, Any] = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
    if "response_checksum_validation" in Config.OPTION_DEFAULTS:  # botocore 1.36 and newer
        config["response_checksum_validation"] = "when_required"
    return config
