"""fp8 values and factors of ShadowKVCache: the error of a step's attention, its time and bytes.

One layer of `decode_inputs.py`, bf16, one query token a sequence. "values": the store is e4m3 with
a scale for each chunk and head, and chunks are widened on their way into slots; "factor": its rows
are e4m3 with a scale for each token; "both". `error` is the norm of the difference from the step
without fp8 over the norm of that, of the worst head of any sequence; chunks are selected alike, as
landmarks stay bf16. Random data have flat attention: an error of 2 to 3 % is that of the numbers.

Times: gather from pinned memory and from the device, attention, both steps, with the share `--hits`
of the selected chunks in a slot, eager and as a CUDA graph. `store_bytes` and `factor_bytes` are of
the whole layer, scales included; `gather_bytes` are read from the store in a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import common
import decode_inputs as inputs
import torch
from decode_inputs import HostMemory, Layer, Setting, free_memory
from decode_step import Run, differs
from torch import Tensor
from tqdm import tqdm

from sparseattn import host_memory, shadow

BENCHMARK = "decode-fp8"
KINDS = {"none": (False, False), "values": (True, False), "factor": (False, True)}
KINDS["both"] = (True, True)
FP8 = torch.float8_e4m3fn

Row = dict[str, Any]


def quantised(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows [B, H, n, D], side by side in rows of ``width``: e4m3, and scales [B, H, rows]."""
    rows = x.shape[2] * x.shape[3] // width
    store = torch.empty(*x.shape[:2], rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(*x.shape[:2], rows, device=x.device)
    shadow.store_rows_(x, store, scale)
    return store, scale


class Kind:
    """A layer's step with what is quantised."""

    def __init__(self, layer: Layer, values: bool, factor: bool, host: bool) -> None:
        self.layer = layer
        self.stores = {"device": layer.store}
        self.scale: Tensor | None = None
        self.factor, self.factor_scale = layer.factor, None
        self.memory: host_memory.HostMemory | None = None
        if host:
            self.stores["host"] = layer.host_store
        if values:
            store, self.scale = quantised(layer.v, layer.store.shape[3])
            self.stores["device"] = store
            if host:
                self.memory = host_memory.HostMemory(store.nbytes, layer.device)
                data = self.memory.tensor(store.shape, FP8)
                self.stores["host"] = data.copy_(store)
        if factor:
            rows, scale = quantised(layer.factor[:, None], layer.factor.shape[2])
            self.factor, self.factor_scale = rows[:, 0], scale[:, 0]

    def free(self) -> None:
        if self.memory is not None:
            self.memory.free()

    def gather(self, store: Tensor) -> None:
        layer = self.layer
        shadow.gather_values_(
            store, layer.slots, layer.misses, layer.miss_count, store_scale=self.scale
        )

    def attend(self, selected: Tensor, slot_of: Tensor) -> Tensor:
        layer = self.layer
        return shadow.shadow_attention(
            layer.q,
            layer.exact_k,
            layer.exact_v,
            selected,
            slot_of,
            layer.slots,
            self.factor,
            layer.basis,
            layer.mean,
            layer.inv_freq,
            interleaved=layer.shape.interleaved,
            factor_scale=self.factor_scale,
        )

    def step(self, store: Tensor) -> Tensor:
        layer = self.layer
        selected = layer.select()
        slot_of, misses, count = shadow.shadow_plan_(selected, layer.slot_chunk, layer.last_used)
        shadow.gather_values_(store, layer.slots, misses, count, store_scale=self.scale)
        return self.attend(selected, slot_of)

    def fill_slots(self) -> None:
        """As Layer.fill_slots, from this kind's store."""
        layer = self.layer
        layer.restore()
        chunks = layer.slot_chunk
        places = torch.arange(chunks.shape[2], dtype=torch.int32, device=layer.device)
        pairs = torch.stack((places.expand_as(chunks), chunks), dim=-1)
        count = torch.full_like(layer.miss_count, chunks.shape[2])
        shadow.gather_values_(
            self.stores["device"], layer.slots.zero_(), pairs, count, store_scale=self.scale
        )

    def bytes(self) -> Row:
        def size(rows: Tensor, scale: Tensor | None) -> int:
            return rows.nbytes + (0 if scale is None else scale.nbytes)

        store = self.stores["device"]
        misses = int(self.layer.miss_count.sum())
        return {
            "store_bytes": size(store, self.scale),
            "factor_bytes": size(self.factor, self.factor_scale),
            "gather_bytes": misses * store.shape[3] * store.element_size(),
        }


def layer_rows(run: Run, layer: Layer, host: bool) -> Iterator[Row]:
    if host:
        layer.copy_store(run.memory)
    expected: Tensor | None = None
    for name, (values, factor) in KINDS.items():
        kind = Kind(layer, values, factor, host)
        kind.fill_slots()
        out = kind.step(kind.stores["device"])
        expected = out if expected is None else expected
        facts = {"kind": name, "error": differs(out, expected)} | kind.bytes()
        layer.selected = layer.select()
        layer.restore()
        slot_of = layer.plan()[0]
        attend = partial(kind.attend, layer.selected, slot_of)
        cases: list[tuple[str, Callable[[], object], Callable[[], object] | None]] = []
        for place, store in kind.stores.items():
            cases.append((f"gather, {place}", partial(kind.gather, store), None))
            cases.append((f"step, {place}", partial(kind.step, store), layer.restore))
        for case, call, before in (*cases, ("attention", attend, None)):
            for row in run.rows(case, call, before):
                bad = row.pop("error", None)
                yield facts | row | ({} if bad is None else {"wrong": bad})
        kind.free()


def measure(
    setting: Setting, arguments: argparse.Namespace, save: Callable[[list[Row]], None]
) -> list[Row]:
    device = common.device_of(arguments)
    memory = HostMemory(device)
    run = Run(setting, device, common.Timer(device), arguments.repeats, arguments.budget_ms, memory)
    rows: list[Row] = []
    cases = [
        (s, n, b) for s in setting.shapes for n in arguments.lengths for b in arguments.batches
    ]
    for shape, tokens, batch in tqdm(cases, unit="case", disable=None):
        layer = Layer(
            shape, setting, tokens, batch, device, seed=arguments.seed, hits=arguments.hits
        )
        base = {"shape": shape.name, "tokens": tokens, "batch": batch}
        rows += [base | row for row in layer_rows(run, layer, not arguments.no_host)]
        del layer
        free_memory(device)
        save(rows)
    memory.free()
    return rows


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (default: the middle one)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hits", type=float, default=0.35, help="share of the chunks in a slot")
    parser.add_argument("--no-host", action="store_true", help="pin nothing")
    parser.add_argument("--repeats", type=int, default=20, help="at most (default: %(default)s)")
    parser.add_argument("--budget-ms", type=float, default=200.0, help="timed span of a case")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    setting = inputs.SMOKE if arguments.smoke else Setting()
    arguments.lengths = arguments.lengths or [setting.lengths[len(setting.lengths) // 2]]
    if arguments.smoke:
        arguments.budget_ms = min(arguments.budget_ms, 10.0)
    common.require_device(parser, arguments)
    return arguments, setting


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where an output was not finite."""
    arguments, setting = parse_arguments(argv)
    facts = common.machine(common.device_of(arguments), arguments.commit)
    record = common.GrowingRecord(
        BENCHMARK, facts, arguments, lambda _: {}, partial=False, dtype="bfloat16",
        rank=setting.rank, chunk=setting.chunk,
    )  # fmt: skip
    rows = measure(setting, arguments, record.save)
    record.finish(rows)
    print(common.machine_line(facts))
    columns = [("shape", "shape", ""), ("tokens", "tokens", "d"), ("batch", "batch", "d")]
    columns += [("kind", "kind", ""), ("case", "case", ""), ("mode", "mode", "")]
    columns += [("ms", "ms", ".4f"), ("error", "error", ".4f")]
    columns += [(f"{x}_bytes", f"{x} bytes", "d") for x in ("store", "factor", "gather")]
    print(common.format_table(rows, columns))
    record.say_where()
    return int(any("wrong" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
