"""Fails if a kernel spills registers beyond what is allowed here or serialises wgmma.

    python tools/check_sass.py BUILD_LOG [--library libsparseattn_cuda.so]

BUILD_LOG is the output of a build (nvcc runs with ``-Xptxas -v``). With ``--library`` and
``cuobjdump`` on PATH the architectures in the library are listed, too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Allowed(NamedTuple):
    """Kernels that may spill."""

    kernel: str  # regular expression on the mangled name
    limit: int  # bytes a thread, stores and loads each
    reason: str


ALLOWED = (
    Allowed(
        r"sm8016attention_kernel.*Li128E",
        100,
        "portable kernel at head_dim 128: output and score accumulators take the 255 registers; "
        "56 bytes are left over its three loops (one a pattern kind)",
    ),
    Allowed(
        r"sm9016attention_kernel.*Li128E",
        100,
        "Hopper kernel at head_dim 128: the producer warps have 56 registers, the consumers 224; "
        "none of it in the consumers' loop over pairs, a few words between two tiles",
    ),
)

#: ptxas gave up overlapping tensor-core products (it says so as information, not as a warning)
_SERIALISED = re.compile(r"\(C75\d\d\).*serialized.* in the function '(\S+)'")

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture; spills in bytes a thread."""

    name: str
    architecture: str
    stores: int = 0
    loads: int = 0
    registers: int = 0


def parse(log: str) -> list[Kernel]:
    """All kernels of a build log, in its order."""
    kernels: list[Kernel] = []
    function = None
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(*entry.groups()))
        elif properties := _PROPERTIES.search(line):
            function = properties.group(1)
        elif not kernels:
            continue
        elif spills := _SPILLS.search(line):
            # A device function that is not inlined has a line of its own: it counts for its kernel.
            if function != kernels[-1].name or kernels[-1].registers == 0:
                kernels[-1].stores += int(spills.group(2))
                kernels[-1].loads += int(spills.group(3))
        elif registers := _REGISTERS.search(line):
            kernels[-1].registers = int(registers.group(1))
    return kernels


def demangled(name: str) -> str:
    """Without the parameter list, if c++filt is there; else as it came."""
    if shutil.which("c++filt") is None:
        return name
    run = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True)
    return re.sub(r"\(anonymous namespace\)::", "", run.stdout.strip())


def check(kernels: list[Kernel]) -> list[str]:
    """Prints the kernels that spill; returns what is wrong."""
    wrong = []
    for kernel in kernels:
        spilled = max(kernel.stores, kernel.loads)
        if not spilled:
            continue
        allowed = next((a for a in ALLOWED if re.search(a.kernel, kernel.name)), None)
        text = (
            f"{kernel.architecture} {demangled(kernel.name)}: {kernel.stores} bytes of spill "
            f"stores, {kernel.loads} of spill loads, {kernel.registers} registers"
        )
        if allowed is None:
            wrong.append(f"{text}: no spills expected")
        elif spilled > allowed.limit:
            wrong.append(f"{text}: at most {allowed.limit} bytes expected")
        else:
            print(f"{text}: allowed ({allowed.reason})")
    return wrong


def architectures(library: Path) -> str:
    """Machine code and PTX in a library, as cuobjdump lists them."""
    found = []
    for option, kind in (("--list-elf", "sm"), ("--list-ptx", "PTX sm")):
        run = subprocess.run(
            ["cuobjdump", option, str(library)], capture_output=True, text=True, check=True
        )
        found += sorted({f"{kind}_{sm}" for sm in re.findall(r"\.sm_(\w+)\.", run.stdout)})
    return ", ".join(found)


def main() -> int:
    """Exit status 1: spills that are not allowed, or a log without kernels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--library", type=Path)
    args = parser.parse_args()
    log = args.log.read_text(encoding="utf-8", errors="replace")
    kernels = parse(log)
    wrong = check(kernels)
    wrong += [f"{demangled(name)}: wgmma serialised" for name in set(_SERIALISED.findall(log))]
    if not kernels:
        wrong.append(f"{args.log}: expected lines of ptxas -v, got none (nothing was compiled?)")
    for text in wrong:
        print(text, file=sys.stderr)
    counts = sorted({k.architecture for k in kernels})
    most = max((k.registers for k in kernels), default=0)
    print(f"{len(kernels)} kernels ({', '.join(counts)}), at most {most} registers")
    if args.library is not None and shutil.which("cuobjdump"):
        print(f"{args.library.name}: {architectures(args.library)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
