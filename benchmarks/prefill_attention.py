"""Prefill attention of one layer on the GPU: every pattern against dense attention (target T8).

bf16, batch 1, 32 query heads, 8 key/value heads, D = 128, 32K and 128K tokens. Every time is the
whole operator call: plan, packing of columns and attention, and for `sparse_attention` the estimate
too. Attention times do not depend on the values, so the operators with given indexes run on normal
noise; the estimates run on data whose mass lies on clustered offsets and few columns
(`structured_qk` in sparseattn.bench_inputs says how), and their density is what they chose there.

Operations are 4 * D a selected pair: dense counts half the square, block-sparse whole selected
blocks, vertical-slash 64-wide tiles of covered keys plus columns outside the cover, a-shape the
visible pairs. Density is pairs over those of dense (block-sparse: blocks over causal blocks), so it
passes 1 where nearly everything is selected. `difference` compares a full list with the first dense
peer: norm of the difference over the norm, worst head.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from tqdm import tqdm

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, Pattern, PatternConfig, VerticalSlash
from sparseattn.bench_tools import SDPA_BACKENDS, sdpa

PRESET, PRESET_LAYER = "gradientai/Llama-3-8B-Instruct-262k", 16


@dataclass(frozen=True)
class Setting:
    """Shapes and sizes of a run; a smoke run has the same cases at toy sizes."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    lengths: tuple[int, ...] = (32768, 131072)
    per_row: int = 100
    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    sizes: tuple[tuple[int, int], ...] = ((1000, 6096), (512, 2048), (30, 800), (3500, 100))
    a_shape: tuple[int, int] = (1024, 4096)


SMOKE = Setting(
    heads=4,
    kv_heads=2,
    head_dim=64,
    lengths=(512, 1024),
    per_row=3,
    densities=(0.2, 1.0),
    sizes=((60, 200), (30, 100)),
    a_shape=(64, 128),
)


@dataclass(frozen=True)
class Prepared:
    """A case ready to run; ``pairs`` are of all heads, None where nothing is attended."""

    call: Callable[[], Any]
    pairs: float | None = None
    density: float | None = None


class Inputs:
    """Inputs of one length, made when a case first needs them."""

    def __init__(self, setting: Setting, tokens: int, device: torch.device, seed: int) -> None:
        self.setting, self.tokens, self.device, self.seed = setting, tokens, device, seed
        self._shape = (tokens, setting.heads, setting.kv_heads, setting.head_dim, device, seed)

    @cached_property
    def random(self) -> tuple[Tensor, Tensor, Tensor]:
        return common.random_qkv(*self._shape)

    @cached_property
    def structured(self) -> tuple[Tensor, Tensor, Tensor]:
        return (*common.structured_qk(*self._shape), self.random[2])

    @property
    def causal(self) -> float:
        return self.setting.heads * common.dense_pairs(self.tokens)


Build = Callable[[Inputs], Prepared]


def dense_peer(backend: SDPBackend | None) -> Build:
    def build(inputs: Inputs) -> Prepared:
        return Prepared(partial(sdpa, *inputs.random, backend), inputs.causal, 1.0)

    return build


