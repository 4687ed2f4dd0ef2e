"""Fixtures: every test runs on the CPU and, where operators and a device are there, on the GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLACES, Place, cuda_reason
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples in every run; --hypothesis-profile=explore draws anew
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("default")


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large(gib): needs this much free GPU memory")
    config.addinivalue_line("markers", "cuda: needs a GPU and the CUDA operators")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marks = {mark.name: mark for mark in item.iter_markers()}
    if "cuda" in marks or "large" in marks:
        _require_cuda()
    if "large" in marks:
        (gib,) = marks["large"].args
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib} GiB of free GPU memory, found {free:.1f}")


def _require_cuda() -> None:
    reason = cuda_reason()
    if reason:
        pytest.skip(reason)


def _place(request: pytest.FixtureRequest) -> Place:
    place = request.param
    if place.device == "cuda":
        _require_cuda()
    return place


@pytest.fixture(scope="module", params=PLACES, ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    """A device and a dtype, all that the operators take."""
    return _place(request)


@pytest.fixture(scope="module", params=[PLACES[0], PLACES[2]], ids=str)
def main_place(request: pytest.FixtureRequest) -> Place:
    """One dtype per device: fp32 on the CPU, bf16 on the GPU."""
    return _place(request)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of benchmarks/ by its name."""
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks: not a checkout of the repository")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toy shapes gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
