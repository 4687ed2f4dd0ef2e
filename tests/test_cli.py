"""The command line's frame, and ``info``."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from helpers import cuda_reason

import sparseattn
from sparseattn import cli, ops

info_module = importlib.import_module("sparseattn.info")  # sparseattn.info is the function


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: sparseattn {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["info", "--bogus"]])
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: sparseattn" in capsys.readouterr().err


@pytest.mark.parametrize("error,status,message", [
    (ValueError("q: expected\n  this"), 2, "sparseattn info: q: expected this\n"),
    (FileNotFoundError(2, "No such file", "x"), 2,
     "sparseattn info: [Errno 2] No such file: 'x'\n"),
    (KeyboardInterrupt(), 130, "sparseattn info: interrupted\n"),
])  # fmt: skip
def test_user_errors_are_one_line(capsys, monkeypatch, error, status, message):
    def run(args):
        raise error

    monkeypatch.setattr(info_module, "run", run)
    assert cli.main(["info"]) == status
    assert capsys.readouterr().err == message


def test_our_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(info_module, "run", lambda args: [][0])
    with pytest.raises(IndexError):
        cli.main(["info"])


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "sparseattn", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["versions"]["torch"] == torch.__version__


def test_info(capsys):
    facts = sparseattn.info()
    assert facts["versions"]["sparseattn"]
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.is_available() * torch.cuda.device_count()
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and facts["devices"][0]["name"] in printed
    assert "refused: dtype: expected float32 or bfloat16\n" in printed


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_paths_are_what_the_operators_take(kind):
    """Every path that info names runs, and every refusal is the operator's too."""
    if kind == "cuda" and cuda_reason():
        pytest.skip(cuda_reason())
    paths = [entry for entry in sparseattn.info()["paths"] if entry["device"] == kind]
    assert {entry["head_dim"] for entry in paths} >= {64, 96, 128}
    for entry in paths:
        x = torch.ones(
            1, 1, 2, entry["head_dim"], device=kind, dtype=getattr(torch, entry["dtype"])
        )
        if entry["path"].startswith("refused: "):
            with pytest.raises((TypeError, ValueError)):
                ops.a_shape_attention(x, x, x, sink=1, window=1)
        else:
            assert entry["path"].startswith("cpu " if kind == "cpu" else "sm")
            out = ops.a_shape_attention(x, x, x, sink=1, window=1)
            assert torch.equal(out, x)


def test_path_refusals():
    path = info_module.path
    assert path("meta", torch.float32, 64) == "refused: device: expected cpu or cuda, got meta"
    assert "got float64" in path("cpu", torch.float64, 64)
    assert "head_dim: expected one of 16, 32, 64, 96, 128, got 80" in path("cpu", torch.float32, 80)
    if not torch.cuda.is_available():
        assert path("cuda", torch.bfloat16, 64).startswith("refused: device: ")