def fa3_module() -> str | None:
    """The module that offers FlashAttention-3 here, by name: a forward-only build or the whole."""
    names = ("fa3_fwd_interface", "flash_attn_interface")
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def flash_attention_3(inputs: Inputs) -> Prepared:
    name = fa3_module()
    if name is None:
        raise ImportError("neither fa3_fwd_interface nor flash_attn_interface can be imported")
    attend = importlib.import_module(name).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in inputs.random)

    def call() -> Tensor:
        out = attend(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Prepared(call, inputs.causal, 1.0)


def full_list(inputs: Inputs) -> Prepared:
    q, k, v = inputs.random
    patterns = [Dense()] * inputs.setting.heads
    return Prepared(lambda: sparseattn.sparse_attention(q, k, v, patterns), inputs.causal, 1.0)


def block_sparse(block: int, *, density: float = 1.0, per_row: int | None = None) -> Build:
    def build(inputs: Inputs) -> Prepared:
        q, k, v = inputs.random
        mask = common.random_block_mask(
            inputs.tokens,
            inputs.setting.heads,
            block,
            inputs.device,
            density=density,
            per_row=per_row,
            seed=inputs.seed,
        )
        pairs = common.block_pairs(mask, block, block).sum().item()
        n = inputs.tokens // block
        causal_blocks = inputs.setting.heads * n * (n + 1) // 2
        return Prepared(
            lambda: sparseattn.block_sparse_attention(q, k, v, mask, block_q=block, block_kv=block),
            pairs,
            pairs / (causal_blocks * block * block),
        )

    return build


def vertical_slash(columns: int, offsets: int) -> Build:
    def build(inputs: Inputs) -> Prepared:
        q, k, v = inputs.random
        lists = common.clustered_indexes(
            inputs.tokens, columns, offsets, inputs.setting.heads, inputs.seed
        )
        c, o = (x.to(inputs.device) for x in lists)
        pairs = common.vertical_slash_pairs(c, o, inputs.tokens).sum().item()
        return Prepared(
            lambda: sparseattn.vertical_slash_attention(q, k, v, c, o),
            pairs,
            pairs / inputs.causal,
        )

    return build


def a_shape(sink: int, window: int) -> Build:
    def build(inputs: Inputs) -> Prepared:
        q, k, v = inputs.random
        pairs = inputs.setting.heads * common.a_shape_pairs(inputs.tokens, sink, window)
        return Prepared(
            lambda: sparseattn.a_shape_attention(q, k, v, sink=sink, window=window),
            pairs,
            pairs / inputs.causal,
        )

    return build


def mixed(patterns: list[Pattern]) -> Build:
    def build(inputs: Inputs) -> Prepared:
        q, k, v = inputs.structured
        counts = common.pattern_pairs(q, k, patterns)
        pairs = sum(counts[p][head].item() for head, p in enumerate(patterns))
        return Prepared(
            lambda: sparseattn.sparse_attention(q, k, v, patterns), pairs, pairs / inputs.causal
        )

    return build


def estimate_slash(columns: int, offsets: int) -> Build:
    def build(inputs: Inputs) -> Prepared:
        q, k, _ = inputs.structured
        return Prepared(
            lambda: sparseattn.estimate_vertical_slash(
                q, k, num_columns=columns, num_offsets=offsets
            )
        )

    return build


def estimate_blocks(top_k: int) -> Build:
    def build(inputs: Inputs) -> Prepared:
        q, k, _ = inputs.structured
        return Prepared(lambda: sparseattn.estimate_block_sparse(q, k, top_k=top_k))

    return build


def cases(setting: Setting, device: torch.device) -> Iterator[tuple[str, Build]]:
    """Name and builder of every case, in the order of the table."""
    for name, backend in SDPA_BACKENDS[device.type].items():
        yield f"dense, {name}", dense_peer(backend)
    if device.type == "cuda" and fa3_module() is not None:
        yield "dense, FlashAttention-3", flash_attention_3
    yield "dense list", full_list
    yield f"block_sparse 64x64, {setting.per_row} a row", block_sparse(64, per_row=setting.per_row)
    for density in setting.densities:
        yield f"block_sparse 128x128, {density:.0%}", block_sparse(128, density=density)
    for columns, offsets in setting.sizes:
        yield f"vertical_slash ({columns}, {offsets})", vertical_slash(columns, offsets)
    yield "a_shape ({}, {})".format(*setting.a_shape), a_shape(*setting.a_shape)

    columns, offsets = setting.sizes[0]
    name = f"vertical_slash ({columns}, {offsets})"
    yield f"estimate {name}", estimate_slash(columns, offsets)
    yield f"estimate block_sparse ({setting.per_row})", estimate_blocks(setting.per_row)
    slash = VerticalSlash(columns, offsets)
    yield f"sparse_attention, all {name}", mixed([slash] * setting.heads)
    layer = PatternConfig.load(PRESET).layers[PRESET_LAYER][: setting.heads]
    yield f"sparse_attention, Llama-3-8B layer {PRESET_LAYER}", mixed(list(layer))
    four = [slash, slash, BlockSparse(setting.per_row), AShape(*setting.a_shape)]
    yield "sparse_attention, 2:1:1 of 3 kinds", mixed(four * (setting.heads // 4))


def relative_difference(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, head by head to spare memory; the largest."""
    worst = 0.0
    for head in range(out.shape[1]):
        a, b = out[0, head].double(), expected[0, head].double()
        worst = max(worst, ((a - b).norm() / b.norm()).item())
    return worst


def measure(arguments: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    device = common.device_of(arguments)
    timer = common.Timer(device)
    rows: list[dict[str, Any]] = []
    chosen = [
        (name, build)
        for name, build in cases(setting, device)
        if not arguments.only or any(part in name for part in arguments.only)
    ]
    if not chosen:
        names = "; ".join(name for name, _ in cases(setting, device))
        raise SystemExit(f"--only: expected a part of a case's name ({names}), found none")
    with tqdm(total=len(arguments.lengths) * len(chosen), unit="case", disable=None) as bar:
        for tokens in arguments.lengths:
            inputs = Inputs(setting, tokens, device, arguments.seed)
            reference: Tensor | None = None
            for name, build in chosen:
                bar.set_description(f"{tokens} {name}")
                row: dict[str, Any] = {"tokens": tokens, "case": name}
                try:
                    prepared = build(inputs)
                    out = prepared.call()
                except (RuntimeError, ImportError) as error:
                    if not name.startswith("dense, "):
                        raise
                    row["note"] = f"refused: {str(error).splitlines()[0][:80]}"
                else:
                    if isinstance(out, Tensor) and out.is_floating_point():
                        if not out.isfinite().all():
                            raise ArithmeticError(f"{tokens} tokens, {name}: output not finite")
                        # Full lists must give what the first dense peer gave.
                        if reference is None and name.startswith("dense, "):
                            reference = out
                        elif reference is not None and name.endswith(("dense list", "100%")):
                            row["difference"] = relative_difference(out, reference)
                    del out
                    timing = timer(prepared.call, budget_ms=arguments.budget_ms)
                    row |= common.timing_row(timing)
                    if prepared.pairs is not None:
                        row["pairs"] = prepared.pairs
                        row["density"] = prepared.density
                        row["tflops"] = common.teraflops(
                            prepared.pairs, setting.head_dim, timing.ms
                        )
                    del prepared
                rows.append(row)
                bar.update()
            del inputs, reference
    for row in rows:
        dense = [
            r["ms"]
            for r in rows
            if r["tokens"] == row["tokens"] and r["case"].startswith("dense, SDPA") and "ms" in r
        ]
        if dense and "pairs" in row:
            row["times_faster_than_sdpa"] = min(dense) / row["ms"]
    return rows


COLUMNS = (
    ("tokens", "tokens", "d"),
    ("case", "case", ""),
    ("ms", "ms", ".3f"),
    ("ms_min", "min", ".3f"),
    ("ms_max", "max", ".3f"),
    ("repeats", "n", "d"),
    ("density", "density", ".3f"),
    ("tflops", "TFLOP/s", ".0f"),
    ("times_faster_than_sdpa", "x best SDPA", ".2f"),
    ("difference", "difference", ".1e"),
    ("note", "note", ""),
)


def parse_arguments() -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, multiples of 128")
    parser.add_argument(
        "--only", nargs="+", help="cases whose name contains one of these; no file without --output"
    )
    parser.add_argument("--budget-ms", type=float, default=1000.0, help="timed span of a case")
    common.add_record_arguments(parser)
    arguments = parser.parse_args()
    setting = SMOKE if arguments.smoke else Setting()
    arguments.lengths = arguments.lengths or list(setting.lengths)
    for tokens in arguments.lengths:
        if tokens < 256 or tokens % 128:
            parser.error(f"--lengths: expected multiples of 128 >= 256, got {tokens}")
    if arguments.smoke:
        arguments.budget_ms = min(arguments.budget_ms, 20.0)
    common.require_device(parser, arguments)
    return arguments, setting


def main() -> None:
    arguments, setting = parse_arguments()
    facts = common.machine(common.device_of(arguments), arguments.commit)
    rows = measure(arguments, setting)
    print(common.machine_line(facts))
    print(
        f"1 layer, {setting.heads} query heads, {setting.kv_heads} kv heads, "
        f"D={setting.head_dim}, bf16, median of n whole operator calls"
    )
    print(common.format_table(rows, COLUMNS))
    if arguments.output or not (arguments.smoke or arguments.only):
        path = common.write_result(
            "prefill_attention",
            facts,
            vars(arguments),
            rows,
            arguments.output,
            heads=setting.heads,
            kv_heads=setting.kv_heads,
            head_dim=setting.head_dim,
            dtype="bfloat16",
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
