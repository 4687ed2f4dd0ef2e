"""Generation with whole models of random weights: dense attention against ShadowKVCache (T10).

bf16, the configs of Llama-3.1-8B and GLM-4-9B-1M, built on the device; nothing is downloaded. Every
cache is filled with random keys and values of `--tokens` tokens instead of by a prefill, compressed
layer by layer as after one; all sequences of a batch are copies of one. Tokens fed are random, the
same for all ways, and the next token is computed (argmax) in every step.

dense   a cache of fixed size, SDPA over all of it without a mask, by the backend that is fastest
        on these shapes; eager and as one CUDA graph a step
shadow  ShadowKVCache in a model enabled by `sparseattn.hf.enable`, eager; and the same operators
        on the same layers at fixed addresses, one CUDA graph a step ("graph"). There, making
        chunks of the tail is timed on its own and charged once to the `--steps` steps

Both at the batches asked for and at the largest that fits. Random weights select at random, so
`--hits` replaces the selected chunks (after `shadow_select` has run) by lists of which successive
ones share that many; `--hits own` leaves them. Values in pinned host memory take 8 GiB a sequence
of 122K tokens (Llama): `--host-values shared` lets all layers use one layer's memory, so that a
batch can run for which the host is too small. PCIe traffic is then what it would be; the record
says how much memory a real run needs.

TTFT (`--ttft`): one prompt of random tokens through the model, SDPA and ShadowKVCache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import bars
import common
import torch
from bars import Bar
from decode_inputs import DTYPE, free_memory, host_limit
from decode_runs import dense_rows, shadow_rows, ttft_rows
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig

BENCHMARK = "decode-model"
T10 = 3.04
BATCHES = (1, 4, 8, 16, 24, 32, 48)

Row = dict[str, Any]

CONFIGS: dict[str, Callable[..., Any]] = {"Llama-3.1-8B": LlamaConfig, "GLM-4-9B-1M": GlmConfig}
SIZES: dict[str, Row] = {
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "GLM-4-9B-1M": {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "attention_bias": True,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e8,
            "partial_rotary_factor": 0.5,
        },
    },
}
SMOKE: Row = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SMOKE_CACHE: Row = {"rank": 32, "sparse_budget": 64, "outlier_chunks": 3}


def build_model(name: str, arguments: argparse.Namespace, device: torch.device) -> Any:
    sizes = SIZES[name] | (SMOKE if arguments.smoke else {})
    if arguments.layers:
        sizes["num_hidden_layers"] = arguments.layers
    config = CONFIGS[name](max_position_embeddings=max(131072, 2 * arguments.tokens), **sizes)
    torch.manual_seed(arguments.seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


# --- all of it -------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    arguments: argparse.Namespace, device: torch.device, save: Callable[[list[Row]], None]
) -> list[Row]:
    rows: list[Row] = []
    total = len(arguments.models) * (1 + len(arguments.stores) + arguments.ttft)
    with tqdm(total=total, unit="part", disable=None) as bar:
        for name in arguments.models:
            bar.set_description(name)
            model = build_model(name, arguments, device)
            parts = [ttft_rows(model, arguments)] if arguments.ttft else []
            parts.append(dense_rows(model, arguments))
            parts += [shadow_rows(model, arguments, store) for store in arguments.stores]
            for part in parts:
                try:
                    for row in part:
                        rows.append({"model": name, "tokens": arguments.tokens} | row)
                        save(rows)
                except torch.OutOfMemoryError:
                    rows.append({"model": name, "batch": 0, "note": "out of memory"})
                part.close()
                free_memory(device)
                bar.update()
            del model, parts, part
            free_memory(device)
    return rows


def judge(rows: list[Row]) -> list[Row]:
    """Throughput of ShadowKV at its best batch over that of dense decode at its largest; T10's
    bar on Llama's shapes at 122K."""
    judged = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name and "tokens_per_s" in row]
        dense = [row for row in own if row["way"] == "dense" and row["largest"]]
        if not dense:
            continue
        base = max(dense, key=lambda row: row["tokens_per_s"])
        for store, mode in dict.fromkeys(
            (row["store"], row["mode"]) for row in own if row["way"] == "shadow"
        ):
            best = max(
                (row for row in own if row.get("store") == store and row["mode"] == mode),
                key=lambda row: row["tokens_per_s"],
            )
            row = {
                "target": "T10",
                "tokens": best["tokens"],
                "case": f"{name}, values on the {store}, {mode}, batch {best['batch']}, against "
                f"dense {base['mode']}, batch {base['batch']}",
                "times_faster_than_dense": best["tokens_per_s"] / base["tokens_per_s"],
            }
            if name == "Llama-3.1-8B" and best["tokens"] == 124928:
                row |= Bar("times_faster_than_dense", T10, "x dense").fields(row)
            judged.append(row)
    return judged


