"""``benchmarks/record_all.py`` with commands that only say that they ran."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def module(script, monkeypatch):
    found = script("record_all")
    show = (
        "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('X'), *sys.argv)"
    )
    records = (
        found.Record("one", ("-c", show, "{out}", "{commit}"), (("X", "7"),)),
        found.Record("two", ("-c", "raise SystemExit(3)")),
        found.Record("three", ("-c", "import time; time.sleep(60)")),
    )
    monkeypatch.setattr(found, "RECORDS", records)
    return found


def test_all_run_whatever_becomes_of_one(module, tmp_path, capsys):
    out, archive = tmp_path / "records", tmp_path / "all.tar.gz"
    arguments = ["--output", str(out), "--commit", "abc", "--devices", "4", "5", "--timeout", "5"]
    assert module.main([*arguments, "--pack", str(archive)]) == 1
    assert (out / "one.log").read_text().split() in (["4", "7", "-c", str(out), "abc"],
                                                     ["5", "7", "-c", str(out), "abc"])  # fmt: skip
    found = {row["name"]: row for row in json.loads((out / "records.json").read_text())}
    assert {name: row["exit_status"] for name, row in found.items()} == {
        "one": 0, "two": 3, "three": None
    }  # fmt: skip
    assert "three" in capsys.readouterr().out
    with tarfile.open(archive) as tar:
        assert {"records/records.json", "records/one.log"} <= set(tar.getnames())


def test_only_some(module, tmp_path):
    assert module.main(["--output", str(tmp_path), "--only", "one"]) == 0
    assert not (tmp_path / "two.log").exists()


def test_every_command_is_understood(script, tmp_path):
    """Options that a benchmark does not have, or no longer, are found here and not in an hour."""
    module = script("record_all")
    arguments = module.parse_arguments(["--output", str(tmp_path), "--commit", "abc"])

    def refusal(record):
        command = [sys.executable, *module.command_of(record, arguments)]
        return subprocess.run(
            [*command, "--no-such-option"],
            cwd=module.ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )

    with ThreadPoolExecutor(2) as pool:
        for record, run in zip(module.RECORDS, pool.map(refusal, module.RECORDS), strict=True):
            assert run.returncode == 2, (record.name, run.stderr)
            assert "unrecognized arguments: --no-such-option" in run.stderr, record.name


def test_racecheck_runs_with_its_own_build_only(script, tmp_path):
    module = script("record_all")
    (tests,) = (record for record in module.RECORDS if record.name == "tests")
    for given, wanted in (
        ([], ["--sanitizer", "memcheck"]),
        (
            ["--racecheck-package", "build/race"],
            ["--racecheck-package", "build/race"],
        ),
    ):
        assert module.command_of(tests, module.parse_arguments(given))[-2:] == wanted
