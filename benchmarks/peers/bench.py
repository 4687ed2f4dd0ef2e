"""Other libraries' attention beside this library's operators: same tensors, same process.

    python benchmarks/peers/run.py
    python benchmarks/peers/run.py --cases "vertical_slash (1000" --lengths 131072 --budget-ms 300

bf16, batch 1, 32 query heads, 8 key/value heads, D = 128, 32K and 128K tokens: dense;
vertical-slash with clustered lists in four sizes; block-sparse 64x64 with 100 blocks a row, and
128x128 by density. Peers: FlashAttention-3, torch SDPA and FlexAttention, MInference's Triton
kernels, vLLM's sparse kernel, FlashInfer, Block-Sparse-Attention. What cannot be imported is listed
with the reason; what fails is a row with the reason.

Times are of the peer's attention call alone; what it prepares (conversion of an index, plan) is
`prepare_ms` beside it, copies into its layout are not timed. This library's time is the whole
operator: plan, packing and attention. `ratio` is the peer's time over ours, `ratio_prepared` counts
the preparation, too. TFLOP/s are of the problem's own pairs, whoever computes it.

Checks: `difference` is the norm of the difference from our output over the norm, of the worst head;
`max_difference` the largest of an element. Where a peer's keys are not exactly ours, `differs` says
how, `pairs_ratio` how many pairs it computes for one of ours, and `tile_error` compares some tiles
of its output with exact attention over the peer's own keys (`own_tile_error`: ours over ours).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import torch
from prefill_attention import SMOKE, Setting, relative_difference
from torch import Tensor
from tqdm import tqdm

import sparseattn
from sparseattn import Dense

from . import (
    block_sparse_128,
    flash_attention_3,
    flashinfer_blocks,
    minference_triton,
    torch_flex,
    torch_sdpa,
    vllm_sparse,
)
from .problem import (
    BLOCK_SPARSE,
    DENSE,
    VERTICAL_SLASH,
    Offer,
    Problem,
    first_line,
    own_keys,
    tile_error,
)

BENCHMARK = "peers"
OWN = "sparseattn"
#: In the order in which they run: those that are likeliest to break a process come last.
PEERS = (
    torch_sdpa,
    flash_attention_3,
    torch_flex,
    minference_triton,
    vllm_sparse,
    block_sparse_128,
    flashinfer_blocks,
)
TOLERANCE = 2e-2  # of bf16 outputs, relative to the largest value or the norm

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[tuple[Tensor, Tensor, Tensor], int], tuple[Problem, float]]
    call: Callable[[Problem], Tensor]


def cases(setting: Setting) -> Iterator[Case]:
    """Every case: the problem with its number of pairs, and our operator on it."""

    def dense(qkv: tuple[Tensor, ...], seed: int) -> tuple[Problem, float]:
        problem = Problem(DENSE, *qkv)
        return problem, setting.heads * common.dense_pairs(problem.tokens)

    def attend_dense(p: Problem) -> Tensor:
        return sparseattn.sparse_attention(p.q, p.k, p.v, [Dense()] * p.heads)

    def slash(sizes: tuple[int, int], qkv: tuple[Tensor, ...], seed: int) -> tuple[Problem, float]:
        tokens = qkv[0].shape[2]
        lists = common.clustered_indexes(tokens, *sizes, setting.heads, seed)
        columns, offsets = (x.to(qkv[0].device) for x in lists)
        pairs = common.vertical_slash_pairs(columns, offsets, tokens).sum().item()
        return Problem(VERTICAL_SLASH, *qkv, columns=columns, offsets=offsets), pairs

    def attend_slash(p: Problem) -> Tensor:
        return sparseattn.vertical_slash_attention(p.q, p.k, p.v, p.columns, p.offsets)

    def blocks(
        size: int, share: dict[str, Any], qkv: tuple[Tensor, ...], seed: int
    ) -> tuple[Problem, float]:
        tokens, device = qkv[0].shape[2], qkv[0].device
        mask = common.random_block_mask(tokens, setting.heads, size, device, seed=seed, **share)
        pairs = common.block_pairs(mask, size, size).sum().item()
        per_row = share.get("per_row")
        return Problem(BLOCK_SPARSE, *qkv, mask=mask, block=size, per_row=per_row), pairs

    def attend_blocks(p: Problem) -> Tensor:
        return sparseattn.block_sparse_attention(
            p.q, p.k, p.v, p.mask, block_q=p.block, block_kv=p.block
        )

    yield Case("dense", dense, attend_dense)
    for sizes in setting.sizes:
        name = f"vertical_slash ({sizes[0]}, {sizes[1]})"
        yield Case(name, partial(slash, sizes), attend_slash)
    name = f"block_sparse 64x64, {setting.per_row} a row"
    yield Case(name, partial(blocks, 64, {"per_row": setting.per_row}), attend_blocks)
    for density in setting.densities:
        name = f"block_sparse 128x128, {density:.0%}"
        yield Case(name, partial(blocks, 128, {"density": density}), attend_blocks)


@dataclass
class Run:
    setting: Setting
    device: torch.device
    timer: common.Timer
    budget_ms: float
    repeats: int

    def time(self, call: Callable[[], object]) -> Row:
        timing = self.timer(
            call, budget_ms=self.budget_ms, least=min(3, self.repeats), most=self.repeats
        )
        return common.timing_row(timing)

    def own(self, case: Case, problem: Problem, pairs: float) -> tuple[Row, Tensor]:
        out = case.call(problem)
        error = tile_error(problem, out, partial(own_keys, problem))
        row = {"peer": OWN, "own_tile_error": error} | self.time(partial(case.call, problem))
        if not error < TOLERANCE:
            row["error"] = "output is not that of exact attention"
        return row | self._speed(pairs, row), out

    def peer(self, offer: Offer, problem: Problem, pairs: float, own: Row, expected: Tensor) -> Row:
        row: Row = {"peer": offer.name}
        out = offer.call()
        row["difference"] = relative_difference(out, expected)
        row["max_difference"] = max(
            (a.float() - b.float()).abs().max().item()
            for a, b in zip(out[0], expected[0], strict=True)
        )
        wrong = not row["difference"] < TOLERANCE
        if offer.differs:
            row["differs"] = offer.differs
            assert offer.keys is not None
            row["tile_error"] = tile_error(problem, out, offer.keys)
            wrong = not row["tile_error"] < TOLERANCE
        if offer.pairs is not None:
            row["pairs_ratio"] = offer.pairs / pairs
        if wrong:
            row["note"] = "its output is not that of exact attention over its keys"
        del out
        row |= self.time(offer.call)
        row |= self._speed(pairs, row) | {"ratio": row["ms"] / own["ms"]}
        if offer.prepared:
            row["prepared"] = offer.prepared
        if offer.prepare is not None:
            row["prepare_ms"] = self.time(offer.prepare)["ms"]
            row["ratio_prepared"] = (row["ms"] + row["prepare_ms"]) / own["ms"]
        return row

    def _speed(self, pairs: float, row: Row) -> Row:
        return {
            "pairs": pairs,
            "tflops": common.teraflops(pairs, self.setting.head_dim, row["ms"]),
        }


def case_rows(run: Run, case: Case, qkv: Any, seed: int, peers: Sequence[Any]) -> Iterator[Row]:
    problem, pairs = case.make(qkv, seed)
    own, expected = run.own(case, problem, pairs)
    yield own
    for peer in peers:
        offers = peer.offers(problem)
        while True:
            name = peer.NAME
            try:
                offer = next(offers, None)
                if offer is None:
                    break
                name = offer.name
                yield run.peer(offer, problem, pairs, own, expected)
            except Exception as error:  # a peer may fail in any way; the others go on
                yield {"peer": name, "note": f"failed: {first_line(error)}"}
            offer = None
        free(run.device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    run: Run, arguments: argparse.Namespace, peers: Sequence[Any], save: Callable[[list[Row]], None]
) -> list[Row]:
    rows: list[Row] = []
    chosen = [case for case in cases(run.setting) if wanted(case.name, arguments.cases)]
    with tqdm(total=len(arguments.lengths) * len(chosen), unit="case", disable=None) as bar:
        for tokens in arguments.lengths:
            s = run.setting
            qkv = common.random_qkv(
                tokens, s.heads, s.kv_heads, s.head_dim, run.device, arguments.seed
            )
            for case in chosen:
                bar.set_description(f"{tokens} {case.name}")
                for row in case_rows(run, case, qkv, arguments.seed, peers):
                    rows.append({"tokens": tokens, "case": case.name} | row)
                    save(rows)
                free(run.device)
                bar.update()
            del qkv
            free(run.device)
    return rows


def wanted(name: str, parts: Sequence[str] | None) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


COLUMNS = (
    ("tokens", "tokens", "d"),
    ("case", "case", ""),
    ("peer", "by", ""),
    ("ms", "ms", ".3f"),
    ("tflops", "TFLOP/s", ".0f"),
    ("ratio", "x ours", ".2f"),
    ("prepare_ms", "prepare", ".3f"),
    ("ratio_prepared", "x ours", ".2f"),
    ("difference", "difference", ".1e"),
    ("max_difference", "largest", ".1e"),
    ("pairs_ratio", "pairs x ours", ".3f"),
    ("tile_error", "tile error", ".1e"),
    ("note", "note", ""),
)


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, multiples of 128")
    parser.add_argument("--cases", nargs="+", help="those whose name contains one of these")
    parser.add_argument("--peers", nargs="+", help="those whose name contains one of these")
    parser.add_argument("--budget-ms", type=float, default=500.0, help="timed span of a call")
    parser.add_argument("--repeats", type=int, default=20, help="most timed calls")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    setting = SMOKE if arguments.smoke else Setting()
    arguments.partial = bool(arguments.cases or arguments.peers or arguments.lengths)
    arguments.lengths = arguments.lengths or list(setting.lengths)
    for tokens in arguments.lengths:
        if tokens < 256 or tokens % 128:
            parser.error(f"--lengths: expected multiples of 128 >= 256, got {tokens}")
    for option, names in (
        ("cases", [case.name for case in cases(setting)]),
        ("peers", [peer.NAME for peer in PEERS]),
    ):
        if not any(wanted(name, getattr(arguments, option)) for name in names):
            parser.error(f"--{option}: expected a part of one of {'; '.join(names)}")
    if arguments.smoke:
        arguments.budget_ms = min(arguments.budget_ms, 20.0)
        arguments.repeats = min(arguments.repeats, 3)
    common.require_device(parser, arguments)
    return arguments, setting


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if our own output is wrong; a peer's failure is a row."""
    arguments, setting = parse_arguments(argv)
    device = common.device_of(arguments)
    facts = common.machine(device, arguments.commit)
    chosen = [peer for peer in PEERS if wanted(peer.NAME, arguments.peers)]
    status = {peer.NAME: peer.available(device) for peer in chosen}
    print(common.machine_line(facts))
    for name, (works, detail) in status.items():
        print(f"  {name}: {detail if works else f'missing: {detail}'}")
    partial_run = vars(arguments).pop("partial")
    record = common.GrowingRecord(
        BENCHMARK,
        facts,
        arguments,
        lambda rows: {},
        partial=partial_run,
        heads=setting.heads,
        kv_heads=setting.kv_heads,
        head_dim=setting.head_dim,
        dtype="bfloat16",
        peers={
            name: {"available": works, "detail": detail} for name, (works, detail) in status.items()
        },
    )
    run = Run(setting, device, common.Timer(device), arguments.budget_ms, arguments.repeats)
    working = [peer for peer in chosen if status[peer.NAME][0]]
    rows = measure(run, arguments, working, record.save)
    print(common.format_table(rows, COLUMNS))
    for text in dict.fromkeys(row["differs"] for row in rows if "differs" in row):
        names = dict.fromkeys(row["peer"] for row in rows if row.get("differs") == text)
        print(f"{', '.join(names)}: {text}")
    record.finish(rows)
    record.say_where()
    return int(any("error" in row for row in rows))