COLUMNS = (
    ("model", "model", ""),
    ("way", "way", ""),
    ("store", "store", ""),
    ("mode", "mode", ""),
    ("batch", "batch", "d"),
    ("ms_per_step", "ms/step", ".3f"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("hit_rate", "hits", ".3f"),
    ("pcie_mb", "PCIe MB/step", ".1f"),
    ("flush_ms", "flush ms", ".1f"),
    ("ttft_s", "TTFT s", ".2f"),
    ("device_gib", "device GiB", ".1f"),
    ("host_gib", "host GiB", ".1f"),
    ("needed_gib", "needed", ".1f"),
    ("note", "note", ""),
)


def render(rows: list[Row]) -> str:
    scaled = (
        ("pcie_mb", "pcie_bytes_per_step", 1e6),
        ("device_gib", "device_bytes", 2**30),
        ("host_gib", "host_bytes", 2**30),
        ("needed_gib", "host_bytes_needed", 2**30),
    )
    shown = [
        row | {key: row[source] / unit for key, source, unit in scaled if source in row}
        for row in rows
    ]
    return common.format_table(shown, COLUMNS)


def share(text: str) -> float | None:
    if text == "own":
        return None
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, help="in the cache (default: 124928)")
    parser.add_argument("--batches", type=int, nargs="+", help=f"default: {BATCHES}")
    parser.add_argument("--most", type=int, default=48, help="the largest batch that is tried")
    parser.add_argument("--steps", type=int, default=64, help="timed (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a try")
    parser.add_argument("--hits", type=share, default=0.35, help="a share, or own")
    stores = ["device", "host"]
    parser.add_argument("--stores", nargs="*", choices=stores, default=stores)
    parser.add_argument("--host-values", choices=("own", "shared"), default="own")
    parser.add_argument(
        "--host-gib",
        type=float,
        default=host_limit() / 2**30,
        help="host memory that the values may take (default: three quarters of what is there)",
    )
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--budget", type=int, default=2048, help="tokens selected in a step")
    parser.add_argument("--values", choices=("bf16", "fp8"), default="bf16", help="of the store")
    parser.add_argument("--factor", choices=("bf16", "fp8"), default="bf16", help="of the keys")
    parser.add_argument("--ttft", action="store_true", help="measure the time to the first token")
    parser.add_argument("--ttft-tokens", type=int, help="of the prompt (default: --tokens)")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.tokens = arguments.tokens or (1024 if arguments.smoke else 124928)
    arguments.ttft_tokens = arguments.ttft_tokens or arguments.tokens
    for name in ("tokens", "steps", "most", "ttft_tokens"):
        value = getattr(arguments, name)
        if value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    arguments.cache = {"rank": arguments.rank, "sparse_budget": arguments.budget}
    if arguments.smoke:
        arguments.cache = dict(SMOKE_CACHE)
        arguments.steps, arguments.most = min(arguments.steps, 8), min(arguments.most, 2)
    common.require_device(parser, arguments)
    arguments.cache |= {
        f"{part}_dtype": "fp8"
        for part in ("value", "factor")
        if getattr(arguments, {"value": "values"}.get(part, part)) == "fp8"
    }
    arguments.batches = arguments.batches or list(BATCHES)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = common.device_of(arguments)
    facts = common.machine(device, arguments.commit)
    record = common.GrowingRecord(
        BENCHMARK,
        facts,
        arguments,
        lambda rows: {"summary": bars.summary(judge(rows)), "judged": judge(rows)},
        partial=bool(arguments.layers),
        dtype="bfloat16",
        weights="random",
        cache_filled_with="random keys and values, compressed layer by layer; the "
        "sequences of a batch are copies of one",
    )
    rows = measure(arguments, device, record.save)
    record.finish(rows)
    print(common.machine_line(facts))
    print(f"random weights, bf16, {arguments.tokens} tokens in the cache")
    print(render(rows))
    for row in judge(rows):
        met = f": {row['bar']}, {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
        print(f"{row['case']}: {row['times_faster_than_dense']:.2f} x{met}")
    record.say_where()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
