"""The bars of sparse prefill (targets T1 to T6, and a million tokens) in one run on one GPU.

bf16, batch 1, 32 query heads, 8 key/value heads, D = 128. Dense peers run in the same process:
FlashAttention-3 where it can be imported, torch's SDPA by its flash and cuDNN backends; one that is
missing is listed as missing. Times are device events around whole operator calls, the L2 cache
flushed before each; inputs, pair counts and TFLOP/s are those of `prefill_attention.py`. Per
target:

T1  block-sparse 128x128 at 5, 10, 20, 50 and 100 % of the causal blocks
T2  block-sparse 64x64, 100 blocks a row
T3  vertical-slash with given lists, four sizes; the bar is 1.6 times the faster peer's speed, from
    times that were taken on another card (`bars.PEERS`)
T4  all keys, as an A-shape without sinks whose window is the prompt, against FlashAttention-3; the
    two take turns, call by call, since clocks fall as a card heats up
T5  estimate, selection and plan for all heads, vertical-slash (1000, 6096); no operator does just
    that, so the time is read from a device trace of one `sparse_attention`: from its first kernel
    to the start of the attention kernel, packing of columns included. Beside it, by events: the
    estimate alone, and `sparse_attention` less `vertical_slash_attention` on the lists that it
    finds, in which plan and packing cancel
T6  what one `sparse_attention` takes of device memory at its peak, beside inputs and output
million  `sparse_attention` on 1,048,576 tokens, twice: output finite, both bitwise equal

The record is written anew after every row, so that a run that is cut short leaves what it has
(`complete` is false then).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import bars
import common
import prefill_attention as prefill
import torch
from bars import FA3, Bar
from device_trace import trace_before_attention
from prefill_attention import Build, Prepared
from torch import Tensor
from tqdm import tqdm

import sparseattn
from sparseattn import VerticalSlash
from sparseattn.bench_layer import extra_memory
from sparseattn.bench_tools import SDPA_BACKENDS, Timing

BENCHMARK = "prefill-bars"
TARGETS = ("T1", "T2", "T3", "T4", "T5", "T6", "million")
DENSE = "dense"  # the target of the peers' rows

TRACED = "device trace: first kernel of sparse_attention to the attention kernel"
UNTRACED = "estimate_vertical_slash alone; the plan is not in it"


@dataclass(frozen=True)
class Setting(prefill.Setting):
    million: int = 1048576


SMOKE = Setting(**asdict(prefill.SMOKE), million=2048)


class Inputs(prefill.Inputs):
    """As there, but structured q and k come without a random q, to spare memory."""

    @cached_property
    def structured(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self.setting
        more = (s.head_dim, self.device, self.seed)
        v = common.random_qkv(self.tokens, 1, s.kv_heads, *more)[2]
        return (*common.structured_qk(self.tokens, s.heads, s.kv_heads, *more), v)


@dataclass
class Run:
    """What every case needs, and what the cases of one length leave for later ones."""

    setting: Setting
    device: torch.device
    timer: common.Timer
    repeats: int
    budget_ms: float
    inputs: Inputs
    reference: Tensor | None = None  # output of the first dense peer
    fa3_ms: float | None = None
    fa3: Callable[[], object] | None = None

    def time(self, call: Callable[[], object], most: int | None = None) -> Timing:
        most = self.repeats if most is None else min(most, self.repeats)
        return self.timer(call, budget_ms=self.budget_ms, least=min(3, most), most=most)


Measure = Callable[[Run], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    target: str
    tokens: int
    name: str
    measure: Measure
    bar: Bar | None = None


# --- measuring -------------------------------------------------------------------------------


def attention(
    build: Build, *, most: int | None = None, full: bool = False, in_turn: bool = False
) -> Measure:
    """A case of prefill_attention: checked, then timed. ``full``: all keys, as a dense peer;
    ``in_turn``: call by call with FlashAttention-3, where it is there."""

    def measure(run: Run) -> dict[str, Any]:
        prepared = build(run.inputs)
        out = prepared.call()
        if not all(head.isfinite().all() for head in out[0]):
            return {"error": "output not finite"}
        row: dict[str, Any] = {}
        if full and run.reference is not None:
            row["difference"] = prefill.relative_difference(out, run.reference)
        del out
        if not in_turn or run.fa3 is None:
            return row | attention_row(run, prepared, run.time(prepared.call, most))
        theirs, own = run.timer.in_turn(
            [run.fa3, prepared.call], budget_ms=run.budget_ms, most=run.repeats
        )
        return row | attention_row(run, prepared, own) | {"fa3_ms": theirs.ms, "in_turn": True}

    return measure


def attention_row(run: Run, prepared: Prepared, timing: Timing) -> dict[str, Any]:
    assert prepared.pairs is not None
    return {
        **common.timing_row(timing),
        "pairs": prepared.pairs,
        "density": prepared.density,
        "tflops": common.teraflops(prepared.pairs, run.setting.head_dim, timing.ms),
    }


def peer(name: str, build: Build) -> Measure:
    """A dense peer; one that cannot be imported or refuses the call is a row with the reason."""

    def measure(run: Run) -> dict[str, Any]:
        if name == FA3 and run.device.type != "cuda":
            return {"note": "missing: runs on CUDA only"}
        try:
            prepared = build(run.inputs)
            out = prepared.call()
        except ImportError as error:
            return {"note": f"missing: {str(error).splitlines()[0][:90]}"}
        except RuntimeError as error:
            return {"note": f"refused: {str(error).splitlines()[0][:90]}"}
        if run.reference is None:
            run.reference = out
        del out
        row = attention_row(run, prepared, run.time(prepared.call))
        if name == FA3:
            run.fa3_ms, run.fa3 = row["ms"], prepared.call
        return row

    return measure


def full_list(inputs: prefill.Inputs) -> Prepared:
    """All keys; counted as the dense peers are."""
    made = prefill.a_shape(0, inputs.tokens)(inputs)
    return Prepared(made.call, inputs.causal, 1.0)


def estimate_and_plan(run: Run) -> dict[str, Any]:
    """T5: the traced time, or where there is no trace the estimate's; beside it both by events."""
    q, k, v = run.inputs.structured
    columns, offsets = run.setting.sizes[0]
    pattern = [VerticalSlash(columns, offsets)] * run.setting.heads

    def whole() -> Tensor:
        return sparseattn.sparse_attention(q, k, v, pattern)

    def estimate() -> tuple[Tensor, Tensor]:
        return sparseattn.estimate_vertical_slash(q, k, num_columns=columns, num_offsets=offsets)

    lists = estimate()
    alone = run.time(estimate)
    both = run.time(whole)
    try:
        traced = trace_before_attention(whole, run.device, min(5, run.repeats))
    except RuntimeError as error:  # the tracer's: the call itself has just run
        traced = f"no device trace: {str(error).splitlines()[0][:90]}"
    given = run.time(lambda: sparseattn.vertical_slash_attention(q, k, v, *lists))
    timing, text = (alone, UNTRACED) if isinstance(traced, str) else (traced, TRACED)
    row = {
        **common.timing_row(timing),
        "ms_is": text,
        "estimate_ms": round(alone.ms, 4),
        "sparse_attention_ms": round(both.ms, 4),
        "vertical_slash_attention_ms": round(given.ms, 4),
        "difference_ms": round(both.ms - given.ms, 4),
        "difference_is": "sparse_attention less vertical_slash_attention on the lists that it "
        "finds: estimate and selection, without plan and packing; as noisy as the attention",
    }
    return row | ({"note": traced} if isinstance(traced, str) else {})


