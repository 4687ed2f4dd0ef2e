"""Makes the records of docs/results.md anew on a machine with GPUs, and packs them.

    python benchmarks/record_all.py --output records --commit ID
    python benchmarks/record_all.py --output records --only tests eval-needle --devices 0 1

Builds nothing: the installed package is what is measured. Each device takes the next record that
is left, in the order of ``--list``; records on one machine share its CPU and host memory, so
timings that depend on those want one device. A record that fails, or takes longer than
``--timeout``, does not stop the others. What each prints is in NAME.log; ``records.json`` says how
each ended, and with ``--pack FILE`` all of it goes into one archive, anew after every record.
racecheck wants a build of its own (``gpu_record.py`` says why): it runs with
``--racecheck-package FOLDER`` only.
Put files that are to stay into results/, then run ``results_page.py --write`` and
``readme_table.py --write``.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EVAL_METHODS = (
    "dense", "vertical_slash", "shadowkv", "vertical_slash+shadowkv", "a_shape", "block_sparse",
    "adaptive", "searched", "searched+shadowkv",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A command of Python: ``{out}`` is the output folder, ``{commit}`` the commit."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def _script(name: str, path: str, *options: str, **environment: str) -> Record:
    """One that takes ``--commit``, and writes ``{out}/NAME.json``."""
    command = (path, "--output", f"{{out}}/{name}.json", "--commit", "{commit}", *options)
    return Record(name, command, tuple(environment.items()))


FP8 = ("--values", "fp8", "--factor", "fp8")
WHOLE_MODELS = ("--batches", "1", "--steps", "32", "--host-values", "shared")
RECORDS = (
    _script("tests", "tests/gpu_record.py", "--log", "{out}/tests.log.txt"),
    _script("prefill-bars", "benchmarks/prefill_bars.py", "--budget-ms", "100", "--repeats", "10"),
    Record(
        "eval-needle",
        ("-m", "sparseattn", "eval", "needle", "--device", "cuda", "--lengths", "32768",
         "--examples", "40", "--depths", "6", "--needles", "2", "--batch", "8",
         "--methods", *EVAL_METHODS, "--output", "{out}/eval-needle"),
    ),
    Record(
        "bench-prefill",
        ("-m", "sparseattn", "bench", "prefill", "--budget-ms", "50", "--dense-limit-s", "60",
         "--output", "{out}/bench-prefill", "--record-policy", "{out}/min_lengths.json"),
    ),
    _script(
        "peers", "benchmarks/peers/run.py",
        "--lengths", "32768", "--budget-ms", "40", "--repeats", "5",
    ),
    _script("decode-step", "benchmarks/decode_step.py", "--repeats", "8", "--budget-ms", "20"),
    _script("decode-fp8", "benchmarks/decode_fp8.py"),
    _script("decode-model", "benchmarks/decode_model.py", *WHOLE_MODELS, *FP8),
    _script("decode-model-bf16", "benchmarks/decode_model.py", *WHOLE_MODELS),
    Record("demo", ("-m", "sparseattn", "demo", "--device", "cuda", "--output", "{out}/demo")),
    _script(
        "end-to-end", "benchmarks/end_to_end.py", "--dense-limit-s", "15",
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    ),
)  # fmt: skip


@dataclass
class Outcome:
    name: str
    device: str
    seconds: float
    exit_status: int | None  # null: it ran out of time


def command_of(record: Record, arguments: argparse.Namespace) -> list[str]:
    places = {"out": str(arguments.output), "commit": arguments.commit}
    command = [part.format(**places) for part in record.command]
    if record.name == "tests":
        package = arguments.racecheck_package
        command += ["--racecheck-package", package] if package else ["--sanitizer", "memcheck"]
    return command


def run(record: Record, device: str, arguments: argparse.Namespace) -> Outcome:
    environment = {**os.environ, **dict(record.environment), "CUDA_VISIBLE_DEVICES": device}
    command = [sys.executable, *command_of(record, arguments)]
    start = time.monotonic()
    with open(arguments.output / f"{record.name}.log", "w", encoding="utf-8") as log:
        # A session of its own: what it started ends with it, and leaves the device to the next.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status: int | None = process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(record.name, device, round(time.monotonic() - start, 1), status)


def pack(out: Path, archive: Path) -> None:
    """Replaces the archive by one of the whole folder."""
    new = archive.with_name(archive.name + ".new")
    with tarfile.open(new, "w:gz") as tar:
        tar.add(out, arcname=out.name)
    new.replace(archive)


def run_all(chosen: Sequence[Record], arguments: argparse.Namespace) -> list[Outcome]:
    left: queue.SimpleQueue[Record] = queue.SimpleQueue()
    for record in chosen:
        left.put(record)
    done: list[Outcome] = []
    lock = threading.Lock()

    def work(device: str, bar: Any) -> None:
        while True:
            try:
                record = left.get_nowait()
            except queue.Empty:
                return
            found = run(record, device, arguments)
            with lock:
                done.append(found)
                text = json.dumps([asdict(one) for one in done], indent=2) + "\n"
                (arguments.output / "records.json").write_text(text, encoding="utf-8")
                if arguments.pack is not None:
                    pack(arguments.output, arguments.pack)
                bar.update()

    with tqdm(total=len(chosen), unit="record", disable=None) as bar:
        threads = [threading.Thread(target=work, args=(name, bar)) for name in arguments.devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return done


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [record.name for record in RECORDS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("records"), help="folder")
    parser.add_argument("--commit", default="unknown", help="that is measured")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--devices", nargs="+", default=["0"], help="numbers (default: 0)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds, of each")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="a .tar.gz of the folder")
    parser.add_argument("--racecheck-package", metavar="FOLDER", help="for the record of the tests")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output.resolve()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a record failed or ran out of time."""
    arguments = parse_arguments(argv)
    chosen = [one for one in RECORDS if not arguments.only or one.name in arguments.only]
    if arguments.list:
        for record in chosen:
            before = " ".join(f"{name}={value} " for name, value in record.environment)
            print(f"{record.name}: {before}python {' '.join(command_of(record, arguments))}")
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = run_all(chosen, arguments)
    for found in done:
        how = "out of time" if found.exit_status is None else f"exit status {found.exit_status}"
        print(f"{found.name:20s} {found.seconds:8.1f} s  {how}")
    return int(any(found.exit_status != 0 for found in done))


if __name__ == "__main__":
    sys.exit(main())
