"""One layer of a ShadowKV decode step, by part and whole, against dense attention (T9 and T11).

bf16, one query token a sequence, the shapes of Llama-3.1-8B and GLM-4-9B-1M, 60K, 122K and 244K
tokens with the published budgets, chunk 8, rank 160, 48 outlier chunks. `decode_inputs.py` makes
the data. A given share of the selected chunks (`--hits`) is in a slot whenever a step starts: the
tables are restored before every call, outside the timed span, and the L2 cache is flushed then.

Parts: select, plan, gather, attention (keys are rebuilt in it), lowrank_reconstruct alone. Steps:
"host" and "device" plan and gather from a store in pinned memory or on the device, as ShadowKVCache
does; "direct" attends to a store on the device as it is, with nothing to plan or gather. Dense: all
keys and values, SDPA by backend with grouped heads and with the heads of a group as query rows
("rows"), and FlashAttention-3 with splits where it can be imported. All of it eager, where what
Python takes to submit counts once it is longer than the flush, and as a CUDA graph ("graph").

Traffic is what must move at least; the floor is that over 4.3 TB/s of device memory and 55 GB/s of
PCIe (an H200), both at once. The record is written after every case.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import bars
import common
import decode_inputs as inputs
import torch
from bars import Bar
from decode_inputs import LLAMA, HostMemory, Layer, Setting, Shape, free_memory
from prefill_attention import fa3_module, relative_difference
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from sparseattn import shadow
from sparseattn.bench_tools import SDPA_BACKENDS

BENCHMARK = "decode-step"
BAR_TOKENS = 124928
STEP_BARS = {"host": 0.20, "device": 0.12, "direct": 0.12}  # ms, T9
COMPRESSION_BAR = 16.0  # ms, T11
SPLITS = (0, 16, 32)  # of FlashAttention-3; 0: its own choice

Row = dict[str, Any]
Call = Callable[[], object]


@dataclass
class Run:
    setting: Setting
    device: torch.device
    timer: common.Timer
    repeats: int
    budget_ms: float
    memory: HostMemory

    def rows(
        self, name: str, call: Call, before: Call | None = None, *, graph: bool = True
    ) -> Iterator[Row]:
        """An eager row and one of a CUDA graph; a peer that refuses is a row with the reason."""
        try:
            first = call()
        except torch.OutOfMemoryError:
            raise
        except (ImportError, TypeError, RuntimeError) as error:
            if not name.startswith("dense"):
                raise
            yield {"case": name, "mode": "eager", "note": f"refused: {_line(error)}"}
            return
        yield {"case": name, "mode": "eager"} | self._time(call, before) | _check(first)
        if self.device.type != "cuda" or not graph:
            return
        row: Row = {"case": name, "mode": "graph"}
        try:
            replay, out = self._capture(call, before)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            yield row | {"note": f"not captured: {_line(error)}"}
            return
        row |= self._time(replay, before)
        if isinstance(first, Tensor) and isinstance(out, Tensor):
            if before is not None:
                before()
            replay()
            row["equal_to_eager"] = torch.equal(first, out)
        yield row

    def _time(self, call: Call, before: Call | None) -> Row:
        most = self.repeats
        timing = self.timer(
            call, budget_ms=self.budget_ms, least=min(3, most), most=most, before=before
        )
        return common.timing_row(timing)

    def _capture(self, call: Call, before: Call | None) -> tuple[Call, object]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                if before is not None:
                    before()
                call()
        current.wait_stream(side)
        if before is not None:
            before()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        return graph.replay, out


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _check(out: object) -> Row:
    if isinstance(out, Tensor) and out.is_floating_point() and not out.isfinite().all():
        return {"error": "output not finite"}
    return {}


# --- what is measured ------------------------------------------------------------------------


def dense_calls(layer: Layer) -> Iterator[tuple[str, Call]]:
    """A decode step over all keys. Without a mask: one query row sees them all."""
    q, k, v = layer.q, layer.k, layer.v
    folded = q.view(layer.batch, layer.shape.kv_heads, -1, q.shape[3])

    def attend(rows: Tensor, backend: Any, gqa: bool) -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(rows, k, v, enable_gqa=gqa)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(rows, k, v, enable_gqa=gqa)

    for name, backend in SDPA_BACKENDS[layer.device.type].items():
        yield f"dense, {name}", partial(attend, q, backend, True)
        yield f"dense, {name}, rows", partial(attend, folded, backend, False)
    for splits in SPLITS if fa3_module() else ():
        yield f"dense, FlashAttention-3, splits {splits}", partial(flash_attention_3, layer, splits)


def flash_attention_3(layer: Layer, splits: int) -> Tensor:
    name = fa3_module()
    if name is None:
        raise ImportError("FlashAttention-3 is missing")
    attend = importlib.import_module(name).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in (layer.q, layer.k, layer.v))
    out = attend(q, k, v, causal=False, num_splits=splits)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def differs(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, of the worst head of any sequence."""
    return relative_difference(out.flatten(0, 1)[None], expected.flatten(0, 1)[None])


