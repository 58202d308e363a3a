"""Streams for torch's loaders and for the trainers of other projects.

Needs torch. `Dataset.stream` reads ahead in threads by itself, so none of this is needed for speed.
Shapes: B rows of a batch, D = d_in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .reader import Dataset
from .stream import Batch, Stream

_ENDLESS = 2**31


class TorchStream(IterableDataset[dict[str, torch.Tensor]]):
    """`Dataset.stream` for a `DataLoader(TorchStream(...), batch_size=None)`: dicts of tensors.

    Keys are the sites, then token_id, sequence and position (int64). With `num_workers` = W each worker
    serves its share of global batches of W times `batch_size` rows, so that batches of the loader keep
    their size: exactly where W times `world_size` divides `lanes`, else to about one lane's part. It may be
    any number up to `lanes`. Start workers by spawn (`multiprocessing_context="spawn"`): a forked one raises
    ForkedProcess.

    `state_dict` and `load_state_dict` are what torchdata's `StatefulDataLoader` calls; it wants the same
    number of workers back.
    """

    def __init__(
        self,
        dataset: Dataset,
        sites: Sequence[str] | str | None = None,
        *,
        batch_size: int = 4096,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        """Other `options` go to `Dataset.stream`."""
        self.dataset, self.sites, self.batch_size = dataset, sites, batch_size
        self.rank, self.world_size = rank, world_size
        self.options: dict[str, Any] = {"device": "cpu", **options}
        self._stream: Stream | None = None
        self._resume: dict[str, Any] | None = self.options.pop("state", None)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        n_workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        state, self._resume = self._resume, None
        self._stream = self.dataset.stream(
            self.sites,
            batch_size=self.batch_size * n_workers,
            rank=self.rank * n_workers + worker,
            world_size=self.world_size * n_workers,
            state=state,
            **self.options,
        )
        for batch in self._stream:
            yield _tensors(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the current iteration stands, as JSON; empty before the first."""
        if self._resume is not None or self._stream is None:
            return dict(self._resume or {})
        return self._stream.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration begins there."""
        self._resume = dict(state) or None


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    out: dict[str, Any] = dict(batch.acts)
    if batch._rows is not None:
        out |= {name: getattr(batch, name) for name in ("token_id", "sequence", "position")}
    return out


class ActivationProvider:
    """An iterator of tensors [B, D] of one site, without end: each epoch in another order.

    It is the `data_provider` of SAELens' `SAETrainer`, and the `data` of dictionary_learning's
    `trainSAE`. `state()` is that of the stream; give it back as `state=`.
    """

    def __init__(
        self,
        dataset: Dataset,
        site: str,
        *,
        batch_size: int = 4096,
        device: str = "cpu",
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Other `options` go to `Dataset.stream`."""
        self.site, self.d_submodule = site, dataset.d_in(site)
        self.out_batch_size, self.device, self.url = batch_size, device, dataset.url
        self.stream = dataset.stream(
            site,
            batch_size=batch_size,
            device=device,
            state=state,
            **{"epochs": _ENDLESS, "metadata": False, **options},
        )
        self._iterator: Iterator[Batch] | None = None

    def __iter__(self) -> "ActivationProvider":
        return self

    def __next__(self) -> torch.Tensor:
        if self._iterator is None:
            self._iterator = iter(self.stream)
        batch: Any = next(self._iterator)[self.site]
        return batch

    def next_batch(self) -> torch.Tensor:
        """As `next`; SAELens' name for it."""
        return next(self)

    def state(self) -> dict[str, Any]:
        """Where the next batch starts; JSON-able."""
        return self.stream.state()

    @property
    def config(self) -> dict[str, Any]:
        """What dictionary_learning writes beside the SAE."""
        return {
            "d_submodule": self.d_submodule,
            "out_batch_size": self.out_batch_size,
            "device": self.device,
            "dataset": self.url,
            "site": self.site,
        }

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._iterator is not None:
            self._iterator.close()  # type: ignore[attr-defined]  # a generator
            self._iterator = None