def memory(run: Run) -> dict[str, Any]:
    """T6: bytes of one call beside inputs and output, by torch's allocator: the larger of the
    estimate, which ends before there is an output, and the whole call beside its output."""
    q, k, v = run.inputs.structured
    columns, offsets = run.setting.sizes[0]
    pattern = [VerticalSlash(columns, offsets)] * run.setting.heads
    extra = extra_memory(run.device, lambda: sparseattn.sparse_attention(q, k, v, pattern))
    if extra is None:
        return {"note": "device memory is not counted on the CPU"}
    torch.cuda.reset_peak_memory_stats(run.device)
    before = torch.cuda.memory_allocated(run.device)
    sparseattn.estimate_vertical_slash(q, k, num_columns=columns, num_offsets=offsets)
    torch.cuda.synchronize(run.device)
    estimate = torch.cuda.max_memory_allocated(run.device) - before
    return {"extra_mib": max(extra, estimate) / 2**20, "estimate_mib": estimate / 2**20}


def million(run: Run) -> dict[str, Any]:
    """Two calls, both timed and their outputs compared."""
    q, k, v = run.inputs.structured
    pattern = VerticalSlash(*run.setting.sizes[0])
    patterns = [pattern] * run.setting.heads
    outs: list[Tensor] = []
    timing = run.timer(
        lambda: outs.append(sparseattn.sparse_attention(q, k, v, patterns)), warm_up=0, least=2
    )
    first, second = (out[0] for out in outs)
    finite = all(bool(head.isfinite().all()) for head in first)  # head by head to spare memory
    # Bits, as integers: with == -0 and 0 are equal and NaN differs from itself.
    equal = all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in zip(first, second, strict=True)
    )
    del first, second
    outs.clear()
    pairs = common.pattern_pairs(q, k, [pattern])[pattern].sum().item()
    prepared = Prepared(lambda: None, pairs, pairs / run.inputs.causal)
    row = attention_row(run, prepared, timing) | {
        "finite": finite,
        "bitwise_equal": equal,
        bars.SOUND: int(finite and equal),
    }
    if not (finite and equal):
        row["error"] = "outputs differ" if finite else "output not finite"
    return row


