"""A plan: what it counts is what a harvest then does, what it estimates is near, and it changes nothing."""

import json
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from command_line import actcache_cli, actcache_here, harvest_arguments
from tiny_harvest import SITES, tiny_spec
from tiny_models import FAMILIES, shared_model, tiny_config, tiny_tokenizer, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import actcache
from actcache.capture import run_capture
from actcache.corpus import tokenise
from actcache.driver import resolve
from actcache.errors import CorpusError, SpecError
from actcache.flops import forward_cost
from actcache.spec import Corpus, Spec
from actcache.store import LocalStore, open_store

BUNDLED = Spec(
    model="bundled:stdlib-gpt2",
    corpus=Corpus("bundled:stdlib"),
    sites=["blocks.3.hook_resid_post"],
    context_size=256,
    n_tokens=2_000_000,
)


@pytest.fixture
def counted(monkeypatch):
    """How often each verb of local stores was called."""
    calls = Counter()

    def counting(verb, work):
        def around(*args, **kwargs):
            calls[verb] += 1
            return work(*args, **kwargs)

        return around

    for name in ("create", "swap", "read", "read_part"):
        verb = name.removesuffix("_part")
        monkeypatch.setattr(LocalStore, name, counting(verb, getattr(LocalStore, name)))
    return calls


