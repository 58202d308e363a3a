"""A plan as a person reads it: tables for the terminal, each figure with its unit, estimates marked with ~."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .planning import Plan
from .progress import format_bytes, format_count


def print_plan(plan: Plan, console: Console) -> None:
    """Print it, folded to the width of the console."""
    sites = "1 site" if len(plan.sites) == 1 else f"{len(plan.sites)} sites"
    console.print(
        Text(
            f"{plan.model} over {plan.corpus}: {sites}, {plan.precision}, context {plan.context_size}", "bold"
        )
    )
    console.print(Text("Nothing was written. ~ marks what is estimated; dollars rest on assumed prices."))
    for part in (
        _lines(_counts(plan)),
        _splits(plan),
        _sites(plan),
        _lines([*_work(plan), *_needs(plan)]),
        _lines(_money(plan)),
    ):
        console.print()
        console.print(part)
    if plan.notes:
        console.print()
        console.print(_lines(("note", note) for note in plan.notes))


def _lines(rows: Any) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    return table


def _about(plan: Plan) -> str:
    """The mark of what follows from the number of tokens."""
    return "" if plan.tokens.exact else "~"


def _counts(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.existing is not None:
        there = plan.existing
        mark = "" if there.certain else "~ "
        size = f"version {there.version}, {format_bytes(there.size_bytes)}"
        yield "dataset", f"{mark}{there.name} under {plan.root}, {size}"
    elif plan.root is None:
        yield "dataset", "planned as if nothing were there; --root looks"
    else:
        yield "dataset", f"{plan.name or 'one without a name yet'} under {plan.root}: nothing there yet"
    sequences = sum(size.n_sequences for size in plan.tokens.splits.values())
    a = _about(plan)
    yield (
        "corpus",
        f"{a}{format_count(plan.tokens.n_tokens)} tokens, {a}{format_count(sequences)} sequences; {plan.tokens.how}",
    )
    yield "blocks", f"{plan.block_rows:,} rows, in chunks of {plan.chunk_rows:,}"


def _splits(plan: Plan) -> Table:
    table = _table("split", "rows", "of corpus", "sequences", "blocks", "to do", "rows to do")
    a = _about(plan)
    for split, e in plan.extent.items():
        counts = (e.n_rows, e.corpus_rows, e.n_sequences)
        table.add_row(
            split,
            *(f"{a}{format_count(n)}" for n in counts),
            f"{a}{e.blocks:,}",
            f"{a}{e.blocks_to_do:,}",
            f"{a}{format_count(e.rows_to_do)}",
        )
    return table


def _sites(plan: Plan) -> Table:
    table = _table("site", "d_in", "bits/value", "size", "missing")
    for site, s in plan.sites.items():
        low, high = s.bits_per_value
        bits = f"{low:.2f}" if s.measured else f"~{low:.2f}-{high:.2f}"
        a = "" if s.measured and plan.tokens.exact and not s.missing_bytes else "~"
        table.add_row(
            site,
            f"{s.d_in:,}",
            bits,
            f"{a}{format_bytes(s.total_bytes)}",
            f"{a}{format_bytes(s.missing_bytes)}",
        )
    return table


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    s, c = plan.stored, plan.compute
    beside = f", token store ~{format_bytes(s.token_store_bytes)}" if s.token_store_bytes else ""
    yield (
        "storage",
        f"~{format_bytes(s.total_bytes)}: sites {format_bytes(s.sites_bytes)}, which token each row is "
        f"{format_bytes(s.metadata_bytes)}{beside}; ~{format_bytes(s.missing_bytes)} to be written",
    )
    a = "~" if not plan.tokens.exact or s.versions > 1 or plan.existing else ""
    yield (
        "requests",
        f"{a}{s.put_requests:,} PUT for {a}{s.new_objects:,} new objects; a pass over train reads "
        f"{_about(plan)}{s.get_requests_per_pass:,} chunks, {_about(plan)}{s.get_requests_with_metadata:,} with row metadata",
    )
    yield (
        "forward",
        f"{_si(c.flops_per_token)}FLOP a token through {c.blocks} of {c.of_blocks} blocks "
        f"({format_count(c.parameters)} weights); {_about(plan)}{format_count(c.n_tokens)} tokens to run: "
        f"{_about(plan)}{_si(c.flops)}FLOP",
    )
    if c.rate is None:
        yield "rate", c.rate_how
        return
    yield (
        "rate",
        f"{'' if c.rate_how == 'given' else '~'}{format_count(c.rate)} tokens/s a worker: {c.rate_how}",
    )
    hours = f"~{_hours(c.worker_hours)} worker hours"
    if c.gpu_hours is not None and c.gpu_hours != c.worker_hours:
        hours += f", ~{_hours(c.gpu_hours)} GPU hours"
    yield "time", f"{hours}; ~{_duration(c.wall_hours)} with all workers"


def _needs(plan: Plan) -> Iterator[tuple[str, str]]:
    n = plan.needs
    yield (
        "a worker",
        f"~{format_bytes(n.host_bytes)} of memory: blocks under way up to {format_bytes(n.under_way_bytes)} (one takes "
        f"{format_bytes(n.block_bytes)}), objects being written ~{format_bytes(n.upload_bytes)}; and the LM, "
        f"{format_bytes(n.lm_bytes)} on its device, with passes of {n.lm_batch} sequences",
    )


def _money(plan: Plan) -> Iterator[tuple[str, str]]:
    cost, c = plan.cost, plan.compute
    unpriced = "not priced (its rate is of CPUs; name a --gpu)"
    on = f" on {c.gpu}" if c.gpu else ""
    harvest = unpriced if cost.harvest is None else f"~{_dollars(cost.harvest)}{on}"
    yield (
        "cost",
        f"harvest {harvest}, PUT ~{_dollars(cost.write_requests)}, storage ~{_dollars(cost.storage_per_month)} a month",
    )
    again = "" if cost.recompute_pass is None else f", ~{_dollars(cost.recompute_pass)}"
    yield (
        "one pass",
        f"read ~{_dollars(cost.read_pass)}; recomputed ~{_hours(c.pass_hours)} worker hours{again}",
    )
    paid = [f"in hours from pass {cost.break_even_hours:,} on" if cost.break_even_hours else "in hours never"]
    if cost.harvest is not None:
        kept = f"kept {cost.months:g} month{'' if cost.months == 1 else 's'}"
        when = f"from pass {cost.break_even_dollars:,} on" if cost.break_even_dollars else "never"
        paid.append(f"in dollars {when} ({kept})")
    yield "has paid", ", ".join(paid)
    yield "prices", f"assumptions of {cost.prices} ({cost.as_of}); put in yours with --prices FILE"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _dollars(amount: float) -> str:
    if amount >= 0.01 or not amount:
        return f"${amount:,.2f}"
    return f"${amount:.1g}" if amount >= 1e-4 else "$0.0001"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _duration(hours: float) -> str:
    """`0.2` -> `12 min`."""
    for limit, unit in ((24, "days"), (1, "h"), (1 / 60, "min")):
        if hours >= 2 * limit:
            return f"{hours / limit:.3g} {unit}"
    return f"{3600 * hours:.0f} s"


def _si(n: float) -> str:
    """`9.4e12` -> `9.40 T`."""
    for limit, prefix in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
    ):
        if n >= limit:
            return f"{n / limit:.3g} {prefix}"
    return f"{n:.0f} "
