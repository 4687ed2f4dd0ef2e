"""``benchmarks/peers`` at toy sizes: torch's SDPA beside this library, and the list formats."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseattn import reference

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")


def test_smoke(script, tmp_path, capsys):
    path = tmp_path / "peers.json"
    bench = script("peers.bench")
    assert (
        bench.main(["--smoke", "--lengths", "512", "--output", str(path), "--commit", "abc"]) == 0
    )
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["benchmark"] == "peers" and record["complete"] is True
    assert record["machine"]["commit"] == "abc" and "partial" not in record["arguments"]
    assert set(record["peers"]) == {peer.NAME for peer in bench.PEERS}
    for name, peer in record["peers"].items():
        assert peer["available"] == (name == "torch SDPA") and peer["detail"]
        assert peer["available"] or f"{name}: missing: {peer['detail']}" in printed
    rows = record["results"]
    assert {row["case"] for row in rows} == {case.name for case in bench.cases(bench.SMOKE)}
    for row in rows:
        assert row["ms"] > 0 and row["tflops"] > 0 and row["case"] in printed
        if row["peer"] == bench.OWN:
            assert row["own_tile_error"] < 1e-2
        else:
            assert row["peer"].startswith("SDPA") and row["ratio"] > 0
            assert row["difference"] < 1e-2 and row["max_difference"] < 0.1
            assert "note" not in row


def test_by_path():
    """As a user starts it: the folder's modules do not hide the peers' own."""
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks: not a checkout of the repository")
    command = [sys.executable, str(BENCHMARKS / "peers" / "run.py"), "--smoke", "--lengths", "256"]
    command += ["--cases", "dense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SDPA" in done.stdout and "wrote" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nothing"], "--cases: expected a part of one of dense"),
        (["--peers", "nothing"], "--peers: expected a part of one of torch SDPA"),
        (["--lengths", "100"], "--lengths: expected multiples of 128"),
    ],
)
def test_bad_arguments(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script("peers.bench").main(["--smoke", *arguments])
    assert message in capsys.readouterr().err


def test_failing_peer(script, tmp_path, monkeypatch):
    """A peer that breaks is a row with the reason, whatever it raises and wherever."""
    bench, problem = script("peers.bench"), script("peers.problem")

    class Broken:
        NAME = "broken"

        @staticmethod
        def available(device):
            return True, "1.0"

        @staticmethod
        def offers(asked):
            yield problem.Offer("first", lambda: 1 // 0)
            raise KeyError("no kernel")

    monkeypatch.setattr(bench, "PEERS", (Broken,))
    path = tmp_path / "peers.json"
    arguments = ["--smoke", "--lengths", "256", "--cases", "dense", "--output", str(path)]
    assert bench.main(arguments) == 0
    notes = {row["peer"]: row.get("note") for row in json.loads(path.read_text())["results"]}
    assert notes["first"] == "failed: ZeroDivisionError: integer division or modulo by zero"
    assert any("KeyError" in (note or "") for note in notes.values())


def problems(script):
    bench, common = script("peers.bench"), script("common")
    qkv = common.random_qkv(512, 4, 2, 64, CPU)
    for case in bench.cases(bench.SMOKE):
        yield case.name, case.make(qkv, 0)[0]


def test_own_keys(script):
    """The checks' selections are the oracle's masks."""
    sdpa = script("peers.torch_sdpa")
    for name, problem in problems(script):
        mask = sdpa.explicit_mask(problem)
        for head in range(problem.heads):
            n = problem.tokens
            if problem.kind == "dense":
                expected = reference.dense_mask(n, n)
            elif problem.kind == "vertical_slash":
                lists = problem.columns[0, head], problem.offsets[0, head]
                expected = reference.vertical_slash_mask(n, n, *lists)
            else:
                size = problem.block
                expected = reference.block_sparse_mask(n, n, problem.mask[0, head], size, size)
            assert torch.equal(mask[0, head], expected), name


def test_block_lists(script):
    """Lists of blocks for FlexAttention and MInference name the mask's blocks."""
    flex, triton = script("peers.torch_flex"), script("peers.minference_triton")
    for _, problem in problems(script):
        if problem.kind == "dense":
            blocks = flex.block_mask(problem).to_dense()[0, 0]
            assert torch.equal(blocks, torch.ones_like(blocks).tril())
        if problem.kind != "block_sparse":
            continue
        assert torch.equal(flex.block_mask(problem).to_dense().bool(), problem.mask)
        counts, lists = flex.block_lists(problem.mask)
        assert torch.equal(counts.sum(), problem.mask.sum())
        for head, row in ((0, 0), (1, 2), (3, 3)):
            expected = problem.mask[0, head, row].nonzero().flatten()
            assert lists[0, head, row, : counts[0, head, row]].tolist() == expected.tolist()
            if problem.per_row:
                own = triton.first_blocks(problem)[0, head, row]
                assert own[: row + 1].tolist() == expected.tolist()


def test_kernels_only(script, tmp_path, monkeypatch):
    """Kernels of a package can be had though its own import fails."""
    triton, problem = script("peers.minference_triton"), script("peers.problem")
    folder = tmp_path / "brokenpeer" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "brokenpeer" / "__init__.py").write_text(
        "from .ops import kernel\nimport nothing_\n"
    )
    (folder / "kernel.py").write_text("from .. import ops\nanswer = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert problem.found("brokenpeer") == (
        False,
        "ModuleNotFoundError: No module named 'nothing_'",
    )
    assert triton.kernels_only("brokenpeer") and not triton.kernels_only("no_such_peer")
    assert problem.found("brokenpeer.ops.kernel")[0]
    assert importlib.import_module("brokenpeer.ops.kernel").answer == 42


def test_lists64(script):
    """Tiles and columns give the keys that a tile of rows sees, and their number."""
    lists64 = script("peers.lists64")
    lists = lists64.Lists(
        torch.tensor([[[1, 2]]]),
        torch.tensor([[[[0, 7], [30, 100]]]]),
        torch.tensor([[[0, 1]]]),
        torch.tensor([[[[9], [3]]]]),
    )
    keys = lists.keys(128)
    assert keys(0, 0).tolist() == list(range(64))
    assert keys(0, 1).tolist() == [*range(30, 94), *range(100, 128), 3]
    assert lists.pairs == 64 * (3 * 64 + 1)
