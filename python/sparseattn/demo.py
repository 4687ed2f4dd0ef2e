"""Dense against sparse prefill, and ShadowKV's decode, on a real text.

The shipped model ``needle``, trained to look numbers up in long text, is asked for some that were
pasted into the text: with dense attention, with sparse prefill, and with a ShadowKVCache. For every
layer and head the demo tells how much of dense attention a pattern visits (density), how much
attention mass that keeps, how far the output is from the dense one, and how long both take.
``--model random`` measures the same on a model with random weights, on a GPU of GLM-4-9B's sizes.
It prints tables and writes report.json and patterns.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

_NEEDED = ("transformers", "matplotlib", "tqdm")
MODELS = ("needle", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line's ``demo``."""
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="needle",
        help="the shipped small model, trained, or random weights, which show nothing but speed "
        "(default: needle)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text to read (default: one that comes with Python)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="prompt length (default: 8192 on the cpu, 131072 on cuda, of random weights 65536; "
        "at most the text)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--patterns",
        metavar="CONFIG",
        help="pattern config, a file or the name of a preset (default: made for the model; random "
        "weights get the config's number of heads)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="layers of random weights (default: 2 on the cpu, 4 on cuda)",
    )
    parser.add_argument(
        "--output", metavar="DIR", default="sparseattn-demo", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the numbers to find, or the weights (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """The command line's ``demo``: returns the exit status."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"demo needs {' and '.join(missing)}: pip install 'sparseattn[demo]'")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    import torch

    from sparseattn import demo_needle, demo_random, plots

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, got cuda (torch finds no GPU)")
    kind = demo_needle if args.model == "needle" else demo_random
    report, pictures, caption = kind.measure(args)
    plots.save(pictures, caption, output / "patterns.png")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(kind.render(report))
    print(f"\nwrote {output / 'report.json'} and {output / 'patterns.png'}")
    return 0
