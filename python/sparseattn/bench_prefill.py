"""Prefill attention of one layer: sparse_attention, estimate included, against dense attention.

Every row is a length and a mix (the patterns of the layer's heads). q and k are built so that their
attention mass lies on clustered offsets and few columns, as real heads have it (structured_qk in
sparseattn.bench_inputs); v is normal noise. A preset counts as the mean over its layers.

Dense alternatives: this library's dense list, and torch's SDPA by its cuDNN and flash backends (on
the CPU by torch's choice). Times are whole calls: on a GPU device events, the L2 cache flushed
before every call, the median of several after a warm-up. Density is the pairs that rows see over
the causal pairs. TFLOP/s count 4 * head_dim operations a selected pair, pairs in whole 64-wide
tiles and blocks, as the kernels work. Extra memory is a call's peak on the device beside its
output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sparseattn import bench_mixes, bench_tools, policy
from sparseattn.bench_layer import DENSE_LIST, Length, Setting, measure
from sparseattn.bench_mixes import Mix
from sparseattn.info import path as path_of
from sparseattn.patterns import PATTERNS, Dense

GPU_LENGTHS = tuple(4096 << bit for bit in range(9))
CPU_LENGTHS = (1024, 2048, 4096, 8192)
# --- what is made of the rows ----------------------------------------------------------------


def wins_from(rows: list[dict[str, Any]], mix: str) -> int | None:
    """The shortest measured length from which on a mix is never slower than dense, or None."""
    found = None
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        if row["mix"] == mix and "speedup" in row:
            if row["speedup"] < 1:
                break
            found = row["tokens"]
    return found


def policy_classes(mixes: tuple[Mix, ...], rows: list[dict[str, Any]]) -> list[policy.MixClass]:
    """The measured ratios to the fastest dense alternative: of mixes of one pattern, and of the
    dense list."""
    ratios: dict[Any, dict[int, float]] = {Dense(): {}}
    patterns = {mix.name: mix.pattern for mix in mixes if mix.pattern is not None}
    for row in rows:
        dense = row["dense_ms"]
        if DENSE_LIST in dense:
            fastest = dense[row["fastest_dense"]]
            ratios[Dense()][row["tokens"]] = round(dense[DENSE_LIST] / fastest, 4)
        if row["mix"] in patterns and "speedup" in row:
            found = ratios.setdefault(patterns[row["mix"]], {})
            found[row["tokens"]] = round(1 / row["speedup"], 4)
    return [policy.MixClass(pattern, found) for pattern, found in ratios.items() if found]


def render(setting: Setting, facts: dict[str, Any], lengths: list[Length]) -> str:
    """The table, with what it was measured on and how."""
    columns = [
        ("tokens", "tokens", "d"),
        ("mix", "mix", ""),
        ("density", "density", ".4f"),
        ("ms", "ms", ".3f"),
        *((name, f"{name} ms", ".3f") for name in setting.dense_names),
        ("speedup", "speed-up", ".2f"),
        ("tflops", "TFLOP/s", ".3g"),
        ("extra_mib", "extra MiB", ".0f"),
    ]
    shown, notes = [], []
    for length in lengths:
        dense = {
            name: one.get("ms", one.get("note", "").partition(":")[0])
            for name, one in length.dense.items()
        }
        notes += [
            f"{length.tokens} tokens, {name}: {one['note']}"
            for name, one in length.dense.items()
            if "note" in one
        ]
        for row in length.rows:
            extra = row.get("extra_bytes")
            cells = {"extra_mib": None if extra is None else extra / 2**20, "ms": row.get("note")}
            shown.append({**cells, **row, **dense})
        notes += [f"stopped: {length.stopped}"] if length.stopped else []
    rows = [row for length in lengths for row in length.rows]
    wins = [(mix.name, wins_from(rows, mix.name)) for mix in setting.mixes]
    return "\n".join(
        [
            bench_tools.machine_line(facts),
            f"1 layer, {setting.heads} query heads, {setting.kv_heads} kv heads, "
            f"D={setting.head_dim}, {setting.facts()['dtype']}, path {setting.facts()['path']}; "
            "sparse_attention with its estimate; speed-up over the fastest dense alternative",
            bench_tools.format_table(shown, columns),
            *notes,
            "",
            "sparse is never slower than dense, at the measured lengths, from",
            *(f"  {name:36}  {f'{x} tokens on' if x else 'none of them'}" for name, x in wins),
        ]
    )


# --- command line ----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``sparseattn bench prefill``."""
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="multiples of 64 (default: 4096 8192 ... 1048576; on the CPU 1024 ... 8192)",
    )
    parser.add_argument(
        "--mixes",
        nargs="+",
        metavar="MIX",
        help='"vertical_slash (1000, 6096)", "block_sparse 100", "a_shape (1024, 4096)", the name '
        'of a preset, a file of patterns, or "all" for the named ones and every preset '
        f"(default: {', '.join(bench_mixes.DEFAULT)})",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--heads", type=int, help="query heads (default: 32; on the CPU 8)")
    parser.add_argument("--kv-heads", type=int, help="default: 8; on the CPU 2")
    parser.add_argument("--head-dim", type=int, help="default: 128")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16"
    )
    parser.add_argument(
        "--budget-ms", type=float, default=500.0, help="timed span of a case (default: %(default)s)"
    )
    parser.add_argument(
        "--dense-limit-s",
        type=float,
        default=30.0,
        help="skip a dense alternative whose one call would take longer (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", metavar="FOLDER", help="write prefill.json, prefill.txt and prefill.png there"
    )
    parser.add_argument(
        "--record-policy",
        metavar="FILE",
        help="write the measured ratios as a table for hf.enable(min_length=FILE); a table that is "
        "there keeps its other paths",
    )
    parser.add_argument("--commit", default="unknown", help="commit to record")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")


