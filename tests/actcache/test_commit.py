"""Two writers of one block that round differently store one block, whoever dies when."""

import itertools

import numpy as np
import pytest
from tiny_harvest import SITES
from watched import DictStore, Died, DiesAt, Watched

from actcache.codec import decode
from actcache.errors import Conflict, CorruptObject
from actcache.layout import array_layout
from actcache.manifest import BlockRecord, read_records, record_key
from actcache.shard import decode_shard, encode_shard, shard_key
from actcache.statistics import Statistics

NOISE = 1e-6
BLOCK = ("train", 0, SITES)
RECORD = record_key(*BLOCK)


@pytest.fixture(scope="module")
def calibrated(recorded):
    """The objects of a dataset with its calibrations and nothing else."""
    store = DictStore()
    recorded.harvester_on(store, recorded.resolved).calibrate()
    return store.objects


@pytest.fixture(scope="module")
def kernels(recorded, calibrated):
    """Two kernels: activations that differ by 1e-6, relative, a third of the rows at the edge of int8."""
    harvester = recorded.harvester_on(DictStore(dict(calibrated)), recorded.resolved)

    def at_the_edge(site, acts_TD):
        calibration = harvester.calibration(site)
        shifted_TD = acts_TD - calibration.offset_D
        peak_T = np.abs(shifted_TD).max(axis=1)
        factor_T = 127.49 * calibration.step / peak_T * 2.0 ** (np.arange(len(acts_TD)) // 3 % 2)
        factor_T[np.arange(len(acts_TD)) % 3 != 0] = 1
        shifted_TD *= factor_T[:, None]
        shifted_TD[1::3, 5] = 3.5 * calibration.step  # and a value at the edge of a code
        return (shifted_TD + calibration.offset_D).astype(np.float32)

    edge, rng = recorded.with_acts(at_the_edge), np.random.default_rng(0)

    def noise(site, acts_TD):
        return (acts_TD * (1 + rng.uniform(-NOISE, NOISE, acts_TD.shape))).astype(np.float32)

    return edge, edge.with_acts(noise)


def run(kernel, store):
    """Block 0 of the train split; whether its writer survived."""
    try:
        kernel.harvester_on(store, kernel.resolved).run_block(*BLOCK)
    except Died:
        return False
    return True


def stored_block(store, kernel, site):
    """Codes and scales of the block."""
    layout = array_layout(kernel.resolved.identity, kernel.resolved.widths)
    out = []
    for name in ("codes", "scale"):
        array, key = (
            layout[f"{site}/{name}"],
            shard_key(f"train/{site}/{name}", 0, 2 if name == "codes" else 1),
        )
        shape = (array["chunk_rows"], *array["row"])
        out.append(decode_shard(store.read(key), 1024, shape, array["shard_rows"], array["dtype"], key))
    return out


def rows_of(kernel, site):
    """The activations of the block in stored order."""
    from actcache.harvester import plan_block

    plan = plan_block(kernel.tokens, kernel.resolved.identity, *BLOCK[:2])
    natural = np.stack([kernel.acts[ids.tobytes()][site] for ids in plan.input_ids_ST])[plan.chosen_ST]
    out = np.empty_like(natural)
    out[plan.place_N] = natural
    return out


def check_block(store, kernels, last):
    """The block is whole, within its bound of both kernels, and its record tells of what is stored."""
    record = BlockRecord.from_json(store.read(RECORD), RECORD)
    for o in record.objects:
        key = shard_key(
            o.path, o.shard, 2 if o.path.endswith(("codes", "input_ids", "document_begins")) else 1
        )
        assert len(store.read(key)) == o.size_bytes
    for site in SITES:
        harvester = kernels[0].harvester_on(store, kernels[0].resolved)
        calibration, precision = harvester.calibration(site), harvester.precision
        codes_ND, scale_N = stored_block(store, kernels[0], site)
        stored_ND = decode(codes_ND, scale_N, calibration, precision)
        for kernel in kernels:
            acts_ND = rows_of(kernel, site)
            # scale / 2, and what the two kernels and float32 differ by
            bound_ND = scale_N[:, None] * (0.5 + 1e-3) + 4 * NOISE * np.abs(acts_ND)
            assert (np.abs(stored_ND - acts_ND) <= bound_ND).all()
        found = record.statistics[site]
        expected = Statistics.of(rows_of(last, site), stored_ND, scale_N, calibration)
        assert found.rows_rescaled == expected.rows_rescaled
        assert found.max_error == expected.max_error
        for name in ("sse", "core_sse", "norm_sum"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)


def test_the_two_kernels_would_store_other_scales_and_other_codes(kernels, calibrated):
    """So that the tests below test something."""
    stores = [DictStore(dict(calibrated)) for _ in kernels]
    for kernel, store in zip(kernels, stores, strict=True):
        assert run(kernel, store)
        check_block(store, [kernel], kernel)
    for site in SITES:
        (codes_a, scale_a), (codes_b, scale_b) = (stored_block(s, kernels[0], site) for s in stores)
        assert (scale_a != scale_b).sum() >= 10
        same_N = scale_a == scale_b
        assert (codes_a[same_N] != codes_b[same_N]).any()


def creates(kernel, calibrated):
    """Objects that one block stores."""
    store = Watched(DictStore(dict(calibrated)))
    assert run(kernel, store)
    return store.requests["create"]


@pytest.mark.parametrize("after", [False, True])
def test_a_block_is_finished_by_another_kernel_wherever_the_first_writer_died(kernels, calibrated, after):
    for n in itertools.count():
        store = DictStore(dict(calibrated))
        finished = run(kernels[0], DiesAt(store, n, "create .*", after=after))
        committed_by = kernels[0] if RECORD in store.objects else kernels[1]
        assert run(kernels[1], store)
        check_block(store, kernels, committed_by)
        if finished:
            break
    assert n == creates(kernels[0], calibrated)


def test_a_block_is_finished_whoever_died_where_before(kernels, calibrated):
    for a, b in itertools.product(range(creates(kernels[0], calibrated)), repeat=2):
        store, committed_by = DictStore(dict(calibrated)), None
        for kernel, n in ((kernels[0], a), (kernels[1], b), (kernels[0], 99)):
            run(kernel, DiesAt(store, n, "create .*", after=True))
            committed_by = committed_by or (kernel if RECORD in store.objects else None)
        check_block(store, kernels, committed_by)


def test_codes_stored_between_another_writers_scale_and_codes_are_adopted(kernels, calibrated):
    """The other writer does its whole block between two operations of the first."""
    for n in range(creates(kernels[0], calibrated)):
        store = DictStore(dict(calibrated))
        left = [n]

        def before(operation, key, left=left, store=store):
            if operation == "create" and key.startswith(("train", "_records")):
                left[0] -= 1
                if left[0] == -1:
                    assert run(kernels[1], store)

        assert run(kernels[0], Watched(store, before))
        check_block(store, kernels, kernels[1])


def with_scale(kernel, calibrated, row, factor):
    """A store that holds only one shard of the block: the scales, that of one row times `factor`."""
    whole = DictStore(run_fresh(kernel, calibrated))
    _, scale_N = stored_block(whole, kernel, SITES[0])
    scale_N[row] *= factor
    array = array_layout(kernel.resolved.identity, kernel.resolved.widths)[f"{SITES[0]}/scale"]
    data, _ = encode_shard(scale_N, array["chunk_rows"], array["shard_rows"], np.nan)
    return DictStore(calibrated | {f"train/{SITES[0]}/scale/c/0": data})


@pytest.mark.parametrize("factor", [1.5, 4.0, 0.25, 0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_no_rounding_explains_is_a_conflict(kernels, calibrated, factor):
    store = with_scale(kernels[0], calibrated, 7, factor)
    with pytest.raises(Conflict, match=r"scale/c/0 holds the scale .* for row 7; .*use another root"):
        run(kernels[0], store)
    assert RECORD not in store.objects


def test_a_stored_scale_too_small_for_its_row_is_a_conflict(kernels, calibrated):
    """Half the scale of a row that is nowhere near the edge: its codes would be clipped."""
    codes_ND, scale_N = stored_block(DictStore(run_fresh(kernels[0], calibrated)), kernels[0], SITES[0])
    peak_N = np.abs(codes_ND.astype(int)).max(axis=1)
    row = int(np.argmax(np.where(scale_N > scale_N.min(), peak_N, 0)))
    store = with_scale(kernels[0], calibrated, row, 0.5)
    with pytest.raises(
        Conflict, match=rf"{SITES[0]}, train block 0: row \d+ reaches code {2 * peak_N[row] // 10}"
    ):
        run(kernels[0], store)
    assert RECORD not in store.objects


def run_fresh(kernel, calibrated):
    store = DictStore(dict(calibrated))
    assert run(kernel, store)
    return store.objects


def test_codes_of_other_rows_are_a_conflict_not_adopted(recorded, calibrated):
    store = DictStore(dict(calibrated))
    harvester = recorded.harvester_on(store, recorded.resolved)
    harvester.run_block("train", 1, SITES[:1])
    codes = store.objects.pop(f"train/{SITES[0]}/codes/c/1/0")
    store.objects[f"train/{SITES[0]}/codes/c/0/0"] = codes
    with pytest.raises(Conflict, match="the codes that are stored are of other rows"):
        harvester.run_block("train", 0, SITES[:1])
    assert store.objects[f"train/{SITES[0]}/codes/c/0/0"] == codes


def test_what_a_collector_removes_before_the_record_is_there_is_written_again(recorded, calibrated):
    """All objects of a dead writer's block go at the moment the next one commits it."""
    store = DictStore(dict(calibrated))
    assert not run(recorded, DiesAt(store, 0, f"create {RECORD}"))
    whole = dict(store.objects)

    def collect(operation, key):
        if (operation, key) == ("create", RECORD):
            for name in [name for name in store.objects if name.startswith("train/")]:
                del store.objects[name]

    assert run(recorded, Watched(store, collect))
    assert {k: v for k, v in store.objects.items() if k != RECORD} == whole


@pytest.mark.parametrize("n_found", [0, 1, 4])
def test_so_is_what_the_writer_itself_had_created(recorded, calibrated, n_found):
    """However long the block took: a collector could think its objects litter."""
    store = DictStore(dict(calibrated))
    run(recorded, DiesAt(store, n_found, "create .*"))
    whole = run_fresh(recorded, calibrated)

    def collect(operation, key):
        if (operation, key) == ("create", RECORD):
            for name in [name for name in store.objects if name.startswith(("train/", "_calibration/"))]:
                del store.objects[name]

    assert run(recorded, Watched(store, collect))
    assert store.objects == whole


def test_a_block_is_not_committed_under_a_calibration_that_was_made_anew(recorded, calibrated):
    """The calibration was removed while a writer stalled, and another kernel made another one."""
    other = DictStore()
    kernel = recorded.with_acts(lambda site, acts_TD: acts_TD * 1.01)
    kernel.harvester_on(other, kernel.resolved).calibrate()
    store = DictStore(dict(calibrated))

    def made_anew(operation, key):
        if operation == "create" and key.startswith("train/") and "codes" in key:
            store.objects |= other.objects

    with pytest.raises(Conflict, match="_calibration/.* is not the one that this block was encoded with"):
        run(recorded, Watched(store, made_anew))
    assert RECORD not in store.objects


def test_a_damaged_record_is_its_blocks_absence_and_is_replaced(recorded, calibrated, caplog):
    store = DictStore(dict(calibrated))
    assert run(recorded, store)
    good = store.objects[RECORD]
    for bad in (good[:100], b"", good.replace(b'"n_rows":1024', b'"n_rows":1023'), b"\xff" + good):
        store.objects[RECORD] = bad
        caplog.clear()
        assert list(read_records(store)) == []
        assert RECORD in caplog.text
        assert "run the harvest again" in caplog.text
        assert run(recorded, store)
        assert store.objects[RECORD] == good


def test_every_changed_bit_of_a_record_is_seen(recorded, calibrated):
    from actcache.errors import FormatError

    store = DictStore(dict(calibrated))
    assert run(recorded, store)
    good = store.objects[RECORD]
    for at in range(0, len(good), 61):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            with pytest.raises((CorruptObject, FormatError), match=RECORD):
                BlockRecord.from_json(bytes(bad), RECORD)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(split="../train"),
        lambda r: r.update(block=-1),
        lambda r: r.update(block="0"),
        lambda r: r.update(n_rows=1024.0),
        lambda r: r.update(n_rows=True),
        lambda r: r.update(objects={}),
        lambda r: r["objects"][0].update(shard=2**40),
        lambda r: r["objects"][0].update(path=7),
        lambda r: r["objects"][0].update(chunk_offset=[-1]),
        lambda r: r["objects"][0].update(chunk_offset=None),
        lambda r: r["objects"][0].update(constant="1"),
        lambda r: r["objects"][0].update(extra=1),
        lambda r: r["statistics"].update({"../x": r["statistics"][SITES[0]]}),
        lambda r: r["statistics"][SITES[0]].pop("sse"),
        lambda r: r["statistics"][SITES[0]].update(sse="0"),
        lambda r: r["statistics"][SITES[0]].update(mean_D=7),
        lambda r: r.pop("statistics"),
        lambda r: r.update(block=1),
        lambda r: r.update(format=1),
        lambda r: r.update(format=3),
    ],
)
def test_a_record_of_wrong_types_or_another_key_is_refused_by_name(recorded, calibrated, change):
    import json

    from actcache.errors import FormatError
    from actcache.spec import canonical_json, digest

    store = DictStore(dict(calibrated))
    assert run(recorded, store)
    value = json.loads(store.objects[RECORD])
    value.pop("digest")
    change(value)
    value["digest"] = digest(value)
    with pytest.raises(FormatError, match=RECORD):
        BlockRecord.from_json(canonical_json(value).encode(), RECORD)
