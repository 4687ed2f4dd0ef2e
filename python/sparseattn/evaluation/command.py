"""Accuracy of a model with sparse prefill and ShadowKV decode, beside dense attention.

Needle in a haystack (a grid of depths and lengths), RULER-style retrieval, tracking and counting
tasks, and perplexity over the length, on texts made here; and files of RULER, InfiniteBench and
LongBench, where you name them, with their published scores. Nothing is fetched.

Methods: dense; a_shape, vertical_slash and block_sparse (all heads, about --density of the keys);
searched (the best of these for each head, found before); adaptive (--share of the attention mass);
shadowkv (dense prefill, decode over low-rank keys); and PREFILL+shadowkv.

Writes eval.json (after every cell; the same command goes on where it stopped, also with more
methods, tasks and lengths), eval.md, heat maps, and the patterns that it searched.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

DEFAULT_OUTPUT = "sparseattn-eval"
PARTS = ("niah", "tasks", "perplexity")
#: device type -> what is not given
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": (2048, 8192),
        "examples": 4,
        "depths": 5,
        "needles": 1,
        "windows": 1,
        "fit": "error",
    },
    "cuda": {
        "lengths": (4096, 8192, 16384, 32768),
        "examples": 50,
        "depths": 11,
        "needles": 3,
        "windows": 4,
        "fit": "harm",
    },
}
SMOKE: dict[str, Any] = {
    "lengths": (1024,),
    "examples": 1,
    "depths": 2,
    "needles": 1,
    "windows": 1,
    "tasks": ("niah_multivalue",),
    "density": 0.5,
    "fit": "error",
    "ppl_tokens": 64,
    "ppl_steps": 8,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line's ``eval``."""
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default="needle",
        metavar="MODEL",
        help="the shipped small model (default: %(default)s) or a local folder of transformers",
    )
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="default: all of those above, searched with shadowkv too",
    )
    add("--parts", nargs="+", choices=PARTS, help="default: all, or only files if some are named")
    add("--tasks", nargs="+", metavar="TASK", help="default: all")
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="default: 4096 8192 16384 32768; on the CPU 2048 8192",
    )
    add("--examples", type=int, help="of each task and length (default: 50; on the CPU 4)")
    add("--depths", type=int, help="of the needle, evenly spaced (default: 11; on the CPU 5)")
    add("--needles", type=int, help="examples for each depth (default: 3; on the CPU 1)")
    patterns = parser.add_argument_group("patterns")
    add = patterns.add_argument
    add("--density", type=float, help="share of dense attention's keys (default: 0.2)")
    add(
        "--fit",
        choices=("harm", "error"),
        help="vertical_slash and searched by what patterns do to the model's predictions, or to "
        "heads' outputs (default: harm, which takes thousands of forwards; on the CPU error)",
    )
    add(
        "--share",
        type=float,
        default=0.95,
        help="of the attention mass, for adaptive (default: %(default)s)",
    )
    add(
        "--patterns",
        metavar="FILE",
        help="a pattern config or preset for searched, instead of a search",
    )
    shadow = parser.add_argument_group("ShadowKV (default: by the model's width and the length)")
    add = shadow.add_argument
    add("--rank", type=int, help="of the keys' factor")
    add("--budget", type=int, metavar="TOKENS", help="selected in a step")
    add("--chunk", type=int, default=8, metavar="TOKENS", help="default: %(default)s")
    add("--outliers", type=int, metavar="CHUNKS", help="kept exactly")
    losses = parser.add_argument_group("perplexity")
    add = losses.add_argument
    add("--text", metavar="FILE", help="default: the haystack's text")
    add(
        "--windows",
        type=int,
        help="in the text's first tokens, twice a length (default: 4; on the CPU 1)",
    )
    add("--ppl-tokens", type=int, help="last tokens of a window that count (default: 1024)")
    add(
        "--ppl-steps",
        type=int,
        help="last tokens that ShadowKV decodes, counted for all methods (default: 128)",
    )
    files = parser.add_argument_group("files of published benchmarks")
    add = files.add_argument
    add("--ruler", nargs="+", default=(), metavar="FILE", help="TASK/validation.jsonl")
    add("--infinitebench", nargs="+", default=(), metavar="FILE", help="TASK.jsonl")
    add("--longbench", nargs="+", default=(), metavar="FILE", help="any name")
    add("--limit", type=int, metavar="N", help="only the first N examples of a file")
    add(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="prompt and answer; longer prompts lose their middle (default: the model's)",
    )
    add("--chat", action="store_true", help="put their prompts into the model's chat template")
    add = parser.add_argument
    add("--batch", type=int, help="prompts at a time (default: what half of the free memory holds)")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 on cuda, float32 on the cpu",
    )
    add("--output", default=DEFAULT_OUTPUT, metavar="FOLDER", help="default: %(default)s")
    add("--smoke", action="store_true", help="one short length, few examples: tries the command")
    add("--no-progress", action="store_true", help="show no progress bars")  # fmt: skip