def spent(run):
    """What `run` gives, and the processor seconds of the processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def objects_under(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def built(spec, root):
    """Only the token store, under `root`."""
    resolved = resolve(spec)
    return tokenise(spec, resolved.corpus, resolved.tokenizer, open_store(root), progress=False)


# Against a harvest


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-2", "bf16"])
def test_a_plan_with_the_token_store_counts_what_the_harvest_then_does(tmp_path, counted, precision):
    spec, root = tiny_spec(tmp_path, precision=precision), tmp_path / "root"
    built(spec, root)
    before = objects_under(root)
    counted.clear()
    made = actcache.plan(spec, str(root))
    assert made.tokens.exact
    assert set(counted) == {"read"}
    assert objects_under(root) == before
    counted.clear()
    ds = actcache.harvest(spec, str(root), progress=False)
    assert made.stored.put_requests == counted["create"] + counted["swap"]
    assert made.stored.new_objects == len(objects_under(root)) - len(before)
    assert made.stored.versions == ds.manifest.version == 2  # blocks, then losses
    for split, size in ds.manifest.splits.items():
        planned = made.extent[split]
        assert (planned.blocks, planned.n_rows, planned.n_sequences) == (
            size["n_blocks"],
            size["n_rows"],
            size["n_sequences"],
        )
        assert planned.blocks_to_do == planned.blocks
    assert made.name == ds.url.split("/")[-1]


def test_a_plan_says_what_a_worker_needs_and_when_a_block_is_more_than_its_buffer(tmp_path):
    spec = tiny_spec(tmp_path)
    needs = actcache.plan(spec).needs
    assert needs.lm_batch == 32
    assert needs.block_bytes == 2 * 32 * (1024 + 3 * 4 * 32 * 16)
    assert needs.under_way_bytes == 4 * 2**30
    assert needs.calibration_bytes == 2 * 65_536 * 32 * 4
    model = AutoModelForCausalLM.from_pretrained(spec.model)
    assert needs.lm_bytes == sum(p.nbytes for p in model.parameters())
    tight = actcache.plan(spec, buffer_bytes=2**16)
    assert tight.needs.under_way_bytes == tight.needs.block_bytes > 2**16
    assert any("lower --block-rows" in note for note in tight.notes)
    assert any(f"{tight.needs.lm_batch} sequences in place of 32" in note for note in tight.notes)


def test_a_plan_of_an_empty_root_counts_the_objects_of_the_token_store_too(tmp_path, counted):
    spec, root, other = tiny_spec(tmp_path), tmp_path / "root", tmp_path / "other"
    store = built(spec, other)
    n_tokens = len(objects_under(other))
    with_store, without = actcache.plan(spec, str(other)), actcache.plan(spec, str(root))
    assert not root.exists()
    # a tiny corpus fills one shard of each array, however its size was estimated
    assert n_tokens == without.stored.new_objects - with_store.stored.new_objects
    assert store.n_sequences("train") < 4096


@pytest.mark.slow
def test_bytes_are_within_a_fifth_of_what_is_stored_by_the_bundled_model(tmp_path):
    spec = replace(
        BUNDLED,
        corpus=Corpus("bundled:stdlib", max_tokens=150_000),
        sites=["blocks.0.hook_resid_post"],
        n_tokens=20_000,
        block_rows=16_384,
        validation_blocks=0,
        test_blocks=0,
    )
    made = actcache.plan(spec, str(tmp_path))
    ds = actcache.harvest(spec, str(tmp_path), progress=False)
    site = made.sites["blocks.0.hook_resid_post"]
    assert site.total_bytes == pytest.approx(ds.stats("blocks.0.hook_resid_post")["stored_bytes"], rel=0.2)
    metadata = ds.size_bytes() - ds.stats("blocks.0.hook_resid_post")["stored_bytes"]
    assert made.stored.metadata_bytes == pytest.approx(metadata, rel=0.35)
    token_store = sum(len(data) for data in objects_under(tmp_path / "tokens").values())
    assert made.stored.token_store_bytes == pytest.approx(token_store, rel=0.5)
    again = actcache.plan(spec, str(tmp_path))
    assert again.sites["blocks.0.hook_resid_post"].measured
    assert again.stored.missing_bytes == again.stored.put_requests == again.compute.n_tokens == 0


def test_what_is_there_is_not_planned_again_and_a_site_and_blocks_more_are(tmp_path, counted):
    spec, root = tiny_spec(tmp_path, sites=SITES[:1], n_tokens=1024), tmp_path / "root"
    actcache.harvest(spec, str(root), progress=False)
    more = replace(spec, sites=SITES, n_tokens=3000)
    made = actcache.plan(more, str(root))
    assert made.existing is not None
    assert made.existing.certain
    assert made.existing.n_blocks == {SITES[0]: {"train": 1, "validation": 1, "test": 1}}
    assert made.extent["train"].missing == {SITES[0]: 2, SITES[1]: 3}
    before, counted_before = objects_under(root), counted.copy()
    ds = actcache.harvest(more, str(root), progress=False)
    assert made.stored.new_objects == len(objects_under(root)) - len(before)
    writes = sum((counted - counted_before)[verb] for verb in ("create", "swap"))
    assert made.stored.put_requests == writes
    assert ds.n_rows == made.extent["train"].n_rows


def test_a_pass_reads_the_chunks_that_were_planned(tiny, counted):
    _, spec, root = tiny
    made = actcache.plan(spec, root)
    ds = actcache.harvest(spec, root, progress=False)
    for metadata, planned in (
        (False, made.stored.get_requests_per_pass),
        (True, made.stored.get_requests_with_metadata),
    ):
        stream = ds.stream(batch_size=256, metadata=metadata, lanes=1)
        counted.clear()
        assert sum(len(batch) for batch in stream) == ds.n_rows
        assert planned <= counted["read"] <= planned + 10


# Operations


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family):
    model, context = shared_model(family), 16
    site = "blocks.1.hook_resid_post"
    # the kernel that torch takes on CPUs by itself is one that it does not count
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_capture(model, tokens(batch=1, length=context), [site])
    by_operator = counter.get_flop_counts()["Global"]
    # torch counts attention over all positions, seen or not: twice what a causal model needs
    attention = sum(n for op, n in by_operator.items() if "bmm" in str(op) or "attention" in str(op))
    found = forward_cost(model, [site], context)
    assert found.blocks == 2
    assert found.per_token * context == pytest.approx(counter.get_total_flops() - attention / 2, rel=0.01)


def test_operations_stop_at_the_deepest_site():
    model = shared_model("llama")
    sites = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"]
    assert [forward_cost(model, [site], 16).blocks for site in sites] == [0, 0, 1, 2]
    whole = forward_cost(model, ["ln_final.hook_normalized"], 16)
    assert (whole.blocks, whole.of_blocks) == (3, 3)
    assert forward_cost(model, [*sites, "blocks.1.attn.hook_z"], 16).blocks == 2
    unembedding = model.lm_head.weight.numel()
    assert forward_cost(model, ["lm_head:out"], 16).parameters == whole.parameters + unembedding


def test_an_encoder_sees_all_positions_and_a_state_space_model_has_no_attention():
    bert, mamba = shared_model("bert"), shared_model("mamba")
    site = "bert.encoder.layer.0:out"
    assert (
        forward_cost(bert, [site], 16).per_token
        == 2 * forward_cost(bert, [site], 16).parameters + 4 * 16 * 32
    )
    site = "backbone.layers.0:out"
    assert forward_cost(mamba, [site], 16).per_token == 2 * forward_cost(mamba, [site], 16).parameters


def test_of_a_mixture_of_experts_those_that_run_are_counted():
    options = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 4, "vocab_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **options))
    found = forward_cost(model, ["model.layers.0:out"], 16)
    assert found.parameters == 4 * 32 * 32 + 8 * 32 + 2 * 3 * 32 * 64  # attention, router, two experts
    assert "2 of 8" in found.note


# The sample


@pytest.mark.slow
def test_the_bundled_corpus_is_estimated_within_a_tenth(tmp_path):
    made, store = actcache.plan(BUNDLED), built(BUNDLED, tmp_path)
    assert not made.tokens.exact
    assert "estimated from a sample of" in made.tokens.how
    assert made.tokens.n_tokens == pytest.approx(
        sum(split["n_tokens"] for split in store.manifest["splits"].values()), rel=0.1
    )
    assert made.tokens.splits["train"].n_rows == pytest.approx(store.n_rows("train"), rel=0.1)


@pytest.mark.parametrize("packing", ["concat", "isolated", "single"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "feather", "arrow"])
def test_every_kind_of_corpus_and_packing_is_estimated(tmp_path, kind, packing):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.feather import write_feather

    spec = tiny_spec(tmp_path, packing=packing)
    texts = [path.read_text() for path in sorted((tmp_path / "corpus").iterdir())] * 40
    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / f"data.{kind}"
    lines = "".join(json.dumps({"text": text, "n": 7}) + "\n" for text in texts).encode()
    table = pa.table({"text": texts})
    if kind == "txt":
        for i, text in enumerate(texts[:600]):
            (tmp_path / "c" / f"{i}.txt").write_text(text)
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=1000)
    elif kind == "feather":
        write_feather(table, path, chunksize=500)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=500)
    elif kind == "jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    spec = replace(spec, corpus=replace(spec.corpus, source=str(tmp_path / "c")))
    made, store = actcache.plan(spec), built(spec, tmp_path / "root")
    for what in ("n_documents", "n_sequences", "n_rows"):
        found = sum(getattr(size, what) for size in made.tokens.splits.values())
        true = sum(getattr(store, what)(split) for split in made.tokens.splits)
        assert found == pytest.approx(true, rel=0.1), what


def test_max_tokens_bounds_the_estimate(tmp_path):
    spec = tiny_spec(tmp_path)
    bounded = replace(spec, corpus=replace(spec.corpus, max_tokens=5000))
    assert actcache.plan(bounded).tokens.n_tokens == 5000


def test_a_corpus_in_which_nothing_can_be_taken_is_an_error(tmp_path):
    spec = tiny_spec(tmp_path)
    (tmp_path / "bad.jsonl").write_text("not json\n" * 10)
    with pytest.raises(CorpusError, match="no document that can be taken among the first of 1 files"):
        actcache.plan(replace(spec, corpus=Corpus(str(tmp_path / "bad.jsonl"))))


# What is not read


def test_large_weights_are_not_hashed_and_the_dataset_is_found_all_the_same(tmp_path, monkeypatch):
    spec, root = tiny_spec(tmp_path), str(tmp_path / "root")
    actcache.harvest(spec, root, progress=False)
    model = tmp_path / "tiny-gpt2"
    with (model / "more.safetensors").open("wb") as file:
        file.truncate(100 * 10**9)  # a hole: 100 GB that take no room
    made = actcache.plan(spec, root)
    assert made.existing is not None
    assert not made.existing.certain
    assert made.name is None
    assert made.extent["train"].blocks_to_do == 0
    assert "not hashed" in made.notes[0]
    (model / "more.safetensors").unlink()
    (model / "model.safetensors").unlink()
    assert actcache.plan(spec, root).existing == made.existing
    other = actcache.plan(replace(spec, precision="bf16"), root)
    assert other.existing is None
    assert other.tokens.exact


def test_a_large_corpus_is_not_read_and_its_tokens_are_found_all_the_same(tmp_path, monkeypatch):
    spec, root = tiny_spec(tmp_path), str(tmp_path / "root")
    actcache.harvest(spec, root, progress=False)
    monkeypatch.setattr("actcache.planning._HASHED_BYTES", 10_000_000)
    with (tmp_path / "corpus" / "zzz.txt").open("wb") as file:
        file.truncate(10**11)
    made = actcache.plan(spec, root)
    assert made.tokens.exact
    assert made.existing is not None
    assert not made.existing.certain
    assert any("corpus was not read" in note for note in made.notes)


def test_a_plan_for_seven_billion_parameters_takes_no_weights_and_less_than_five_seconds(tmp_path):
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32_000}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    tiny_config("llama", **shape).save_pretrained(tmp_path / "seven")
    tiny_tokenizer(tmp_path / "seven")
    root = tmp_path / "root"
    arguments = [
        "plan", "--model", tmp_path / "seven", "--site", "blocks.{8..24}.hook_resid_post", "--root", root,
        "--context-size", 1024, "--tokens", 10**9, "--lm-dtype", "bfloat16", "--json",
    ]  # fmt: skip
    libraries = "import torch; from transformers import AutoTokenizer, LlamaForCausalLM"
    # processor time: the clock's is that of whatever else the machine does
    _, imports_s = spent(lambda: subprocess.run([sys.executable, "-c", libraries], check=True))
    done, plan_s = spent(lambda: actcache_cli(*arguments))
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["compute"]["parameters"] == 25 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plan_s - imports_s < 2.5  # of 5 s; the rest is for importing torch and transformers
    assert not root.exists()


# Rates and prices


def test_a_given_rate_gives_hours_and_dollars(tmp_path):
    spec = tiny_spec(tmp_path)
    made = actcache.plan(spec, rate=100.0, gpu="a100", workers=4, gpus_per_worker=2, months=3)
    compute, cost = made.compute, made.cost
    hours = compute.n_tokens / 100 / 3600
    assert (compute.worker_hours, compute.wall_hours) == pytest.approx((hours, hours / 4))
    assert compute.gpu_hours == pytest.approx(2 * hours)
    assert cost.harvest == pytest.approx(1.8 * 2 * hours)
    assert cost.recompute_pass == pytest.approx(1.8 * 2 * compute.pass_n_tokens / 100 / 3600)
    assert made.stored.total_bytes / 1e9 * 0.023 == pytest.approx(cost.storage_per_month)
    spent = cost.harvest + cost.write_requests + 3 * cost.storage_per_month
    assert cost.break_even_dollars is not None
    for n, paid in ((cost.break_even_dollars, True), (cost.break_even_dollars - 1, False)):
        assert (spent + n * cost.read_pass <= n * cost.recompute_pass) == paid


def test_a_rate_is_that_of_a_harvest_of_the_model_scaled_to_the_deepest_site(tmp_path):
    spec, root = tiny_spec(tmp_path), str(tmp_path / "root")
    ds = actcache.harvest(replace(spec, sites=["blocks.2.hook_resid_post"]), root, progress=False)
    provenance = ds.manifest.provenance
    made = actcache.plan(replace(spec, sites=["blocks.0.hook_resid_post"], precision="bf16"), root)
    assert made.compute.rate_how == f"measured on cpu by {ds.url.split('/')[-1]}"
    sizes = ds.manifest.splits.values()
    per_row = 16 * sum(s["n_sequences"] for s in sizes) / sum(s["n_rows"] for s in sizes)
    assert made.compute.rate == pytest.approx(3 * provenance["rows_per_s"] * per_row)
    assert made.compute.gpu is made.cost.harvest is made.cost.break_even_dollars is None
    named = actcache.plan(spec, root, gpu="h100")
    assert "0.4 of the bf16 peak of h100" in named.compute.rate_how
    assert named.cost.harvest is not None
    assert any("float32" in note for note in named.notes)


def test_what_costs_less_to_compute_than_to_read_never_pays(tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text(
        'as_of = "today"\n[storage]\negress_per_gb = 1e6\n[gpu.ours]\nprice_per_hour = 1\npeak_tflops = 5\n'
    )
    made = actcache.plan(tiny_spec(tmp_path), prices=prices, gpu="ours", mfu=1)
    assert made.cost.break_even_dollars is None
    assert made.cost.as_of == "today"
    assert made.compute.rate == pytest.approx(5e12 / made.compute.flops_per_token)


def test_a_site_before_all_blocks_costs_nothing_to_compute(tmp_path):
    made = actcache.plan(tiny_spec(tmp_path, sites=["hook_embed"]))
    assert (made.compute.flops, made.compute.rate, made.compute.worker_hours) == (0, None, 0)
    assert made.cost.break_even_hours is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[gpu.h100]\nprice_per_hour = -1",
            "price_per_hour is -1.0; it must be a number of at least 0|is -1",
        ),
        ("[gpu.h100]\npeak_tflops = 0", "must be a number above 0"),
        ("[gpu.new]\npeak_tflops = 1", "price_per_hour is None"),
        ("[gpu.h100]\nprice = 1", "unknown 'price'"),
        ("[storage]\nper_gb_mont = 1", "did you mean 'per_gb_month'"),
        ("[gpus]", "did you mean 'gpu'"),
        ("gpu = 3", "must be a table"),
        ("[storage", "cannot read prices"),
        (None, "cannot read prices"),
    ],
)
def test_a_bad_price_table_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "prices.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=message):
        actcache.plan(tiny_spec(tmp_path), prices=path)


# On the command line


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--gpu", "h10"], 2, "did you mean 'h100'"),
        (["--rate", "0"], 2, "rate is 0.0"),
        (["--rate", "1e-320"], 2, "must be at least 0.001"),
        (["--mfu", "1.5"], 2, "mfu is 1.5"),
        (["--months", "-1"], 2, "months is -1.0"),
        (["--prices", "nowhere.toml"], 2, "cannot read prices from nowhere.toml"),
        (["--site", "blocks.1.hook_resid_pots"], 2, "blocks.1.hook_resid_post"),
        (["--precision", "int4"], 2, "precision is 'int4'"),
        (["--corpus", "nothing/here/*.txt"], 2, "no file matches"),
        (["--engine", "ray"], 2, "No such option"),
    ],
)
def test_bad_input_is_one_line(tmp_path, change, code, message):
    arguments = ["plan", *harvest_arguments(tiny_spec(tmp_path), tmp_path / "root")[1:], *change]
    done = actcache_here(*arguments)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "root").exists()


def test_the_text_marks_estimates_and_writes_nothing(tmp_path):
    spec = tiny_spec(tmp_path)
    arguments = ["plan", *harvest_arguments(spec, tmp_path / "root")[1:]]
    done = actcache_here(*arguments, "--rate", 1000)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "root").exists()
    assert "nothing there yet" in done.stdout
    assert "estimated from a sample of" in done.stdout
    built(replace(spec, corpus=Corpus(spec.corpus.source)), tmp_path / "root")
    counted = actcache_here(*arguments, "--rate", 1000).stdout
    assert "counted in" in counted
    line = next(line for line in counted.splitlines() if line.startswith("train"))
    assert "~" not in line


def test_the_module_does_not_hide_the_function():
    code = "import actcache.planning, actcache; print(callable(actcache.plan))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "True"
