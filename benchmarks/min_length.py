"""From which length on sparse prefill beats dense, layer by layer of one preset (target T7).

One layer, bf16, batch 1, 32 query heads, 8 key/value heads, D = 128. `sparse_attention`
(estimate, plan and attention) against the faster of SDPA's flash and cuDNN backends at every
length, for layers of one pattern and for every layer of the shipped Llama-3-8B patterns (their
mean is what a prompt gains).

An estimate chooses by the values, so there are two kinds of data. `structured` (see
`structured_qk` in sparseattn.bench_inputs) has its attention mass on clustered offsets and few
columns, as real heads have; `random` is normal noise, on which the estimates pick offsets all over
the prompt, so that their cover is nearly dense: it shows what is lost when a pattern does not fit.
A length is recommended from structured data only: the shortest measured length from which on
the mean over the Llama-3-8B layers is never slower than dense. The same length is printed for
every mix.

Density is selected pairs over half the square; pairs are counted in whole blocks and 64-wide
tiles, so it passes 1 where a short prompt is selected whole.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import common
import torch
from tqdm import tqdm

import sparseattn
from sparseattn import AShape, BlockSparse, Pattern, PatternConfig, VerticalSlash
from sparseattn.bench_tools import SDPA_BACKENDS, sdpa

PRESET = "gradientai/Llama-3-8B-Instruct-262k"
MEAN = "Llama-3-8B layers, mean"


def mixes(heads: int, layers: int | None) -> dict[str, list[list[Pattern]]]:
    """Layers (one pattern a head) of every mix; several layers count as their mean."""
    preset = PatternConfig.load(PRESET).layers[:layers]
    one: dict[str, Pattern] = {
        "vertical_slash (1000, 6096)": VerticalSlash(1000, 6096),
        "block_sparse (100)": BlockSparse(100),
        "a_shape (1024, 4096)": AShape(1024, 4096),
    }
    return {
        **{name: [[pattern] * heads] for name, pattern in one.items()},
        MEAN: [list(layer[:heads]) for layer in preset],
    }


def time_dense(
    timer: common.Timer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, float]:
    """Milliseconds of every backend that takes the call."""

    budget_ms = 200 if q.is_cuda else 50
    times: dict[str, float] = {}
    for name, backend in SDPA_BACKENDS[q.device.type].items():
        call = functools.partial(sdpa, q, k, v, backend)
        try:
            call()
        except RuntimeError as error:
            print(f"{name}: refused: {str(error).splitlines()[0]}")
            continue
        times[name.removeprefix("SDPA ")] = timer(call, budget_ms=budget_ms).ms
    return times


def time_sparse(
    timer: common.Timer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    patterns: list[Pattern],
    layers: int,
) -> float:
    """Milliseconds of one layer; briefer where a mix has many."""
    return timer(
        lambda: sparseattn.sparse_attention(q, k, v, patterns),
        warm_up=2 if layers == 1 else 1,
        budget_ms=200 if layers == 1 else 60,
        most=10,
    ).ms


def measure(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    timer = common.Timer(device)
    all_mixes = mixes(arguments.heads, arguments.layers)
    rows: list[dict[str, Any]] = []
    shape = (arguments.heads, arguments.kv_heads, arguments.head_dim, device, arguments.seed)
    jobs = [(data, tokens) for data in arguments.data for tokens in arguments.lengths]
    with tqdm(jobs, unit="length", disable=None) as bar:
        for data, tokens in bar:
            bar.set_description(f"{data} {tokens}")
            q, k, v = common.random_qkv(tokens, *shape)
            if data == "structured":
                q, k = common.structured_qk(tokens, *shape)
            dense = time_dense(timer, q, k, v)
            backend, dense_ms = min(dense.items(), key=lambda item: item[1])
            used = {p for layers in all_mixes.values() for layer in layers for p in layer}
            pairs = common.pattern_pairs(q, k, used)
            causal = arguments.heads * common.dense_pairs(tokens)
            for mix, layers in all_mixes.items():
                times = [time_sparse(timer, q, k, v, layer, len(layers)) for layer in layers]
                chosen = sum(pairs[p][h].item() for layer in layers for h, p in enumerate(layer))
                ms = sum(times) / len(layers)
                rows.append(
                    {
                        "data": data,
                        "tokens": tokens,
                        "mix": mix,
                        "dense_ms": dense_ms,
                        "dense_backend": backend,
                        "dense_all_ms": dense,
                        "sparse_ms": ms,
                        "speedup": dense_ms / ms,
                        "density": chosen / causal / len(layers),
                        "layers": len(layers),
                        "layers_faster": sum(t <= dense_ms for t in times),
                        "layer_ms": times,
                    }
                )
    return rows


def wins_from(rows: list[dict[str, Any]], data: str, mix: str) -> int | None:
    """The shortest measured length from which on sparse is never slower; None: not at the last."""
    found = None
    series = [r for r in rows if r["data"] == data and r["mix"] == mix]
    for row in sorted(series, key=lambda r: r["tokens"], reverse=True):
        if row["speedup"] < 1:
            break
        found = row["tokens"]
    return found


TABLE = (
    ("data", "data", ""),
    ("tokens", "tokens", "d"),
    ("mix", "mix", ""),
    ("dense_ms", "dense ms", ".3f"),
    ("dense_backend", "backend", ""),
    ("sparse_ms", "sparse ms", ".3f"),
    ("speedup", "speed-up", ".2f"),
    ("density", "density", ".3f"),
    ("layers_faster", "faster layers", "d"),
    ("layers", "of", "d"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, multiples of 64")
    parser.add_argument(
        "--data", nargs="+", choices=["structured", "random"], default=["structured", "random"]
    )
    parser.add_argument("--heads", type=int, help="query heads, up to 32 (default 32)")
    parser.add_argument("--kv-heads", type=int, help="default 8")
    parser.add_argument("--head-dim", type=int, help="default 128")
    parser.add_argument("--layers", type=int, help="first layers of the preset (default: all)")
    common.add_record_arguments(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.layers = arguments.layers or 2
        lengths, heads, kv_heads, head_dim = [256, 1024], 4, 2, 64
    else:
        heads, kv_heads, head_dim = 32, 8, 128
        common.require_device(parser, arguments)
    arguments.lengths = sorted(arguments.lengths or lengths)
    arguments.heads = arguments.heads or heads
    arguments.kv_heads = arguments.kv_heads or kv_heads
    arguments.head_dim = arguments.head_dim or head_dim
    if not 1 <= arguments.heads <= 32:
        parser.error(f"--heads: expected 1 to 32, got {arguments.heads}")
    for tokens in arguments.lengths:
        if tokens < 64 or tokens % 64:
            parser.error(f"--lengths: expected multiples of 64, got {tokens}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = common.device_of(arguments)
    facts = common.machine(device, arguments.commit)
    rows = measure(arguments, device)
    names = list(dict.fromkeys(row["mix"] for row in rows))
    wins = {d: {mix: wins_from(rows, d, mix) for mix in names} for d in arguments.data}
    recommended = wins.get("structured", {}).get(MEAN)

    print(common.machine_line(facts))
    print(
        f"1 layer, {arguments.heads} query heads, {arguments.kv_heads} kv heads, "
        f"D={arguments.head_dim}, bf16, sparse_attention with its estimate against the best SDPA"
    )
    print(common.format_table(rows, TABLE))
    longest = arguments.lengths[-1]
    print("\nsparse is never slower than dense, at the measured lengths, from")
    for data, by_mix in wins.items():
        for mix, tokens in by_mix.items():
            text = f"{tokens} tokens on" if tokens else f"no length (slower at {longest})"
            print(f"  {data:10}  {mix:28}  {text}")
    if "structured" in wins:
        print(
            f"recommended default min_length: {recommended}"
            if recommended
            else f"recommended default min_length: none, dense is faster up to {longest} tokens"
        )
    if not arguments.smoke or arguments.output:
        path = common.write_result(
            "min_length",
            facts,
            vars(arguments),
            rows,
            arguments.output,
            wins_from=wins,
            recommended_min_length=recommended,
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