def fill_defaults(args: argparse.Namespace) -> None:
    """Puts the device's, or the smoke run's, defaults where nothing was given; checks numbers."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a GPU that torch finds, got cuda")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    common = {"density": 0.2, "ppl_tokens": 1024, "ppl_steps": 128, "tasks": None}
    for name, value in (common | DEFAULTS[args.device] | (SMOKE if args.smoke else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {"examples": 1, "depths": 1, "needles": 1, "windows": 1, "limit": 1, "batch": 1}
    for name, minimum in (least | {"ppl_tokens": 1, "ppl_steps": 1, "max_length": 3}).items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected at least {minimum}, got {value}")
    args.lengths = tuple(sorted(set(args.lengths)))
    if args.lengths[0] < 64:
        raise ValueError(f"--lengths: expected at least 64 tokens, got {args.lengths[0]}")
    if args.parts is None:
        named = args.ruler or args.infinitebench or args.longbench
        args.parts = () if named else PARTS
    args.parts = tuple(part for part in PARTS if part in args.parts)


def run(args: argparse.Namespace) -> int:
    """The command line's ``eval``: returns the exit status."""
    for package in ("transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"eval needs {package}: pip install 'sparseattn[eval]'")
    import torch
    from tqdm.auto import tqdm

    from sparseattn.config import PatternConfig
    from sparseattn.evaluation import forward, methods, published, report, runner, tasks
    from sparseattn.evaluation import model as models
    from sparseattn.evaluation.record import Record
    from sparseattn.search_model import fingerprint

    fill_defaults(args)
    names = tuple(dict.fromkeys(args.tasks or tasks.TASKS))
    for task in names:
        if task not in tasks.TASKS:
            raise ValueError(f"--tasks: expected some of {', '.join(tasks.TASKS)}, got {task!r}")
    chosen = [methods.parse(name) for name in dict.fromkeys(args.methods or methods.DEFAULT)]
    chosen = list(dict.fromkeys(chosen))
    given = None if args.patterns is None else PatternConfig.load(args.patterns)
    files = tuple(
        published.read(benchmark, path, args.limit)
        for benchmark in published.BENCHMARKS
        for path in getattr(args, benchmark)
    )
    text = None
    if "perplexity" in args.parts:
        text = tasks.haystack_text()
        if args.text is not None:
            text = Path(args.text).read_text(encoding="utf-8")
    model, tokenizer = models.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    limit = getattr(model.config, "max_position_embeddings", None)
    lengths = args.lengths if args.parts else ()
    if limit is not None and lengths and lengths[-1] > limit:
        raise ValueError(
            f"--lengths: expected at most the model's {limit} tokens, got {lengths[-1]}"
        )
    max_length = args.max_length or limit
    if files and max_length is None:
        raise ValueError("--max-length: expected a length, as the model names no limit")
    sizes = methods.ShadowSizes(args.rank, args.budget, args.chunk, args.outliers)
    methods.check(chosen, model, sizes, args.density, args.share, lengths, given)
    text_ids = None if text is None else forward.first_tokens(tokenizer, text, 2 * lengths[-1])
    if args.text is not None and text_ids is not None and len(text_ids) < lengths[0]:
        raise ValueError(
            f"--text: expected at least {lengths[0]} tokens, got the {len(text_ids)} of {args.text}"
        )

    folder = runner.output_folder(args.output)
    depths = [n / (args.depths - 1) for n in range(args.depths)] if args.depths > 1 else [0.5]
    plan = runner.Plan(
        methods=tuple(chosen),
        lengths=lengths,
        parts=args.parts,
        tasks=names,
        examples=args.examples,
        depths=tuple(depths),
        needles=args.needles,
        windows=args.windows,
        loss_tokens=args.ppl_tokens,
        loss_steps=args.ppl_steps,
        files=files,
        chat=args.chat,
        max_length=max_length or 0,
        batch=args.batch,
        seed=args.seed,
        sizes=sizes,
    )
    settings = {
        "model": str(args.model),
        "weights": fingerprint(model),
        "device": args.device,
        "dtype": args.dtype,
        "seed": args.seed,
        "examples": args.examples,
        "depths": args.depths,
        "needles": args.needles,
        "density": args.density,
        "share": args.share,
        "fit": args.fit,
        "patterns": None if given is None else _digest(given.dumps()),
        **{name: getattr(args, name) for name in ("rank", "budget", "chunk", "outliers")},
        "text": None if args.text is None else _digest(text or ""),
        **{name: getattr(args, name) for name in ("windows", "ppl_tokens", "ppl_steps")},
        **{name: getattr(args, name) for name in ("limit", "max_length", "chat", "batch")},
    }
    record = Record(folder / "eval.json", settings, _machine(model.device))
    book = methods.PatternBook(
        model,
        # Perplexity is measured on the text's tokens before these.
        runner.fit_prompts(model, tokenizer, args.seed, 2 * lengths[-1] if lengths else 0),
        folder / "patterns",
        density=args.density,
        share=args.share,
        lengths=lengths,
        given=given,
        by_harm=args.fit == "harm",
    )
    work = runner.Runner(model, tokenizer, plan, book, record, text_ids, note=tqdm.write)
    with tqdm(
        total=work.total(), desc="eval", unit="example", disable=args.no_progress or None
    ) as bar:

        def advance(count: int, what: str) -> None:
            bar.set_postfix_str(what)
            bar.update(count)

        try:
            work.run(advance)
        except KeyboardInterrupt:
            tqdm.write(f"interrupted; the same command goes on from {record.path}")
            return 130
    record.write()
    written = report.save(record.data(), folder)
    print(report.text(record.data()))
    print(f"\nwrote {', '.join(str(path) for path in (record.path, *written))}")
    return 0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _machine(device: Any) -> dict[str, Any]:
    """Facts of the machine; the date without the time, so that a rerun adds none."""
    import transformers

    from sparseattn.bench_tools import machine

    facts = machine(device) | {"transformers": transformers.__version__}
    facts.pop("commit")
    return facts | {"date": facts["date"][:10]}
