"""Runs the GPU suite and compute-sanitizer, and writes a record for benchmarks/results/.

    python tests/gpu_record.py --commit ID --output benchmarks/results/DATE-GPU-tests.json

Not a test module. It builds nothing: the installed package is what is tested. Most of the suite's
time is the fp64 oracle on the CPU, so workers (pytest-xdist, where it is there) have one thread;
the sanitizer runs beside the suite. racecheck does not follow an arrival at a barrier that one lane
makes for its warp: ``--racecheck-package`` names a folder with the package built with
``SPARSEATTN_RACECHECK``, in which all lanes arrive.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sparseattn import bench_tools

TESTS = Path(__file__).parent
FAMILIES, HEAD_DIMS, DTYPES = ("prefill", "shadow"), (64, 96, 128), ("bfloat16", "float16")
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def run_suite(args: argparse.Namespace) -> dict[str, Any]:
    """pytest -k cuda: counts, seconds, and the first failures."""
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-k", args.select, "-rf"]
    command += ["--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    if importlib.util.find_spec("xdist") and args.workers > 1:
        command += ["-n", str(args.workers)]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(args.test_timeout), "--timeout-method", "thread"]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=args.timeout,
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        output, status = (late.stdout or b"").decode(errors="replace"), None
    if args.log:
        args.log.write_text(output)
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for line in reversed(output.splitlines()):
        found = _COUNT.findall(line)
        if found:
            counts |= {name: int(count) for count, name in found}
            break
    failures = [line for line in output.splitlines() if line.startswith("FAILED ")]
    return {
        "command": " ".join(["pytest", *command[3:]]).replace(f"{TESTS}", "tests"),
        "exit_status": status,  # null: it ran out of time
        "seconds": round(time.monotonic() - start, 1),
        **counts,
        "first_failures": failures[:20],
    }


def run_sanitizer(tool: str, package: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """compute-sanitizer over tests/sanitize.py, a process for each dtype, head_dim and family."""
    if shutil.which("compute-sanitizer") is None:
        return {"skipped": "compute-sanitizer was not found"}
    cases = [
        ["--family", family, "--dtype", dtype, "--head-dim", str(dim)]
        for family in FAMILIES
        for dim in args.sanitize_head_dim or HEAD_DIMS
        for dtype in args.sanitize_dtype or DTYPES
    ]
    with ThreadPoolExecutor(args.sanitizer_workers) as pool:
        runs = list(pool.map(lambda case: sanitize(tool, case, package, args), cases))
    failed = [run for run in runs if run["exit_status"] != 0]
    return {
        "build": "SPARSEATTN_RACECHECK" if package else "as shipped",
        "exit_status": failed[0]["exit_status"] if failed else 0,  # null: it ran out of time
        "runs": runs,
    }


def sanitize(
    tool: str, options: list[str], package: Path | None, args: argparse.Namespace
) -> dict[str, Any]:
    """One process: exit status 0 if nothing was found, and the tool's summary."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable]
    command += [str(TESTS / "sanitize.py"), *options]
    env = dict(os.environ)
    if package is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(package), env.get("PYTHONPATH", "")])
    run: dict[str, Any] = {"of": " ".join(["sanitize.py", *options])}
    start, timeout = time.monotonic(), args.sanitizer_timeout
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return run | {"exit_status": None, "last_lines": [f"more than {timeout} s"]}
    return run | {
        "exit_status": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "last_lines": done.stdout.splitlines()[-1 if done.returncode == 0 else -12 :],
    }


def main() -> int:
    """Exit status 1: a test failed, or the sanitizer found something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--log", type=Path, help="pytest's whole output")
    parser.add_argument("--select", default="cuda", help="pytest -k")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--timeout", type=float, default=500, help="seconds for the suite")
    parser.add_argument("--test-timeout", type=float, default=100, help="seconds for one test")
    parser.add_argument("--sanitizer", nargs="*", default=["memcheck", "racecheck"], help="tools")
    parser.add_argument("--sanitizer-timeout", type=float, default=300, help="seconds, a process")
    parser.add_argument("--sanitizer-workers", type=int, default=6, help="processes of each tool")
    parser.add_argument("--sanitize-dtype", action="append", choices=DTYPES, help="default: all")
    parser.add_argument("--sanitize-head-dim", action="append", type=int, choices=HEAD_DIMS)
    parser.add_argument("--racecheck-package", type=Path, help="folder to import from instead")
    parser.add_argument("--commit", required=True, help="commit that is tested")
    args = parser.parse_args()
    record = bench_tools.machine(torch.device("cuda"), args.commit)
    with ThreadPoolExecutor() as pool:
        runs = {
            tool: pool.submit(
                run_sanitizer, tool, args.racecheck_package if tool == "racecheck" else None, args
            )
            for tool in args.sanitizer
        }
        record["suite"] = run_suite(args)
        record["sanitizer"] = {tool: run.result() for tool, run in runs.items()}
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({"suite": record["suite"], "sanitizer": record["sanitizer"]}, indent=2))
    clean = all(run.get("exit_status", 0) == 0 for run in record["sanitizer"].values())
    return 0 if record["suite"]["exit_status"] == 0 and clean else 1


if __name__ == "__main__":
    sys.exit(main())
