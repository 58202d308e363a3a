"""What harvesting costs beside the forward pass, with codec and statistics on the LM's device.

A random Llama in bf16. First the device's codec against numpy on the same activations, for each precision. Then tokens/s
of a bare forward pass that ends after the deepest site, and of passes that do ever more of a harvest:
`capture`; `encode`: and quantise and measure; `copy`: and gather blocks and copy them to the host; `store`:
and compress them in threads and create the shards. A round runs all five in turn, each over the same blocks; ratios are
within a round. Needs torch, transformers, numcodecs, google-crc32c and fsspec; neither ray nor zarr.
Shapes: B sequences, T tokens, N rows, D = d_in.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hardware import report
from transformers import LlamaConfig, LlamaForCausalLM

from actcache.capture import run_capture
from actcache.codec import Calibration, Precision, calibrate, decode, encode
from actcache.device import BlockRows, DeviceCodec, to_device
from actcache.shard import encode_shard, shard_key
from actcache.statistics import Statistics, merge
from actcache.store import LocalStore

STAGES = ("bare", "capture", "encode", "copy", "store")
PRECISIONS = ("fvu:1e-3", "rotated:1e-3", "bf16", "fp16", "fp32")
CALIBRATION_ROWS = 8192
BLOCKS_IN_FLIGHT = 2


@dataclass
class Case:
    """One LM, its batches and what is wanted of it."""

    model: LlamaForCausalLM
    body: torch.nn.Module
    """The LM up to the deepest site."""
    sites: list[str]
    batches: list[torch.Tensor]
    batches_a_block: int
    precision: Precision
    codecs: dict[str, DeviceCodec]
    pool: ThreadPoolExecutor
    directory: Path
    stored_bytes: int = 0

    def rows(self, acts_BTD: torch.Tensor) -> torch.Tensor:
        """All but the first token of each sequence."""
        return acts_BTD.flatten(0, 1).index_select(0, self.kept_N)

    def __post_init__(self) -> None:
        n_batch, n_tokens = self.batches[0].shape
        kept = np.arange(n_batch * n_tokens).reshape(n_batch, n_tokens)[:, 1:].reshape(-1)
        self.kept_N = to_device(kept, self.batches[0].device)
        n_rows = len(kept) * self.batches_a_block
        places = np.random.default_rng(0).permutation(n_rows).reshape(self.batches_a_block, -1)
        self.places = [to_device(place_N, self.batches[0].device) for place_N in places]

    def run(self, stage: str) -> float:
        """Seconds that `stage` takes over all batches."""
        self._wait()
        start = time.perf_counter()
        with torch.inference_mode():
            if stage == "bare":
                for ids_BT in self.batches:
                    self.body(ids_BT, use_cache=False)
            elif stage == "capture":
                for ids_BT in self.batches:
                    run_capture(self.model, ids_BT, self.sites)
            else:
                self._harvest(stage)
        self._wait()
        return time.perf_counter() - start

    def _harvest(self, stage: str) -> None:
        stored: deque[Future[int]] = deque()
        stored_bytes = 0
        for first in range(0, len(self.batches), self.batches_a_block):
            while len(stored) > BLOCKS_IN_FLIGHT * len(self.sites):
                stored_bytes += stored.popleft().result()
            for site, block in self._block(first, stage).items():
                if stage == "copy":
                    block.wait()
                elif stage == "store":
                    stored.append(self.pool.submit(self._store, block, site, first))
        stored_bytes += sum(future.result() for future in stored)
        if stage == "store":
            self.stored_bytes = stored_bytes

    def _block(self, first: int, stage: str) -> dict[str, BlockRows]:
        """Codes of the batches from `first`, their copy to the host queued: a batch is finished after the next one's
        forward pass has been queued."""
        n_rows = len(self.kept_N) * self.batches_a_block
        blocks, parts, pending = {}, {site: [] for site in self.sites}, None

        def finish() -> None:
            place_N, encodings = pending
            for site, encoding in encodings.items():
                parts[site].append(encoding.finish())
                if stage != "encode":
                    blocks[site].put(place_N, encoding)

        for i, place_N in enumerate(self.places):
            acts = run_capture(self.model, self.batches[first + i], self.sites)
            encodings = {site: self.codecs[site].encode(self.rows(acts[site])) for site in self.sites}
            if not blocks and stage != "encode":
                blocks = {s: BlockRows(self.codecs[s], n_rows, acts[s].shape[-1]) for s in self.sites}
            if pending is not None:
                finish()
            pending = place_N, encodings
        finish()
        for site in self.sites:
            merge(parts[site])
        for block in blocks.values():
            block.start_copy()
        return blocks

    def _store(self, block: BlockRows, site: str, first: int) -> int:
        """Create the shard of a block, and remove it again: a GPU fills disks in minutes."""
        codes_ND, _ = block.wait()
        chunk_rows = max(1, 2 ** int(np.log2(2**20 / codes_ND[0].nbytes)))
        shard_rows = -(-len(codes_ND) // chunk_rows) * chunk_rows
        data, _ = encode_shard(codes_ND, chunk_rows, shard_rows, 0, self.precision.rotated)
        key = shard_key(site, first, 2)
        LocalStore(self.directory).create(key, data)
        (self.directory / key).unlink()
        return len(data)

    def _wait(self) -> None:
        if self.batches[0].device.type == "cuda":
            torch.cuda.synchronize()


def llama(tiny: bool, device: str) -> LlamaForCausalLM:
    """Random weights in the shape of Llama 3.2 1B, or a tiny one."""
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    if tiny:
        shape = dict.fromkeys(shape, 64) | {
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
        }
    config = LlamaConfig(**shape, max_position_embeddings=8192, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()


def up_to(model: LlamaForCausalLM, deepest: int) -> torch.nn.Module:
    """The body of the LM with its blocks up to `deepest`, sharing weights."""
    config = LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": deepest + 1})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        body = type(model.model)(config)
    body.embed_tokens, body.norm, body.rotary_emb = (
        model.model.embed_tokens,
        model.model.norm,
        model.model.rotary_emb,
    )
    body.layers = model.model.layers[: deepest + 1]
    return body.eval()


def compare(acts_ND: torch.Tensor, precision: Precision, device: str, compiled: bool) -> Calibration:
    """Print how the device's codes and statistics differ from numpy's, and what each takes."""
    rows_ND = acts_ND.float().cpu().numpy()
    calibration = calibrate(rows_ND[:CALIBRATION_ROWS], precision)
    codec = DeviceCodec(calibration, precision, device, compiled)
    for _ in range(2):
        codec.encode(acts_ND).finish()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        encoding = codec.encode(acts_ND)
        queued_s = time.perf_counter() - start
        found = encoding.finish()
        times.append((time.perf_counter() - start, queued_s))
    start = time.perf_counter()
    codes_ND, scale_N = encode(rows_ND, calibration, precision)
    stored_ND = decode(codes_ND, scale_N, calibration, precision)
    theirs = Statistics.of(rows_ND, stored_ND, scale_N, calibration)
    numpy_s = time.perf_counter() - start
    codes_there_ND = encoding.codes_ND.cpu().numpy().view(precision.dtype)
    same_N = np.ones(len(rows_ND), bool)
    if scale_N is not None:
        same_N = encoding.scale_N.cpu().numpy() == scale_N
    elapsed_s, queued_s = (statistics.median(t) for t in zip(*times, strict=True))
    report(
        "gpu_harvest_codec",
        device=_device_name(device),
        compiled=compiled,
        precision=str(precision),
        rows=acts_ND.shape[0],
        d_in=acts_ND.shape[1],
        equal_codes=float((codes_there_ND == codes_ND).mean()),
        equal_scales=float(same_N.mean()),
        rescaled=(found.rows_rescaled, theirs.rows_rescaled),
        core=(found.n_core, theirs.n_core),
        off={
            "variance": float(np.abs(found.m2_D / np.maximum(theirs.m2_D, 1e-300) - 1).max()),
            "mean": float(np.abs((found.mean_D - theirs.mean_D) / np.abs(stored_ND).max(axis=0)).max()),
            "norm": found.norm_sum / theirs.norm_sum - 1,
            "sse": found.sse / theirs.sse - 1 if theirs.sse else found.sse,
            "max_error": found.max_error / theirs.max_error - 1 if theirs.max_error else found.max_error,
        },
        ms=round(1000 * elapsed_s, 3),
        ms_to_queue=round(1000 * queued_s, 3),
        numpy_ms=round(1000 * numpy_s, 1),
    )
    return calibration


def rounds(case: Case, options: argparse.Namespace) -> None:
    """Print tokens/s of every stage, and where the time of a batch goes."""
    for stage in STAGES:
        case.run(stage)
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for k in range(options.pairs):
        for i in range(len(STAGES)):
            stage = STAGES[(i + k) % len(STAGES)]
            taken[stage].append(case.run(stage))
    n_tokens = sum(ids_BT.numel() for ids_BT in case.batches)
    per_batch = {s: [1000 * x / len(case.batches) for x in taken[s]] for s in STAGES}
    added = {
        stage: round(
            statistics.median(b - a for a, b in zip(per_batch[before], per_batch[stage], strict=True)), 3
        )
        for before, stage in itertools.pairwise(STAGES)
    }
    rows = len(case.kept_N) * len(case.batches)
    values = rows * len(case.sites) * case.model.config.hidden_size
    report(
        "gpu_harvest",
        device=_device_name(options.device),
        compiled=options.compile_codec,
        precision=str(case.precision),
        sites=len(case.sites),
        parameters=sum(p.numel() for p in case.model.parameters()),
        batch=list(case.batches[0].shape),
        batches=len(case.batches),
        batches_a_block=case.batches_a_block,
        threads=options.threads,
        tokens_per_s={s: round(statistics.median(n_tokens / x for x in taken[s])) for s in STAGES},
        ratio={
            s: round(statistics.median(b / x for b, x in zip(taken["bare"], taken[s], strict=True)), 4)
            for s in STAGES[1:]
        },
        ratios_store=[round(b / x, 4) for b, x in zip(taken["bare"], taken["store"], strict=True)],
        bare_ms_a_batch=round(statistics.median(per_batch["bare"]), 3),
        added_ms_a_batch=added,
        stored_bits_a_value=round(8 * case.stored_bytes / values, 3),
        peak_device_gib=_peak_gib(options.device),
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _peak_gib(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.startswith("cuda") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny LM and few tokens: to see that it runs")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of all stages")
    parser.add_argument("--batch", type=int, default=32, help="sequences a batch")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--blocks", type=int, default=4, help="blocks in a run of a stage")
    parser.add_argument("--batches-a-block", type=int, default=4)
    parser.add_argument("--sites", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", default="fvu:1e-3", help="of the rounds")
    parser.add_argument("--threads", type=int, default=12, help="that compress and store")
    parser.add_argument("--out", help="directory for the shards; a temporary one by default")
    parser.add_argument("--compile-codec", action="store_true", help="the codec by torch.compile")
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.context, options.blocks, options.batches_a_block = 4, 128, 2, 2
    model = llama(options.tiny, options.device)
    deepest = model.config.num_hidden_layers // 2
    generator = torch.Generator().manual_seed(0)
    shape = (options.blocks * options.batches_a_block, options.batch, options.context)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(options.device)
    directory = Path(tempfile.mkdtemp(dir=options.out))
    acts = run_capture(model, ids[0], [f"blocks.{deepest}.hook_resid_post"])
    acts_ND = next(iter(acts.values())).flatten(0, 1)
    for text in PRECISIONS:
        compare(acts_ND, Precision.parse(text), options.device, options.compile_codec)
    precision = Precision.parse(options.precision)
    with ThreadPoolExecutor(options.threads) as pool:
        for n_sites in options.sites:
            sites = [f"blocks.{deepest - i}.hook_resid_post" for i in reversed(range(n_sites))]
            acts = run_capture(model, ids[0], sites)
            codecs = {}
            for site in sites:
                rows_ND = acts[site].flatten(0, 1)[:CALIBRATION_ROWS].float().cpu().numpy()
                codecs[site] = DeviceCodec(
                    calibrate(rows_ND, precision), precision, options.device, options.compile_codec
                )
            body = up_to(model, deepest)
            case = Case(
                model,
                body,
                sites,
                list(ids),
                options.batches_a_block,
                precision,
                codecs,
                pool,
                directory,
            )
            rounds(case, options)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