def dense_rows(run: Run, layer: Layer) -> Iterator[Row]:
    reference: Tensor | None = None
    for name, call in dense_calls(layer):
        for row in run.rows(name, call):
            if "ms" in row and row["mode"] == "eager":
                out = call()
                assert isinstance(out, Tensor)
                out = out.reshape(layer.q.shape)
                if reference is None:
                    reference = out
                else:
                    row["difference"] = differs(out, reference)
            yield row | {"traffic": "dense"}


def shadow_rows(run: Run, layer: Layer, stores: Sequence[str]) -> Iterator[Row]:
    """Parts and steps; the outputs of all steps must be those of the direct one."""
    facts = {"hit_rate": round(layer.hit_rate, 4)}
    parts: list[tuple[str, Call, Call | None]] = [
        ("select", layer.select, None),
        ("plan", layer.plan, layer.restore),
        ("attention", lambda: layer.attend(layer.selected, layer.slot_of, layer.slots), None),
        ("reconstruct", layer.reconstruct, None),
    ]
    tensors = {"device": layer.store}
    if "host" in stores:
        try:
            layer.copy_store(run.memory)
            tensors["host"] = layer.host_store
        except MemoryError as error:
            yield {"case": "step, host", "mode": "eager", "note": f"skipped: {error}"}
    for store, tensor in tensors.items():
        parts.append((f"gather, {store}", partial(layer.gather, tensor), None))
    for name, call, before in parts:
        for row in run.rows(name, call, before):
            yield row | facts | {"traffic": name}
    expected = layer.direct_step()
    for row in run.rows("step, direct", layer.direct_step):
        yield row | {"traffic": "step, direct"}
    for store, tensor in tensors.items():
        name = f"step, {store}"
        layer.fill_slots()
        difference = differs(layer.step(tensor), expected)
        wrong = {} if difference < 1e-2 else {"error": "output is not that of the direct step"}
        for row in run.rows(name, partial(layer.step, tensor), layer.restore):
            yield row | facts | {"traffic": name, "difference": difference} | wrong


def compression_rows(run: Run, shape: Shape, tokens: int, seed: int) -> Iterator[Row]:
    """T11: keys of one sequence to basis, factor and landmarks, from nothing; eager, as `eigh`
    waits for the host."""
    setting, device = run.setting, run.device
    heads, dim = shape.kv_heads, shape.head_dim
    width = heads * dim
    generator = torch.Generator(device).manual_seed(seed)
    empty = torch.empty(1, heads, tokens, dim, dtype=inputs.DTYPE, device=device)
    k = empty.normal_(generator=generator)
    wide = {"dtype": torch.float64, "device": device}
    gram, total = torch.zeros(1, width, width, **wide), torch.zeros(1, width, **wide)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    factor = torch.empty(1, tokens, setting.rank, dtype=k.dtype, device=device)
    landmarks = torch.empty(1, heads, tokens // setting.chunk, dim, dtype=k.dtype, device=device)
    cosine = torch.empty(*landmarks.shape[:3], dtype=torch.float32, device=device)

    def sums() -> None:
        for x in (gram, total, count):
            x.zero_()
        shadow.shadow_gram_(k, gram, total, count)

    def basis() -> tuple[Tensor, Tensor]:
        return shadow.shadow_basis(
            gram, total, count, rank=setting.rank, kv_heads=heads, dtype=k.dtype
        )

    def marks() -> None:
        shadow.shadow_landmarks_(k, landmarks, cosine, chunk=setting.chunk)

    def whole() -> Tensor:
        sums()
        shadow.shadow_project(k, *basis(), out=factor)
        marks()
        return factor

    def outliers() -> Tensor:
        return shadow.shadow_outliers(cosine, count=setting.outliers, sink_chunks=setting.sinks)

    flat = torch.empty(1, tokens, heads, dim, dtype=k.dtype, device=device)
    inv_freq = 1e4 ** -(torch.arange(0, dim, 2, device=device) / dim)
    sums()
    found = basis()
    cases: list[tuple[str, Call]] = [
        (
            "compress: undo RoPE (not in the whole)",
            lambda: shadow.shadow_undo_rope_(k, flat, inv_freq, found[1]),
        ),
        ("compress: gram", sums),
        ("compress: basis (eigh)", basis),
        ("compress: project", lambda: shadow.shadow_project(k, *found, out=factor)),
        ("compress: landmarks", marks),
        ("compress: outliers (not in the whole)", outliers),
        ("compress, whole", whole),
    ]
    for name, call in cases:
        yield from run.rows(name, call, graph=False)


def case_rows(
    run: Run, shape: Shape, tokens: int, batch: int, arguments: argparse.Namespace
) -> Iterator[Row]:
    """All rows of one shape, length and batch."""
    needed = inputs.device_bytes(shape, run.setting, tokens, batch)
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.device)[0]
        if needed > free:
            text = f"skipped: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} free"
            yield {"case": "all", "mode": "eager", "note": text}
            return
    layer = Layer(
        shape, run.setting, tokens, batch, run.device, seed=arguments.seed, hits=arguments.hits
    )
    moved = inputs.traffic(shape, run.setting, tokens, batch, layer.hit_rate)
    dense: dict[str, float] = {}
    rows = []
    for row in (*dense_rows(run, layer), *shadow_rows(run, layer, arguments.stores)):
        part = moved.get(row.pop("traffic", ""))
        if part is not None:
            row |= {
                "device_mb": part.device / 1e6,
                "pcie_mb": part.pcie / 1e6,
                "floor_ms": part.floor_ms,
            }
        if "ms" in row and row["case"].startswith("dense"):
            mode = row["mode"]
            dense[mode] = min(row["ms"], dense.get(mode, row["ms"]))
        rows.append(row)
    for row in rows:
        if row["case"].startswith("step") and "ms" in row and row["mode"] in dense:
            row["dense_ms"] = dense[row["mode"]]
            row["times_faster_than_dense"] = dense[row["mode"]] / row["ms"]
    yield from rows


