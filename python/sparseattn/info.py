"""What is installed, what was built, which devices are there, and which path each shape takes."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from sparseattn import _C

HEAD_DIMS = (16, 32, 64, 96, 128, 256)  # that the report lists
_DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("bfloat16", "float16", "float32")}
_TAKEN_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
_TAKEN_HEAD_DIMS = {"cpu": (16, 32, 64, 96, 128), "cuda": (64, 96, 128)}
_OLDEST_CAPABILITY = (8, 0)


def info() -> dict[str, Any]:
    """Facts about this installation, as JSON-ready values.

    Keys: ``versions`` (sparseattn, python, torch, cuda of torch, cuda and cutlass the library was
    built with, compiler, transformers; None where absent), ``built`` (cuda, cuda_architectures,
    cpu_isa), ``devices`` (name and, for GPUs, capability and memory_bytes) and ``paths``: for every
    device type present, dtype and head_dim the path that the operators take, or "refused: ..." with
    the reason.
    """
    build = _C.build_info()
    return {
        "versions": {
            "sparseattn": build["version"],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "built_with_cuda": build["cuda_version"] or None,
            "built_with_cutlass": build["cutlass_version"] or None,
            "compiler": build["compiler"],
            "transformers": _version_of("transformers"),
        },
        "built": {key: build[key] for key in ("cuda", "cuda_architectures", "cpu_isa")},
        "devices": _devices(),
        "paths": _paths(),
    }


def path(device: str | torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The path that attention takes there, or "refused: " and the reason."""
    device = torch.device(device)
    if device.type not in _TAKEN_DTYPES:
        return f"refused: device: expected cpu or cuda, got {device.type}"
    dtype_name, kind = str(dtype).removeprefix("torch."), device.type
    if dtype_name not in _TAKEN_DTYPES[kind]:
        return f"refused: dtype: expected {' or '.join(_TAKEN_DTYPES[kind])}, got {dtype_name}"
    if head_dim not in _TAKEN_HEAD_DIMS[kind]:
        taken = ", ".join(map(str, _TAKEN_HEAD_DIMS[kind]))
        return f"refused: head_dim: expected one of {taken}, got {head_dim}"
    if kind == "cpu":
        return f"cpu {_C.cpu_path()}"
    if not _C.build_info()["cuda"]:
        return "refused: device: this build has no CUDA code"
    if not torch.cuda.is_available():
        return "refused: device: torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"refused: device: expected sm_80 or newer, got sm_{capability[0]}{capability[1]}"
    if capability == (9, 0) and "90a" in _C.build_info()["cuda_architectures"]:
        return "sm90 WGMMA and TMA"
    return "sm80 portable mma.sync"


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": cpu_name(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def cpu_name() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _paths() -> list[dict[str, Any]]:
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        {
            "device": kind,
            "dtype": dtype,
            "head_dim": head_dim,
            "path": path(kind, getattr(torch, dtype), head_dim),
        }
        for kind in kinds
        for dtype in _DTYPES[kind]
        for head_dim in HEAD_DIMS
    ]


def render(facts: dict[str, Any]) -> str:
    """The facts of ``info()`` as text; neighbouring head dims of one path share a line."""
    lines = ["versions"]
    lines += [f"  {name:20} {value or '-'}" for name, value in facts["versions"].items()]
    built = facts["built"]
    lines.append("built")
    architectures = ", ".join(built["cuda_architectures"]) if built["cuda"] else "no (CPU only)"
    lines.append(f"  {'cuda':20} {architectures}")
    lines.append(f"  {'cpu':20} {', '.join(built['cpu_isa'])}")
    lines.append("devices")
    for device in facts["devices"]:
        if "capability" in device:
            major, minor = device["capability"]
            detail = f"sm_{major}{minor}, {device['memory_bytes'] / 2**30:.0f} GiB"
        else:
            detail = f"{device['threads']} threads"
        lines.append(f"  {device['device']:20} {device['name']} ({detail})")
    lines.append("paths (device, dtype, head_dim)")
    lines += _path_lines(facts["paths"])
    return "\n".join(lines)


def _path_lines(paths: list[dict[str, Any]]) -> list[str]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for entry in paths:
        text = entry["path"].rpartition(", got ")[0] or entry["path"]
        groups.setdefault((entry["device"], entry["dtype"], text), []).append(entry["head_dim"])
    return [
        f"  {device:5} {dtype:9} {','.join(map(str, dims)):20} {text}"
        for (device, dtype, text), dims in groups.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line's ``info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command line's ``info``: returns the exit status."""
    facts = info()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0
