"""The demo on random weights: speeds at real sizes, and how far sparse is from dense.

A GLM-4 model with random weights is built on the spot and reads a text. Measured are every layer,
the whole prefill, dense and sparse, and some generated tokens, with a dense cache and with a
ShadowKVCache.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from tqdm import tqdm

from sparseattn import SHADOW_DEVICES, demo_decode, demo_measure, demo_model, demo_report, hf
from sparseattn.config import PatternConfig

MIN_TOKENS = 256
_PICTURES = 4


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Any], str]:
    """(the report, JSON-ready, pictures of some heads of layer 0, their caption).

    Raises ValueError or OSError where an argument cannot be met.
    """
    device = torch.device(args.device)
    sizes = dict(demo_model.SIZES[args.device])
    text, source = demo_model.read_text(args.text, args.tokens or sizes["tokens"])
    tokens = token_count(args.tokens, sizes.pop("tokens"), len(text) + 2, source)
    patterns = _patterns(args, sizes, tokens)

    # model, every layer, exactness, the dense and the sparse prefill, generation
    steps = tqdm(total=sizes["layers"] + 5, desc="building the model", file=sys.stderr)
    with steps, torch.inference_mode():
        model = demo_model.build_model(**sizes, tokens=tokens, device=device, seed=args.seed)
        ids = demo_model.byte_tokens(text, tokens, device)
        steps.update()
        pictured = [(0, head) for head in range(_PICTURES)]
        layers, pictures, exact = demo_measure.measure_layers(model, ids, patterns, pictured, steps)
        prefill = _measure_prefill(model, ids, patterns, steps)
        steps.set_description("generation")
        decode = (
            demo_decode.measure_decode(model, ids, patterns)
            if device.type in SHADOW_DEVICES
            else None
        )
        steps.update()
    report = {
        "model": {
            "architecture": "GlmForCausalLM",
            "name": "random",
            "weights": "random",
            **sizes,
            "kv_heads": demo_model.KV_HEADS,
            "head_dim": demo_model.HEAD_DIM,
            "seed": args.seed,
        },
        "text": source,
        "tokens": tokens,
        "device": torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "covering_patterns_error": exact,
        "layers": layers,
        "prefill": prefill,
        "decode": decode,
    }
    return report, pictures, f"a GLM-4 model with random weights, {tokens} tokens"


def token_count(wanted: int | None, default: int, available: int, source: str) -> int:
    if wanted is not None and wanted < MIN_TOKENS:
        raise ValueError(f"--tokens: expected at least {MIN_TOKENS}, got {wanted}")
    if available < (wanted or MIN_TOKENS):
        raise ValueError(
            f"--text: expected at least {(wanted or MIN_TOKENS) - 2} bytes, got {available - 2} "
            f"({source})"
        )
    return wanted or min(default, available)


def _patterns(args: argparse.Namespace, sizes: dict[str, int], tokens: int) -> list[Any]:
    """Patterns of the demo's layers; sets the number of layers and heads in ``sizes``."""
    if args.layers is not None:
        if args.layers < 1:
            raise ValueError(f"--layers: expected at least 1, got {args.layers}")
        sizes["layers"] = args.layers
    if args.patterns is None:
        return demo_model.default_patterns(sizes["layers"], sizes["heads"], tokens)
    layers = PatternConfig.load(args.patterns).layers
    sizes["layers"] = min(sizes["layers"], len(layers))
    sizes["heads"] = len(layers[0])
    return [list(row) for row in layers[: sizes["layers"]]]


def _measure_prefill(model: Any, ids: Any, patterns: list[Any], steps: Any) -> dict[str, float]:
    """Seconds of the whole prefill, dense (torch's SDPA) and sparse, and how far apart they are."""

    def prefill() -> Any:
        return model(ids, use_cache=False).logits

    model.set_attn_implementation("sdpa")
    steps.set_description("dense prefill")
    dense_s, dense = demo_measure.timed(prefill, ids.device)
    steps.update()
    steps.set_description("sparse prefill")
    hf.enable(model, patterns, min_length=0)
    sparse_s, sparse = demo_measure.timed(prefill, ids.device)
    hf.disable(model)
    steps.update()
    dense, sparse = dense.float(), sparse.float()
    return {
        "dense_s": dense_s,
        "sparse_s": sparse_s,
        "speedup": dense_s / sparse_s,
        "logits_error": float((sparse - dense).norm() / dense.norm()),
        "same_top_token": float((sparse.argmax(-1) == dense.argmax(-1)).float().mean()),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    model, prefill = report["model"], report["prefill"]
    lines = [
        "",
        f"text     {report['tokens']} tokens (bytes) of {report['text']}",
        f"model    GLM-4 architecture, {model['layers']} layers, {model['heads']} query and "
        f"{model['kv_heads']} kv heads of {model['head_dim']}, hidden size {model['hidden_size']}",
        demo_report.device_line(report),
        "",
        *demo_model.WEIGHTS_NOTE.splitlines(),
        "",
        *demo_report.layer_lines(report["layers"]),
        "",
        f"Whole prefill: dense {demo_report.duration(prefill['dense_s'])}, sparse "
        f"{demo_report.duration(prefill['sparse_s'])}, {prefill['speedup']:.2f}x",
        f"Same most likely next token at {prefill['same_top_token']:.1%} of the positions, "
        f"logits off by {prefill['logits_error']:.3f}",
        demo_report.exactness_line(report),
        *demo_decode.lines(report["decode"]),
    ]
    return "\n".join(lines)