def parse(args: argparse.Namespace) -> Setting:
    """The setting that the arguments ask for; ValueError names the one that is wrong."""
    cuda = torch.cuda.is_available() and not args.smoke
    device = torch.device(args.device or ("cuda" if cuda else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a GPU that torch finds, got cuda")
    on_gpu = device.type == "cuda"
    defaults = (32, 8, 128) if on_gpu else (8, 2, 128)
    lengths, mixes = GPU_LENGTHS if on_gpu else CPU_LENGTHS, bench_mixes.DEFAULT
    if args.smoke:
        defaults, lengths, mixes = (4, 2, 64), (256, 512), bench_mixes.SMOKE
    heads, kv_heads, head_dim = (
        default if given is None else given
        for given, default in zip((args.heads, args.kv_heads, args.head_dim), defaults, strict=True)
    )
    lengths = tuple(sorted(set(args.lengths or lengths)))
    for tokens in lengths:
        if tokens < 64 or tokens % 64 or tokens >= 2**31 - 128:
            raise ValueError(f"--lengths: expected multiples of 64 below 2**31 - 128, got {tokens}")
    for name, value in (("--heads", heads), ("--kv-heads", kv_heads)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if heads % kv_heads:
        raise ValueError(f"--kv-heads: expected a divisor of {heads}, got {kv_heads}")
    for name, value in (("--budget-ms", args.budget_ms), ("--dense-limit-s", args.dense_limit_s)):
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")
    dtype = getattr(torch, args.dtype or "bfloat16")
    path = path_of(device, dtype, head_dim)
    if path.startswith("refused: "):
        raise ValueError(f"--dtype, --head-dim: {path}")
    setting = Setting(
        device,
        dtype,
        heads,
        kv_heads,
        head_dim,
        lengths,
        tuple(bench_mixes.resolve(args.mixes or mixes, heads)),
        min(args.budget_ms, 20.0) if args.smoke else args.budget_ms,
        args.dense_limit_s,
        args.seed,
    )
    if args.record_policy is not None:
        kinds = {"dense"} | {mix.pattern.kind for mix in setting.mixes if mix.pattern}
        missing = sorted(set(PATTERNS) - kinds)
        if missing:
            raise ValueError(
                "--record-policy: expected --mixes that have a layer all of one pattern of each "
                f"kind, got none of {', '.join(missing)}"
            )
    return setting


def run(args: argparse.Namespace) -> int:
    """``sparseattn bench prefill``: returns the exit status."""
    setting = parse(args)
    output = None if args.output is None else Path(args.output)
    if output is not None:
        from sparseattn import bench_plots  # matplotlib must be there before the time is spent

        output.mkdir(parents=True, exist_ok=True)
    facts = bench_tools.machine(setting.device, args.commit)
    lengths: list[Length] = []
    for length in measure(setting):
        lengths.append(length)
        rows = [row for one in lengths for row in one.rows]
        if output is not None:  # after every length: an interrupted run leaves what it has
            write_record(output / "prefill.json", setting, facts, lengths)
    text = render(setting, facts, lengths)
    print(text)
    if output is not None:
        (output / "prefill.txt").write_text(text + "\n", encoding="utf-8")
        bench_plots.save(output / "prefill.json", output / "prefill.png")
        print(f"\nwrote {', '.join(str(output / f'prefill.{x}') for x in ('json', 'txt', 'png'))}")
    if args.record_policy is not None:
        record_policy(args.record_policy, setting, facts, rows)
        print(f"wrote {args.record_policy}")
    return 0


def write_record(
    path: Path, setting: Setting, facts: dict[str, Any], lengths: list[Length]
) -> None:
    """The JSON record: setting, where sparse wins, the dense times and the rows of the mixes."""
    rows = [row for length in lengths for row in length.rows]
    bench_tools.write_record(
        path,
        "prefill",
        facts,
        **setting.facts(),
        stopped=lengths[-1].stopped,
        wins_from={mix.name: wins_from(rows, mix.name) for mix in setting.mixes},
        dense=[
            {"tokens": length.tokens, "name": name, **one}
            for length in lengths
            for name, one in length.dense.items()
        ],
        results=rows,
    )


def record_policy(
    file: str, setting: Setting, facts: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes the measured ratios as the table's entry of this path."""
    measured = {
        "device": facts.get("gpu", facts["cpu"]),
        "date": facts["date"][:10],
        **{name: facts[name] for name in ("torch", "sparseattn", "commit")},
        "dense": f"fastest of {', '.join(setting.dense_names)}",
        **{name: setting.facts()[name] for name in ("heads", "kv_heads", "head_dim", "dtype")},
    }
    classes = policy_classes(setting.mixes, rows)
    missing = set(PATTERNS) - {one.pattern.kind for one in classes}
    if missing:
        raise ValueError(f"--record-policy: nothing was measured of {', '.join(sorted(missing))}")
    policy.save(file, setting.facts()["path"].split()[0], classes, measured)
