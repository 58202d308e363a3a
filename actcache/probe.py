"""Whether this machine and the store can do the work: `actcache check` tries what a harvest needs, before it is begun.

Each harvest tries the conditions of the store itself (`require_conditions`). Each check of `run_checks` tries the real thing: objects are created under the root's `_checks/` and removed again. A check that
fails says what was found and what helps; none of those raises.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import ActcacheError, StoreError
from .lease import FOLDER
from .progress import format_bytes
from .store import Store, open_store

MOST_SKEW_S = 60.0
"""Signed requests to S3 are refused at 900 s; leases and `gc` judge ages of about a minute."""
_LEAST_FREE_BYTES = 2**30

_OTHER_STORE = (
    "use a store that honours If-None-Match and If-Match (S3, R2, a current MinIO; GCS by gs://, not through its S3 "
    "interface), or a local disk and then hub.push: two writers could overwrite each other's blocks here"
)
Check = dict[str, Any]


def run_checks(
    root: str,
    *,
    model: str | None = None,
    revision: str | None = None,
    gpus: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Every check as {"check", "ok", "found", "fix"}; `fix` is empty where `ok`.

    Args:
        root: where datasets would be written.
        model: whose config and tokenizer must be in reach, and where weights are looked for; None: not checked.
        revision: of the model.
        gpus: GPUs that must be here.
        storage_options: for fsspec.
    """
    versions = [f"{name} {_version(name)}" for name in ("actcache", "ray", "torch", "transformers")]
    found = [_check("versions", True, ", ".join([f"python {platform.python_version()}", *versions]))]
    found += _store_checks(root, storage_options)
    found.append(_gpus(gpus))
    if model is not None:
        found.append(_model(model, revision))
    return found


def require_conditions(root: Store) -> None:
    """Try on a small object, which is removed again, that no writer can overwrite another's; some seven requests.

    Raises:
        StoreError: says what the store lacks, and which do not.
    """
    key, content = f"{FOLDER}/{uuid.uuid4().hex}.probe", b"whether this store keeps conditions"
    root.create(key, content)
    try:
        ignored = root.ignored_condition(key, content)
    finally:
        root.delete(key)
    if ignored:
        raise StoreError(f"{root.url} {ignored}. Nothing was written; {_OTHER_STORE}")


def _check(name: str, ok: bool, found: str, fix: str = "") -> Check:
    return {"check": name, "ok": ok, "found": " ".join(found.split()), "fix": "" if ok else fix}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _store_checks(root: str, storage_options: Mapping[str, Any] | None) -> Iterator[Check]:
    """Put, conditional put, ranged get, clock and delete, on a small object of our own."""
    try:
        store = open_store(root, storage_options).sub("_checks")
    except ActcacheError as err:
        yield _check("store", False, str(err), "correct root, or give --storage-option endpoint_url=...")
        return
    key = f"{uuid.uuid4().hex}.bin"
    allow = "allow {} on the prefix to this machine's role or key, and check AWS_ENDPOINT_URL and the region"
    begun = time.time()
    done = _tried("put", lambda: _put(store, key), allow.format("s3:PutObject"))
    yield done
    if not done["ok"]:
        return
    yield _tried("ranged get", lambda: _read_range(store, key), allow.format("s3:GetObject"))
    yield _tried(
        "conditional put",
        lambda: _put_again(store, key),
        _OTHER_STORE,
    )
    yield _tried(
        "list and clock",
        lambda: _clock(store, key, begun),
        "let NTP set this machine's clock (chronyc makestep), and allow s3:ListBucket",
    )
    yield _tried("delete", lambda: _delete(store, key), allow.format("s3:DeleteObject"))


def _tried(name: str, attempt: Callable[[], str], fix: str) -> Check:
    try:
        return _check(name, True, attempt())
    except (ActcacheError, OSError, _Unmet) as err:
        return _check(name, False, str(err) or type(err).__name__, fix)


class _Unmet(Exception):
    """The operation went through and did something else."""


def _put(store: Store, key: str) -> str:
    begun = time.perf_counter()
    store.create(key, b"0123456789")
    return f"{store.url}, in {1000 * (time.perf_counter() - begun):.0f} ms"


def _put_again(store: Store, key: str) -> str:
    if store.swap(key, None, b"another") or store.read(key) != b"0123456789":
        raise _Unmet("an object was overwritten although it had to be absent")
    if ignored := store.ignored_condition(key, b"0123456789"):
        raise _Unmet(f"the store {ignored}")
    return "refused where an object is, as it must be"


def _read_range(store: Store, key: str) -> str:
    whole, part = bytes(store.read(key)), bytes(store.read(key, 3, 6))
    if part != whole[3:6]:
        raise _Unmet(f"bytes 3 to 6 of {whole!r} came as {part!r}")
    return f"3 of {len(whole)} bytes"


def _clock(store: Store, key: str, begun: float) -> str:
    listed = [o for o in store.listing("") if o.key == key]
    if not listed:
        raise _Unmet("an object that was just written is not in the listing")
    skew = max(begun - listed[0].modified_s, listed[0].modified_s - time.time(), 0.0)
    if skew > MOST_SKEW_S:
        raise _Unmet(f"this machine's clock and the store's are {skew:.0f} s apart")
    return f"clocks at most {skew + 1:.0f} s apart"


def _delete(store: Store, key: str) -> str:
    store.delete(key)
    if store.exists(key):
        raise _Unmet("an object that was deleted is still there")
    return "done"


def _gpus(wanted: int) -> Check:
    """By nvidia-smi: no CUDA context is made."""
    program = shutil.which("nvidia-smi")
    lines: list[str] = []
    if program:
        query = [program, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
        lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    free = [float(line.rpartition(",")[2]) * 2**20 for line in lines]
    shown = "; ".join(
        f"{line.partition(',')[0]} {format_bytes(n)} free" for line, n in zip(lines, free, strict=True)
    )
    found = shown or "none"
    if len(lines) < wanted:
        fix = (
            "ask for a node with that many GPUs, or lower gpus in [workers]; in a container, check --gpus all"
        )
        return _check("GPUs", False, f"{len(lines)} of {wanted} wanted: {found}", fix)
    full = sum(n < _LEAST_FREE_BYTES for n in free)
    if wanted and len(free) - full < wanted:
        return _check("GPUs", False, found, "end the processes that nvidia-smi lists, or take another node")
    return _check("GPUs", True, found)


def _model(model: str, revision: str | None) -> Check:
    from . import lm

    fix = "export HF_TOKEN here, and name its file in env_files of a run (a gated model: accept its terms), or put the weights in the image's HF_HOME"
    try:
        lm.lm_config(model, revision)
        lm.load_tokenizer(model, revision)
        weights = _weights_here(model, revision)
    except (ActcacheError, OSError) as err:
        return _check("model", False, f"{model}: {err}", fix)
    if not weights and os.environ.get("HF_HUB_OFFLINE") == "1":
        return _check("model", False, f"{model}: no weights here, and HF_HUB_OFFLINE=1", fix)
    return _check(
        "model", True, f"{model}: {'weights are here' if weights else 'weights will be downloaded'}"
    )


def _weights_here(model: str, revision: str | None) -> bool:
    """Whether loading the model needs no download."""
    from .lm import resolve_model

    directory, _, commit = resolve_model(model, revision)
    if os.path.isdir(directory):
        return any(name.endswith((".safetensors", ".bin")) for name in os.listdir(directory))
    from huggingface_hub import try_to_load_from_cache

    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return any(isinstance(try_to_load_from_cache(model, name, revision=commit), str) for name in names)
