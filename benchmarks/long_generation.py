"""Generates many tokens with a ShadowKVCache and records whether memory per token drifts.

A small GLM with random weights reads a prompt and generates `--tokens` tokens, greedily. At every
sample: the bytes of the cache's parts, what the process (CPU) or torch's allocator (CUDA) holds,
and the time of the steps since the last sample. The record says by how many bytes a token the cache
grew in the first and in the last quarter of the run; for a cache without drift these are equal, but
for the room that growing buffers keep at their ends (1/32 of their length).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import common
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GlmConfig

from sparseattn import hf
from sparseattn.hf_arguments import with_cache
from sparseattn.shadow_cache import ShadowKVCache

BENCHMARK = "long-generation"


def build_model(device: torch.device, seed: int, most: int) -> Any:
    config = GlmConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=most,
        pad_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def held_bytes(device: torch.device) -> int:
    """Of the process, resident, or of torch's allocator on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def used_bytes(cache: ShadowKVCache) -> int:
    """What is filled of the buffers that grow, without the room at their ends."""
    total = 0
    for layer in cache.layers:
        if layer.state is not None:
            parts = (layer.state.factor, layer.state.landmarks, layer.state.store)
            parts += (layer.state.excluded, layer.state.keys, layer.state.values)
            total += sum(part.rows.nbytes for part in parts)
    return total


@torch.inference_mode()
def generate(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    model = build_model(device, arguments.seed, arguments.prompt + arguments.tokens)
    hf.enable(model)
    cache = ShadowKVCache(model.config, rank=32, sparse_budget=256, outlier_chunks=8)
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(256, (1, arguments.prompt), generator=generator).to(device)
    rows: list[dict[str, Any]] = []
    last, begin = 0, 0.0
    for done in tqdm(range(arguments.tokens + 1), unit="token", disable=None):
        logits = model(ids, logits_to_keep=1, **with_cache(model, cache)).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        if done == 0:
            begin = time.perf_counter()
        if done % arguments.every and done != arguments.tokens:
            continue
        if not logits.isfinite().all():
            raise RuntimeError(f"logits are not finite after {done} tokens")
        seconds = time.perf_counter() - begin
        rows.append(
            {
                "generated": done,
                "length": cache.get_seq_length(),
                "cache_bytes": sum(cache.memory().values()),
                "used_bytes": used_bytes(cache),
                "held_bytes": held_bytes(device),
                "ms_per_token": 1e3 * seconds / max(1, done - last),
            }
        )
        last, begin = done, time.perf_counter()
    return rows


def drift(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth in bytes a token, in the first and the last quarter of the samples."""
    quarter = max(1, (len(rows) - 1) // 4)
    found: dict[str, Any] = {}
    for part, (a, b) in {
        "first_quarter": (rows[0], rows[quarter]),
        "last_quarter": (rows[-1 - quarter], rows[-1]),
    }.items():
        tokens = b["generated"] - a["generated"]
        found[part] = {
            name: (b[name] - a[name]) / max(1, tokens) for name in ("used_bytes", "held_bytes")
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32768, help="generated")
    parser.add_argument("--every", type=int, default=1024, help="tokens between samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    common.add_record_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.prompt, arguments.tokens, arguments.every = 600, 256, 32
    for name in ("prompt", "tokens", "every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    device = torch.device(arguments.device)
    facts = common.machine(device, arguments.commit)
    rows = generate(arguments, device)
    record = common.GrowingRecord(
        BENCHMARK, facts, arguments, lambda rows: {"drift": drift(rows)}, partial=False
    )
    record.finish(rows)
    print(common.machine_line(facts))
    columns = (
        ("generated", "generated", "d"),
        ("used_bytes", "used bytes", "d"),
        ("cache_bytes", "cache bytes", "d"),
        ("held_bytes", "held bytes", "d"),
        ("ms_per_token", "ms/token", ".2f"),
    )
    print(common.format_table(rows, columns))
    for part, growth in drift(rows).items():
        print(f"{part}: {growth['used_bytes']:.1f} bytes a token used")
    record.say_where()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
