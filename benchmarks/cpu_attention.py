"""CPU prefill attention at about 10 % density against dense causal SDPA (target T12).

Every round times dense attention and each pattern once, one after the other, so that a slow moment
of a shared machine touches all of them. Reported: best and median wall time, and CPU time per
thread (user + system time of the process over the number of threads), which other processes on
the machine disturb less.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from common import RUN, SINKS, TILE
from tqdm import tqdm

import sparseattn


def clustered_head(
    tokens: int, density: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Columns, offsets and visible pairs of one head.

    Sinks and uniform columns give about a fifth of the density; offsets are the nearest 100, then
    clusters of 51 at log-uniform distances until the density is reached.
    """
    extra = max(0, int(tokens * density / 5) // 2 - SINKS)
    spread = SINKS + torch.randperm(tokens - SINKS, generator=generator)[:extra]
    columns = torch.cat([torch.arange(SINKS), spread]).sort().values
    offsets = set(range(100))
    wanted = density * tokens * (tokens + 1) / 2
    while True:
        listed = torch.tensor(sorted(offsets))
        lists = columns[None, None], listed[None, None]
        pairs = int(common.vertical_slash_pairs(*lists, tokens, exact=True))
        if pairs >= wanted:
            return columns.to(torch.int32), listed.to(torch.int32), pairs
        u = torch.rand(1, generator=generator).item()
        start = int(100 * math.exp(u * math.log((tokens - TILE) / 100)))
        offsets.update(range(start, min(start + RUN, tokens)))


def clustered_indexes(
    tokens: int, heads: int, density: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """int32 columns [1, heads, NC] and offsets [1, heads, NS], -1 padded, and visible pairs."""
    drawn = [clustered_head(tokens, density, generator) for _ in range(heads)]

    def stack(lists: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)[None]

    return stack([d[0] for d in drawn]), stack([d[1] for d in drawn]), sum(d[2] for d in drawn)


def random_block_mask(
    tokens: int, heads: int, block: int, density: float, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """bool [1, heads, n, n]: the diagonal and random earlier blocks; and visible pairs."""
    n = tokens // block
    row = torch.arange(n)[:, None]
    scores = torch.rand(heads, n, n, generator=generator)
    scores = scores.masked_fill(row < row.T, 2.0).masked_fill(row == row.T, -1.0)
    # The diagonal block counts half; a fraction of a block is drawn, so that rows average out.
    exact = density * (row.flatten() + 0.5) + 0.5
    kept = (exact + torch.rand(heads, n, generator=generator)).floor().clamp(min=1)
    mask = scores.argsort(-1).argsort(-1) < kept[..., None]
    mask &= row >= row.T
    earlier = int(mask.sum()) - heads * n
    return mask[None], earlier * block * block + heads * n * block * (block + 1) // 2


def a_shape_window(tokens: int, sink: int, density: float) -> tuple[int, int]:
    """The smallest window, in steps of 10, that reaches the density, and visible pairs."""
    window = 0
    while True:
        window += 10
        pairs = common.a_shape_pairs(tokens, sink, window)
        if pairs >= density * tokens * (tokens + 1) / 2:
            return window, pairs


def measure(
    cases: dict[str, Callable[[], object]], repeats: int, threads: int
) -> dict[str, dict[str, float]]:
    """Times in seconds of every case, after one untimed call each."""
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    with tqdm(total=(repeats + 1) * len(cases), unit="call") as bar:
        for turn in range(repeats + 1):
            for name, call in cases.items():
                bar.set_description(name)
                start, start_cpu = time.perf_counter(), time.process_time()
                call()
                end, end_cpu = time.perf_counter(), time.process_time()
                if turn > 0:
                    wall[name].append(end - start)
                    cpu[name].append((end_cpu - start_cpu) / threads)
                bar.update()
    return {
        name: {
            "best_s": min(wall[name]),
            "median_s": statistics.median(wall[name]),
            "cpu_per_thread_s": min(cpu[name]),
        }
        for name in cases
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384, help="multiple of 128")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.1, help="share of the causal pairs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    arguments = parser.parse_args()
    if arguments.tokens < 256 or arguments.tokens % 128:
        parser.error(f"--tokens: expected a multiple of 128 >= 256, got {arguments.tokens}")
    if not 0 < arguments.density < 1:
        parser.error(f"--density: expected 0 < density < 1, got {arguments.density}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    tokens, heads, dim = arguments.tokens, arguments.heads, arguments.head_dim
    kv_heads = arguments.kv_heads or heads
    generator = torch.Generator().manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    q = torch.randn(1, heads, tokens, dim, generator=generator).to(dtype)
    k, v = (torch.randn(1, kv_heads, tokens, dim, generator=generator).to(dtype) for _ in "kv")

    causal = heads * tokens * (tokens + 1) // 2
    density = arguments.density
    sink = 128
    window, a_shape_pairs = a_shape_window(tokens, sink, density)
    columns, offsets, slash_pairs = clustered_indexes(tokens, heads, density, generator)
    blocks = {b: random_block_mask(tokens, heads, b, density, generator) for b in (64, 128)}

    def block_sparse(block: int) -> Callable[[], object]:
        mask = blocks[block][0]
        return lambda: sparseattn.block_sparse_attention(
            q, k, v, mask, block_q=block, block_kv=block
        )

    cases: dict[str, Callable[[], object]] = {
        "sdpa dense": lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=kv_heads != heads
        ),
        "a_shape": lambda: sparseattn.a_shape_attention(q, k, v, sink=sink, window=window),
        "vertical_slash": lambda: sparseattn.vertical_slash_attention(q, k, v, columns, offsets),
        "block_sparse 64": block_sparse(64),
        "block_sparse 128": block_sparse(128),
    }
    pairs = {
        "sdpa dense": causal,
        "a_shape": a_shape_pairs * heads,
        "vertical_slash": slash_pairs,
        "block_sparse 64": blocks[64][1],
        "block_sparse 128": blocks[128][1],
    }
    results = measure(cases, arguments.repeats, arguments.threads)

    dense = results["sdpa dense"]
    facts = common.machine(torch.device("cpu"))
    print(
        f"{tokens} tokens, {heads} heads, {kv_heads} kv heads, D={dim}, {arguments.dtype}, "
        f"{arguments.threads} threads, {facts['cpu']}"
    )
    print(
        f"{'':17}{'density':>8}{'best s':>9}{'median s':>10}{'CPU s':>8}{'GFLOP/s':>9}"
        f"{'x best':>8}{'x median':>9}{'x CPU':>7}"
    )
    for name, row in results.items():
        row["density"] = pairs[name] / causal
        row["gflops"] = 4 * dim * pairs[name] / row["best_s"] / 1e9
        for key in ("best_s", "median_s", "cpu_per_thread_s"):
            row["speedup_" + key.removesuffix("_s")] = dense[key] / row[key]
        print(
            f"{name:17}{row['density']:8.3f}{row['best_s']:9.3f}{row['median_s']:10.3f}"
            f"{row['cpu_per_thread_s']:8.3f}{row['gflops']:9.0f}{row['speedup_best']:8.1f}"
            f"{row['speedup_median']:9.1f}{row['speedup_cpu_per_thread']:7.1f}"
        )
    if arguments.json is not None:
        common.write_result("cpu_attention", facts, vars(arguments), results, arguments.json)


if __name__ == "__main__":
    main()