# --- cases -----------------------------------------------------------------------------------


def cases_of_length(setting: Setting, tokens: int, device: torch.device) -> Iterator[Case]:
    """The cases of one length, dense peers first, T4 right after FlashAttention-3."""
    for name, backend in SDPA_BACKENDS[device.type].items():
        name = f"dense, {name}"
        yield Case(DENSE, tokens, name, peer(name, prefill.dense_peer(backend)))
    yield Case(DENSE, tokens, FA3, peer(FA3, prefill.flash_attention_3))
    bar = Bar("times_faster_than_fa3", 0.95, "x FlashAttention-3")
    yield Case(
        "T4", tokens, "all keys (a_shape)", attention(full_list, full=True, in_turn=True), bar
    )
    for density in setting.densities:
        # Long rows are timed three times: each takes as long as dense attention or half of it.
        most = 3 if tokens >= 131072 and density >= 0.5 else None
        build = prefill.block_sparse(128, density=density)
        measure = attention(build, most=most, full=density == 1)
        name = f"block_sparse 128x128, {density:.0%}"
        yield Case("T1", tokens, name, measure, Bar("tflops", 560, "TFLOP/s"))
    bar = Bar("tflops", 480, "TFLOP/s") if tokens == bars.BAR_TOKENS else None
    measure = attention(prefill.block_sparse(64, per_row=setting.per_row))
    yield Case("T2", tokens, f"block_sparse 64x64, {setting.per_row} a row", measure, bar)
    for size in setting.sizes:
        measure = attention(prefill.vertical_slash(*size))
        name = f"vertical_slash {size}"
        yield Case(
            "T3", tokens, name, against_peers(measure, tokens, size), bars.peer_bar(tokens, size)
        )


def against_peers(measure: Measure, tokens: int, size: tuple[int, int]) -> Measure:
    """Adds the faster peer's time, where there is one."""
    times = bars.PEERS.get(tokens, {}).get(size)
    if times is None:
        return measure
    name = min(times, key=times.__getitem__)

    def with_peer(run: Run) -> dict[str, Any]:
        row = measure(run)
        if "ms" in row:
            row |= {"peer": name, "peer_ms": times[name]}
            row["times_faster_than_peer"] = times[name] / row["ms"]
        return row

    return with_peer


def estimate_case(setting: Setting, tokens: int) -> Case:
    limit = bars.ESTIMATE_BARS.get(tokens)
    bar = None if limit is None else Bar("ms", limit, "ms", at_least=False)
    name = f"estimate and plan, {setting.heads} x vertical_slash {setting.sizes[0]}"
    return Case("T5", tokens, name, estimate_and_plan, bar)


def cases(
    setting: Setting, lengths: Sequence[int], targets: Sequence[str], device: torch.device
) -> list[Case]:
    """The chosen cases, length by length; dense peers where a chosen target attends."""
    wanted = {*targets, *([DENSE] if {"T1", "T2", "T3", "T4"} & set(targets) else [])}
    found = []
    for tokens in lengths:
        found += [*cases_of_length(setting, tokens, device), estimate_case(setting, tokens)]
    tokens, size = setting.million, setting.sizes[0]
    if tokens not in lengths:
        found.append(estimate_case(setting, tokens))
    bar = Bar("extra_mib", 512, "MiB", at_least=False)
    name = f"sparse_attention, {setting.heads} x vertical_slash {size}"
    found.append(Case("T6", tokens, f"memory of {name}", memory, bar))
    bar = Bar(bars.SOUND, 1, "finite, twice bitwise equal")
    found.append(Case("million", tokens, name, million, bar))
    return [case for case in found if case.target in wanted]


