"""docs/results.md is what the records give, and the page takes whatever records are there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {
    "gpu": "NVIDIA H200",
    "cpu": "some",
    "torch": "2.11",
    "commit": "0123456789abcdef",
    "date": "2026-11-26T10:00:00+00:00",
}


@pytest.fixture
def page(monkeypatch):
    """The module results_page of benchmarks/."""
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks: not a checkout of the repository")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("results_page")


def cell(kind, method, task, length, score, **more):
    examples = [{"score": score}] * 4
    return {
        "kind": kind,
        "method": method,
        "task": task,
        "length": length,
        "density": 0.2,
        "score": score,
        "examples": examples,
        **more,
    }


EVAL = {
    "format": "sparseattn-eval",
    "version": 1,
    "settings": {"model": "/somewhere/needle"},
    "machines": [MACHINE],
    "cells": [
        cell("niah", "dense", "niah_single", 4096, 1.0),
        cell("niah", "dense", "niah_single", 32768, 0.975),
        cell("task", "dense", "common_words", 4096, 0.5),
        cell("task", "shadowkv", "common_words", 4096, 0.25, cache_bytes=3 << 20),
        cell("perplexity", "dense", "perplexity", 4096, 30.25, decode_score=26.5),
        cell("perplexity", "shadowkv", "perplexity", 4096, None, decode_score=26.75),
    ],
}
STEP = {"shape": "Llama", "tokens": 124928, "batch": 1, "mode": "graph"}
DECODE_STEP = {
    "benchmark": "decode-step",
    "machine": MACHINE,
    "arguments": {"hits": 0.35},
    "rank": 160,
    "complete": True,
    "summary": {"bars": 1, "met": 1},
    "judged": [
        {
            "target": "T9",
            "tokens": 124928,
            "case": "Llama, step, host, graph",
            "value": 0.0987,
            "bar": "<= 0.2 ms",
            "bar_field": "ms",
            "met": True,
        }
    ],
    "results": [
        STEP | {"case": "select", "ms": 0.0123},
        STEP | {"case": "step, host", "ms": 0.0987},
        STEP | {"case": "dense, SDPA flash", "ms": 0.142},
        STEP | {"case": "compress, whole", "ms": 7.5, "mode": "eager"},
        STEP | {"case": "all", "note": "out of memory"},
    ],
}
END_TO_END = {
    "benchmark": "end-to-end",
    "machine": MACHINE,
    "complete": True,
    "weights": "random",
    "judged": [{"target": "T13", "tokens": 131072, "case": "sparse prefill", "ttft_s": 4.321}],
    "results": [
        {"model": "M", "way": "pinned memory", "pin_s": 12.5},
        {
            "model": "M",
            "way": "sparse",
            "tokens": 131072,
            "ttft_s": 4.321,
            "density": 0.0321,
            "cache_bytes": {"factor": 5 << 20, "host_values": 256 << 20},
        },
        {"model": "M", "way": "sparse", "tokens": 131072, "mode": "graph", "ms_per_token": 9.876},
        {"model": "M", "way": "dense, SDPA", "tokens": 131072, "note": "skipped"},
    ],
}
PEERS = {
    "benchmark": "peers",
    "machine": MACHINE,
    "complete": True,
    "peers": {"vLLM sparse": {"available": False, "detail": "No module named 'vllm'"}},
    "results": [
        {"tokens": 32768, "case": "dense", "peer": "sparseattn", "ms": 13.5},
        {"tokens": 32768, "case": "dense", "peer": "FlashAttention-3", "ms": 12.9, "ratio": 0.96},
        {"tokens": 32768, "case": "dense", "peer": "broken", "note": "failed: KeyError"},
    ],
}
CPP = {
    "benchmark": "cpp_decode",
    "machine": {"gpu": "NVIDIA H200", "date": "2026-11-26T11:00:00+00:00"},
    "arguments": {"commit": "fedcba"},
    "results": [{"part": "select", "mode": "graph", "us": 9.75, "floor_us": 8.5}],
}
MODEL = {
    "benchmark": "decode-model",
    "machine": MACHINE,
    "results": [
        {
            "model": "M",
            "way": "dense",
            "mode": "graph",
            "batch": 4,
            "tokens": 124928,
            "tokens_per_s": 80.5,
        }
    ],
}
TESTS = {
    "date": "2026-11-24",
    "machine": "one NVIDIA H200",
    "commit": "abc",
    "passed": 749,
    "failed": 0,
    "sanitizer": {
        "memcheck": {
            "build": "as shipped",
            "runs": 2 * [{"last_lines": ["========= ERROR SUMMARY: 0 errors"]}],
        }
    },
}


def put(folder, **records):
    for name, record in records.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


def test_the_page_is_up_to_date(page, capsys):
    """`python benchmarks/results_page.py --write` after a record comes or goes."""
    assert page.main(["--check"]) == 0, capsys.readouterr().err


def test_readme_names_the_page():
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks: not a checkout of the repository")
    assert "docs/results.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_records(page, tmp_path):
    text, pictures = page.render(tmp_path, tmp_path / "results.md")
    kinds = [part for section in page.SECTIONS for part in section.parts]
    assert text.count(page.ABSENT) == len(kinds) and not pictures


def test_every_kind(page, tmp_path):
    folder = tmp_path / "records"
    put(
        folder,
        needle__eval=EVAL,
        needle__patterns={"some": "file"},
        step=DECODE_STEP,
        whole=END_TO_END,
        peers=PEERS,
        cpp=CPP,
        model=MODEL,
        model8=MODEL | {"arguments": {"values": "fp8", "factor": "bf16"}},
        fp8={
            "benchmark": "decode-fp8",
            "machine": MACHINE,
            "results": [{"kind": "both", "case": "step, host", "ms": 0.08, "error": 0.025}],
        },
        tests=TESTS,
        other={"benchmark": "unheard-of", "machine": MACHINE},
    )
    text, pictures = page.render(folder, tmp_path / "docs" / "results.md")
    for line in (
        "[needle/eval.json](../records/needle/eval.json), one NVIDIA H200, 2026-11-26, commit "
        "0123456789ab, torch 2.11, needle.",
        "| dense | 20.0 | - | 100.0 | 97.5 | 98.8 |",
        "| shadowkv | 20.0 | 3.0 | 25.0 |",
        "| method | prefill keys, % | cache, MiB | 4,096 | 4,096, last tokens one by one |",
        "| shadowkv | 20.0 | - | - | 26.75 |",
        "1 of 1 bars met.",
        "| Llama, step, host, graph | T9 | 124,928 | 0.099 | - | <= 0.2 ms: met |",
        "| Llama | 124,928 | 1 | 0.012 | - | - | - | - | 0.099 | - | - | 0.142 |",
        "| sparse prefill | T13 | 131,072 | 4.321 | - | - |",
        "| M | sparse | 131,072 | 5.0 | 256.0 |",
        "| both | step, host | 0.080 | 0.025 |",
        "commit 0123456789ab, torch 2.11, values in fp8.",
        "| dense | 32,768 | 13.50 | 12.90 (0.96) |",
        "vLLM sparse: No module named 'vllm'.",
        "failed: KeyError",
        "one NVIDIA H200, 2026-11-26, commit fedcba.",
        "| select | graph | 9.750 | 8.500 |",
        "| M | dense | graph | 4 | 80.50 |",
        "| suite, passed | 749 |",
        "| memcheck | 2 of 2 runs: ERROR SUMMARY: 0 errors, build as shipped |",
        "| [other.json](../records/other.json) | unheard-of | NVIDIA H200 | 2026-11-26 |",
    ):
        assert line in text.replace("\n", " ") or line in text, line
    assert "/somewhere" not in text and "patterns.json" not in text
    names = {path.name for _, path in pictures}
    assert names == {"needle-eval.png", "step.png", "whole.png", "model.png", "model8.png"}


def test_newest_complete_record(page, tmp_path):
    later = MACHINE | {"date": "2026-12-01T00:00:00+00:00"}
    put(
        tmp_path,
        a=CPP,
        b=CPP | {"results": [{"part": "newer"}], "machine": later},
        c=CPP | {"results": [{"part": "cut"}], "machine": later, "complete": False},
    )
    text, _ = page.render(tmp_path, tmp_path / "results.md")
    assert "newer" in text and "cut short" not in text and "| select |" not in text
    assert text.count("| yes |") == 1 and text.count("| no |") == 2
    for name in "ab":
        (tmp_path / f"{name}.json").unlink()
    text, _ = page.render(tmp_path, tmp_path / "results.md")
    assert "| cut |" in text and "The run was cut short" in text


def test_write_and_check(page, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records, out = tmp_path / "records", tmp_path / "docs" / "results.md"
    put(records, eval=EVAL, step=DECODE_STEP, whole=END_TO_END, model=MODEL)
    where = ["--results", str(records), "--page", str(out)]
    assert page.main(["--check", *where]) == 1
    assert "--write makes it anew" in capsys.readouterr().err
    assert page.main(["--write", *where]) == 0 and page.main(["--check", *where]) == 0
    pictures = sorted(path.name for path in (tmp_path / "docs" / "results").iterdir())
    assert pictures == ["eval.png", "model.png", "step.png", "whole.png"]

    out.write_text(out.read_text().replace("4.321", "3.210"))
    capsys.readouterr()
    assert page.main(["--check", *where]) == 1
    assert "3.210" in capsys.readouterr().err
    assert page.main(["--write", *where]) == 0
    (records / "model.json").unlink()
    assert page.main(["--write", *where]) == 0 and page.main(["--check", *where]) == 0
    assert not (tmp_path / "docs" / "results" / "model.png").exists()
    (tmp_path / "docs" / "results" / "step.png").unlink()
    capsys.readouterr()
    assert page.main(["--check", *where]) == 1
    assert "step.png: missing" in capsys.readouterr().err


def test_broken_record(page, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SystemExit):
        page.main(["--results", str(tmp_path)])
    assert "bad.json: expected a JSON record" in capsys.readouterr().err
