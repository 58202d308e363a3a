"""Runs a function on several gloo ranks, processes of this machine, and gives what each returned."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_context = multiprocessing.get_context(
    "forkserver"
)  # imports torch once, then each rank starts in milliseconds
_context.set_forkserver_preload(["torch", "torch.distributed", "sae.train"])
_TIMEOUT_S = 120.0


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank; raises AssertionError with the traceback of one that raised.

    The function is one of a module, and its arguments and results pickle.
    """
    found = []
    for rank, (value, error, _) in enumerate(ends_of(world, function, *args)):
        assert error is None, f"rank {rank} of {world}: {error}"
        found.append(value)
    return found


def ends_of(world: int, function: Callable[..., Any], *args: Any) -> list[tuple[Any, str | None, int]]:
    """(what it returned, its traceback, exit code) of each rank; a rank that was killed has the code of the signal."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(theirs, f"{folder}/store", rank, world, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found = []
        try:
            for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
                assert pipe.poll(_TIMEOUT_S), f"rank {rank} of {world} has not ended"
                try:
                    value, error = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    value, error = None, "it died"
                process.join(_TIMEOUT_S)
                found.append((value, error, process.exitcode))
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
        return found


def _rank(
    pipe: Any, store: str, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),
            )
        _send(pipe, function(*args), None)
        if world > 1:
            dist.barrier()  # nobody leaves while another still reads
            dist.destroy_process_group()
    except BaseException:
        _send(pipe, None, traceback.format_exc())
        raise SystemExit(1) from None


def _send(pipe: Any, value: Any, error: str | None) -> None:
    """As plain bytes: multiprocessing would send tensors by handles that end with this process."""
    pipe.send_bytes(pickle.dumps((value, error)))