def measure(
    setting: Setting, arguments: argparse.Namespace, save: Callable[[list[Row]], None]
) -> list[Row]:
    device = common.device_of(arguments)
    memory = HostMemory(device)
    run = Run(setting, device, common.Timer(device), arguments.repeats, arguments.budget_ms, memory)
    shapes = [shape for shape in setting.shapes if shape.name in arguments.shapes]
    # The largest batch first: pinned memory is then taken once.
    cases: list[tuple[Shape, int, int | None]] = [
        (shape, tokens, batch)
        for shape in shapes
        for tokens in sorted(arguments.lengths, reverse=True)
        for batch in sorted(arguments.batches, reverse=True)
    ]
    cases += [(shape, tokens, None) for shape in shapes for tokens in arguments.lengths]
    rows: list[Row] = []
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for shape, tokens, batch in cases:
            bar.set_description(f"{shape.name} {tokens} x {batch}")
            base = {"shape": shape.name, "tokens": tokens, "batch": batch or 1}
            try:
                if batch is None:
                    new = compression_rows(run, shape, tokens, arguments.seed)
                else:
                    new = case_rows(run, shape, tokens, batch, arguments)
                rows += [base | row for row in new]
            except torch.OutOfMemoryError:
                rows.append(base | {"case": "all", "mode": "eager", "note": "out of memory"})
            free_memory(device)
            save(rows)
            bar.update()
    memory.free()
    return rows


# --- bars and output -------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Row]:
    """T9 and T11 on Llama's shape, and "not slower than dense" on both, at 122K and batch 1."""
    judged = []
    for row in rows:
        if row["tokens"] != BAR_TOKENS or row["batch"] != 1:
            continue
        found: list[tuple[str, Bar]] = []
        kind, _, store = row["case"].partition(", ")
        if kind == "step":
            if row["shape"] == LLAMA.name:
                found.append(("T9", Bar("ms", STEP_BARS[store], "ms", at_least=False)))
            if store != "host":
                found.append(("dense", Bar("times_faster_than_dense", 1, "x dense")))
        elif row["case"] == "compress, whole" and row["shape"] == LLAMA.name:
            found.append(("T11", Bar("ms", COMPRESSION_BAR, "ms", at_least=False)))
        for target, bar in found:
            case = f"{row['shape']}, {row['case']}, {row['mode']}"
            judged.append(
                {
                    "target": target,
                    "tokens": row["tokens"],
                    "case": case,
                    "value": row.get(bar.field),
                    **bar.fields(row),
                }
            )
    return judged


PARTS = ("select", "plan", "gather, host", "gather, device", "attention", "reconstruct")
STEPS = ("step, host", "step, device", "step, direct")


