"""Dense against sparse prefill of a GLM-4 model on a real text, then generation with ShadowKV.

A GLM-4 model with random weights is built on the spot and reads a text. For every layer and head
the demo tells how much of dense attention a pattern visits (density), how much attention mass that
keeps, how far the output is from the dense one, and how long both take; then the whole prefill,
dense and sparse, and some generated tokens, with a dense cache and with a ShadowKVCache. It prints
tables and writes report.json and patterns.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

_NEEDED = ("transformers", "matplotlib", "tqdm")
_MIN_TOKENS = 256
_PICTURES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line's ``demo``."""
    parser.add_argument(
        "--text", metavar="FILE", help="text to read (default: one that comes with Python)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="prompt length; a byte is a token (default: 8192 on the cpu, 65536 on cuda, at most "
        "the text)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--patterns",
        metavar="CONFIG",
        help="pattern config, a file or the name of a preset (default: a mixture made for the "
        "demo's heads); the model gets its number of heads",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers (default: 2 on the cpu, 4 on cuda)"
    )
    parser.add_argument(
        "--output", metavar="DIR", default="sparseattn-demo", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    """The command line's ``demo``: returns the exit status."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"demo needs {' and '.join(missing)}: pip install 'sparseattn[demo]'")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    from sparseattn import plots

    report, pictures = measure(args)
    plots.save(
        pictures,
        f"layer 0 of a GLM-4 model with random weights, {report['tokens']} tokens",
        output / "patterns.png",
    )
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))
    print(f"\nwrote {output / 'report.json'} and {output / 'patterns.png'}")
    return 0


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The report, JSON-ready, and pictures of some heads of layer 0 (plots.HeadPicture).

    Raises ValueError or OSError where an argument cannot be met.
    """
    import torch
    from tqdm import tqdm

    from sparseattn import demo_decode, demo_model

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, got cuda (torch finds no GPU)")
    device = torch.device(args.device)
    sizes = dict(demo_model.SIZES[args.device])
    text, source = demo_model.read_text(args.text, args.tokens or sizes["tokens"])
    tokens = _token_count(args.tokens, sizes.pop("tokens"), len(text) + 2, source)
    patterns = _patterns(args, sizes, tokens)

    # model, every layer, exactness, the dense and the sparse prefill, generation
    steps = tqdm(total=sizes["layers"] + 5, desc="building the model", file=sys.stderr)
    with steps, torch.inference_mode():
        model = demo_model.build_model(**sizes, tokens=tokens, device=device, seed=args.seed)
        ids = demo_model.byte_tokens(text, tokens, device)
        steps.update()
        layers, pictures, exact = _measure_layers(model, ids, patterns, steps)
        prefill = _measure_prefill(model, ids, patterns, steps)
        steps.set_description("generation")
        decode = demo_decode.measure_decode(model, ids, patterns) if _decodes(device) else None
        steps.update()
    report = {
        "model": {
            "architecture": "GlmForCausalLM",
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
    return report, pictures


def _decodes(device: Any) -> bool:
    """Whether the decode operators run on the device."""
    from sparseattn.shadow_layer import DEVICES

    return device.type in DEVICES


def _token_count(wanted: int | None, default: int, available: int, source: str) -> int:
    if wanted is not None and wanted < _MIN_TOKENS:
        raise ValueError(f"--tokens: expected at least {_MIN_TOKENS}, got {wanted}")
    if available < (wanted or _MIN_TOKENS):
        raise ValueError(
            f"--text: expected at least {(wanted or _MIN_TOKENS) - 2} bytes, got {available - 2} "
            f"({source})"
        )
    return wanted or min(default, available)


def _patterns(args: argparse.Namespace, sizes: dict[str, int], tokens: int) -> list[Any]:
    """Patterns of the demo's layers; sets the number of layers and heads in ``sizes``."""
    from sparseattn import demo_model
    from sparseattn.config import PatternConfig

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


def _measure_layers(model: Any, ids: Any, patterns: list[Any], steps: Any) -> tuple[Any, Any, Any]:
    from sparseattn import demo_measure
    from sparseattn.search_model import attention_visitor

    layers: list[dict[str, Any]] = []
    pictures: list[Any] = []
    exact: list[float] = []

    def visit(layer: int, q: Any, k: Any, v: Any, scale: float, dense: Any) -> None:
        if layer == 0:
            steps.set_description("exactness")
            exact.append(demo_measure.exactness(q, k, v, scale))  # warms the operators up, too
            steps.update()
        steps.set_description(f"layer {layer}")
        measured, drawn = demo_measure.measure_layer(
            q, k, v, scale, dense, patterns[layer], range(_PICTURES) if layer == 0 else ()
        )
        layers.append({"layer": layer, **measured})
        pictures.extend(drawn)
        steps.update()

    with attention_visitor(model, visit):
        model(ids, use_cache=False, logits_to_keep=1)
    return layers, pictures, exact[0]


def _measure_prefill(model: Any, ids: Any, patterns: list[Any], steps: Any) -> dict[str, float]:
    """Seconds of the whole prefill, dense (torch's SDPA) and sparse, and how far apart they are."""
    from sparseattn import demo_measure, hf

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
    from sparseattn import demo_decode
    from sparseattn.demo_model import WEIGHTS_NOTE

    model, prefill = report["model"], report["prefill"]
    lines = [
        "",
        f"text     {report['tokens']} tokens (bytes) of {report['text']}",
        f"model    GLM-4 architecture, {model['layers']} layers, {model['heads']} query and "
        f"{model['kv_heads']} kv heads of {model['head_dim']}, hidden size {model['hidden_size']}",
        f"device   {report['device']}, {report['dtype']}"
        + (f", {report['threads']} threads" if report["device"] == "cpu" else ""),
        "",
        *WEIGHTS_NOTE.splitlines(),
        "",
        "Attention, layer by layer (means over heads):",
        f"{'layer':>8} {'density':>8} {'mass kept':>10} {'error':>7} {'dense':>10} {'sparse':>10} "
        f"{'speed-up':>9}",
    ]
    for layer in report["layers"]:
        lines.append(
            f"{layer['layer']:8} {layer['density']:8.1%} {layer['mass_kept']:10.1%} "
            f"{layer['output_error']:7.3f} {_time(layer['dense_s']):>10} "
            f"{_time(layer['sparse_s']):>10} {layer['speedup']:8.2f}x"
        )
    lines += ["", *_pattern_lines(report["layers"]), ""]
    lines += [
        "density: share of the causal query-key pairs that are visited. mass kept: of dense",
        "attention, on sampled rows. error: norm of the output's difference over the dense norm.",
        "Times are of attention alone; the sparse one has the estimate of the index in it.",
        "",
        f"Whole prefill: dense {_time(prefill['dense_s'])}, sparse {_time(prefill['sparse_s'])}, "
        f"{prefill['speedup']:.2f}x",
        f"Same most likely next token at {prefill['same_top_token']:.1%} of the positions, "
        f"logits off by {prefill['logits_error']:.3f}",
        f"Patterns that cover everything differ from dense attention by "
        f"{report['covering_patterns_error']:.1e} (rounding in {report['dtype']})",
        *demo_decode.lines(report["decode"]),
    ]
    return "\n".join(lines)


def _pattern_lines(layers: list[dict[str, Any]]) -> list[str]:
    """Every head if they fit on a screen, else a line per pattern."""
    heads = [(layer["layer"], head) for layer in layers for head in layer["heads"]]
    columns = f"{'density':>8} {'mass kept':>10} {'error':>7}"
    if len(heads) <= 32:
        return [f"{'layer':>8} {'head':>4}  {'pattern':26} {columns}"] + [
            f"{layer:8} {head['head']:4}  {head['pattern']:26} {head['density']:8.1%} "
            f"{head['mass_kept']:10.1%} {head['output_error']:7.3f}"
            for layer, head in heads
        ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for _, head in heads:
        groups.setdefault(head["pattern"], []).append(head)
    lines = [f"{'heads':>8}  {'pattern (means)':26} {columns}"]
    for pattern, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        density, kept, error = (
            statistics.fmean(head[key] for head in members)
            for key in ("density", "mass_kept", "output_error")
        )
        lines.append(f"{len(members):8}  {pattern:26} {density:8.1%} {kept:10.1%} {error:7.3f}")
    return lines


def _time(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