def measure(
    setting: Setting, arguments: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All rows; ``save`` gets those there are after each."""
    device = common.device_of(arguments)
    timer = common.Timer(device)
    rows: list[dict[str, Any]] = []
    chosen = cases(setting, arguments.lengths, arguments.targets, device)
    run: Run | None = None
    with tqdm(total=len(chosen), unit="case", disable=None) as bar:
        for case in chosen:
            bar.set_description(f"{case.tokens} {case.name}")
            if run is None or run.inputs.tokens != case.tokens:
                run = None  # inputs of the last length go before those of the next are made
                free_memory(device)
                inputs = Inputs(setting, case.tokens, device, arguments.seed)
                run = Run(setting, device, timer, arguments.repeats, arguments.budget_ms, inputs)
                del inputs
            row: dict[str, Any] = {"target": case.target, "tokens": case.tokens, "case": case.name}
            try:
                row |= case.measure(run)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            free_memory(device)
            if run.fa3_ms is not None and "pairs" in row:
                row.setdefault("fa3_ms", run.fa3_ms)
                row["times_faster_than_fa3"] = row["fa3_ms"] / row["ms"]
            if case.bar is not None:
                row |= case.bar.fields(row)
            rows.append(row)
            save(rows)
            bar.update()
    return rows


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- output ----------------------------------------------------------------------------------


COLUMNS = (
    ("target", "target", ""),
    ("tokens", "tokens", "d"),
    ("case", "case", ""),
    ("ms", "ms", ".3f"),
    ("repeats", "n", "d"),
    ("density", "density", ".3f"),
    ("tflops", "TFLOP/s", ".0f"),
    ("times_faster_than_fa3", "x FA3", ".2f"),
    ("times_faster_than_peer", "x peer", ".2f"),
    ("extra_mib", "extra MiB", ".0f"),
    ("bar", "bar", ""),
    ("judgement", "met", ""),
    ("difference", "difference", ".1e"),
    ("remark", "note", ""),
)


def render(rows: list[dict[str, Any]]) -> str:
    words = {True: "yes", False: "NO", None: "not judged"}
    shown = []
    for row in rows:
        remark = row.get("error", row.get("note"))
        judgement = words[row["met"]] if "bar" in row else None
        shown.append({**row, "judgement": judgement, "remark": remark})
    return common.format_table(shown, COLUMNS)


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, multiples of 128")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        metavar="TARGET",
        help=f"of {', '.join(TARGETS)}; with fewer no file without --output",
    )
    parser.add_argument("--repeats", type=int, default=20, help="at most (default: %(default)s)")
    parser.add_argument("--budget-ms", type=float, default=1000.0, help="timed span of a case")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    setting = SMOKE if arguments.smoke else Setting()
    arguments.lengths = list(dict.fromkeys(arguments.lengths or setting.lengths))
    for tokens in arguments.lengths:
        if tokens < 512 or tokens % 128:
            parser.error(f"--lengths: expected multiples of 128 >= 512, got {tokens}")
    if arguments.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {arguments.repeats}")
    if arguments.smoke:
        arguments.budget_ms = min(arguments.budget_ms, 20.0)
    common.require_device(parser, arguments)
    return arguments, setting


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where an output was not what it must be. A missed bar is a result, not a failure."""
    arguments, setting = parse_arguments(argv)
    facts = common.machine(common.device_of(arguments), arguments.commit)
    partial = set(arguments.targets) != set(TARGETS) or arguments.lengths != list(setting.lengths)
    record = common.GrowingRecord(
        BENCHMARK,
        facts,
        arguments,
        lambda rows: {"summary": bars.summary(rows)},
        partial=partial,
        heads=setting.heads,
        kv_heads=setting.kv_heads,
        head_dim=setting.head_dim,
        dtype="bfloat16",
        fa3_module=prefill.fa3_module(),
        peers=bars.peers_facts(facts),
    )
    rows = measure(setting, arguments, record.save)
    record.finish(rows)
    print(common.machine_line(facts))
    print(
        f"1 layer, {setting.heads} query heads, {setting.kv_heads} kv heads, "
        f"D={setting.head_dim}, bf16, median of n whole operator calls"
    )
    print(render(rows))
    found = bars.summary(rows)
    print(f"{found['met']} of {found['bars']} bars met. {bars.peers_facts(facts)['note']}.")
    record.say_where()
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