def render(rows: list[Row]) -> str:
    """A line for each shape, length and batch, of graphs where there are any; times in ms."""
    columns = [("shape", "shape", ""), ("tokens", "tokens", "d"), ("batch", "batch", "d")]
    columns += [("mode", "mode", "")]
    columns += [(name, name, ".4f") for name in (*PARTS, *STEPS, "dense")]
    columns += [("floor", "floor, host", ".4f"), ("ratio", "dense/direct", ".2f")]
    columns += [("host_ratio", "dense/host", ".2f")]
    lines: dict[tuple[Any, ...], Row] = {}
    notes = []
    shown = "graph" if any(row["mode"] == "graph" for row in rows) else "eager"
    for row in rows:
        where = f"{row['shape']} {row['tokens']} x {row['batch']} {row['case']}, {row['mode']}"
        if "error" in row:
            notes.append(f"{where}: ERROR {row['error']}")
        if row.get("equal_to_eager") is False:
            notes.append(f"{where}: the graph's output is not bitwise the eager one")
        if row["case"].startswith("compress"):
            notes.append(f"{where}: {row['ms']:.3f} ms")
            continue
        if "ms" not in row:
            peer = row["case"].startswith("dense")
            notes.append(f"{row['case'] if peer else where}: {row['note']}")
            continue
        if row["mode"] != shown:
            continue
        base = {name: row[name] for name in ("shape", "tokens", "batch", "mode")}
        line = lines.setdefault(tuple(base.values()), base)
        line[row["case"]] = row["ms"]
        if row["case"] == "step, direct":
            line["ratio"], line["dense"] = row.get("times_faster_than_dense"), row.get("dense_ms")
        elif row["case"] == "step, host":
            line["host_ratio"], line["floor"] = row.get("times_faster_than_dense"), row["floor_ms"]
    text = common.format_table(list(lines.values()), columns)
    return "\n".join([text, *dict.fromkeys(notes)])


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [shape.name for shape in Setting.shapes]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, multiples of the chunk")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences")
    parser.add_argument("--hits", type=float, default=0.35, help="share of the chunks in a slot")
    stores = ["device", "host"]
    parser.add_argument(
        "--stores", nargs="+", choices=stores, default=stores, help="without host nothing is pinned"
    )
    parser.add_argument("--repeats", type=int, default=20, help="at most (default: %(default)s)")
    parser.add_argument("--budget-ms", type=float, default=200.0, help="timed span of a case")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    setting = inputs.SMOKE if arguments.smoke else Setting()
    arguments.lengths = list(dict.fromkeys(arguments.lengths or setting.lengths))
    arguments.batches = list(dict.fromkeys(arguments.batches or setting.batches))
    for tokens in arguments.lengths:
        least = 4 * setting.top_k(tokens) * setting.chunk
        if tokens < least or tokens % setting.chunk:
            parser.error(
                f"--lengths: expected multiples of {setting.chunk} >= {least}, got {tokens}"
            )
    for name in ("batches", "repeats"):
        value = getattr(arguments, name)
        smallest = value if name == "repeats" else min(value)
        if smallest < 1:
            parser.error(f"--{name}: expected at least 1, got {smallest}")
    if not 0 <= arguments.hits <= 1:
        parser.error(f"--hits: expected 0 to 1, got {arguments.hits}")
    if arguments.smoke:
        arguments.budget_ms = min(arguments.budget_ms, 10.0)
    common.require_device(parser, arguments)
    return arguments, setting


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where an output was not what it must be. A missed bar is a result, not a failure."""
    arguments, setting = parse_arguments(argv)
    facts = common.machine(common.device_of(arguments), arguments.commit)
    names = [shape.name for shape in setting.shapes]
    whole = (names, setting.lengths, list(setting.batches))
    partial_run = (arguments.shapes, arguments.lengths, arguments.batches) != whole
    record = common.GrowingRecord(
        BENCHMARK,
        facts,
        arguments,
        lambda rows: {"summary": bars.summary(judge(rows)), "judged": judge(rows)},
        partial=partial_run,
        dtype="bfloat16",
        rank=setting.rank,
        chunk=setting.chunk,
        budgets={str(tokens): budget for tokens, budget in setting.budgets},
        outlier_chunks=setting.outliers,
        exact_tokens=setting.exact,
        device_rate=inputs.DEVICE_RATE,
        pcie_rate=inputs.PCIE_RATE,
        fa3_module=fa3_module(),
    )
    rows = measure(setting, arguments, record.save)
    record.finish(rows)
    print(common.machine_line(facts))
    print(f"1 layer, bf16, rank {setting.rank}, chunk {setting.chunk}, {arguments.hits:.0%} hits")
    print(render(rows))
    judged = judge(rows)
    columns = [("target", "target", ""), ("case", "case", ""), ("value", "value", ".4f")]
    print(common.format_table(judged, [*columns, ("bar", "bar", ""), ("met", "met", "")]))
    found = bars.summary(judged)
    print(f"{found['met']} of {found['bars']} bars met.")
    record.say_where()
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
