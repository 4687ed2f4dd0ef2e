"""``benchmarks/prefill_bars.py`` at toy sizes, and the README's table made of records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
GPU = {"gpu": "NVIDIA H100", "cpu": "some", "torch": "2.11", "commit": "abc"}


# --- prefill_bars ---------------------------------------------------------------------------------


def test_smoke(script, tmp_path, capsys):
    path = tmp_path / "bars.json"
    arguments = ["--smoke", "--output", str(path), "--commit", "abc", "--repeats", "3"]
    assert script("prefill_bars").main(arguments) == 0
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["benchmark"] == "prefill-bars" and record["complete"] is True
    assert record["machine"]["commit"] == "abc"
    rows = record["results"]
    targets = {"dense", "T1", "T2", "T3", "T4", "T5", "T6", "million"}
    assert {row["target"] for row in rows} == targets
    for row in rows:
        assert row["case"] in printed and "error" not in row
        if "FlashAttention-3" in row["case"]:
            assert row["note"].startswith("missing: ") and "ms" not in row
        elif row["target"] == "T6":
            assert row["met"] is None and "note" in row
        else:
            assert row["ms"] > 0
        if row["target"] in ("T1", "T2", "T3", "T4"):
            assert row["pairs"] > 0 and row["tflops"] > 0
        if row["target"] == "T1":
            assert row["bar"] == ">= 560 TFLOP/s" and row["met"] is False
        if row["case"].endswith(("100%", "(a_shape)")):
            assert row["difference"] < 1e-2
        if row["target"] == "T5":
            assert row["ms_is"].startswith("estimate_vertical_slash alone")
            assert {"estimate_ms", "difference_ms", "difference_is"} <= set(row)
    (million,) = (row for row in rows if row["target"] == "million")
    assert million["finite"] and million["bitwise_equal"] and million["met"] is True
    assert {row["target"] for row in rows if row["tokens"] == million["tokens"]} == {
        "T5", "T6", "million"
    }  # fmt: skip
    assert record["peers"]["ms"]["131072"]["1000, 6096"]["MInference Triton"] == 66.1
    assert "another one" in record["peers"]["note"]
    judged = record["summary"]
    assert judged["bars"] == judged["met"] + len(judged["missed"]) + len(judged["not_judged"])


def test_full_list_takes_turns_with_flash_attention_3(script):
    """T4's ratio is of calls side by side, not of FlashAttention-3's row."""
    prefill_bars = script("prefill_bars")
    setting, device, order = prefill_bars.SMOKE, torch.device("cpu"), []

    def build(inputs):
        made = prefill_bars.full_list(inputs)
        call = lambda: (order.append("own"), made.call())[1]  # noqa: E731
        return prefill_bars.Prepared(call, made.pairs, made.density)

    inputs = prefill_bars.Inputs(setting, 512, device, 0)
    timer = prefill_bars.common.Timer(device)
    run = prefill_bars.Run(setting, device, timer, repeats=4, budget_ms=1e6, inputs=inputs)
    alone = prefill_bars.attention(build, in_turn=True)(run)
    assert "fa3_ms" not in alone and set(order) == {"own"}
    run.fa3 = lambda: order.append("peer")
    row = prefill_bars.attention(build, in_turn=True)(run)
    assert row["in_turn"] and 0 < row["fa3_ms"] < row["ms"]
    assert order[-8:] == ["peer", "own"] * 4


def test_chosen_targets(script, tmp_path, monkeypatch):
    """Only what is asked for is run, and nothing is written without --output."""
    prefill_bars, common = script("prefill_bars"), script("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    found = []
    monkeypatch.setattr(prefill_bars, "render", lambda rows: found.extend(rows) or "")
    arguments = ["--smoke", "--targets", "T2", "million", "--lengths", "512", "--repeats", "1"]
    assert prefill_bars.main(arguments) == 0
    assert [row["target"] for row in found] == ["dense", "dense", "T2", "million"]
    assert not list(tmp_path.iterdir())


def test_wrong_output_fails(script, tmp_path, monkeypatch):
    prefill_bars = script("prefill_bars")

    def broken(q, *rest, **options):
        return q.new_full(q.shape, float("nan"))

    monkeypatch.setattr(prefill_bars.sparseattn, "sparse_attention", broken)
    path = tmp_path / "bars.json"
    assert prefill_bars.main(["--smoke", "--targets", "million", "--output", str(path)]) == 1
    (row,) = json.loads(path.read_text())["results"]
    assert row["error"] == "output not finite" and row["met"] is False and row["bitwise_equal"]


@pytest.mark.parametrize("arguments,message", [
    (["--lengths", "600"], "--lengths: expected multiples of 128 >= 512, got 600"),
    (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
    (["--targets", "T9"], "invalid choice: 'T9'"),
])  # fmt: skip
def test_refusals(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script("prefill_bars").main(["--smoke", *arguments])
    assert message in capsys.readouterr().err


def test_bars(script):
    bars = script("bars")
    fast = bars.Bar("tflops", 560, "TFLOP/s")
    assert fast.fields({"tflops": 560})["met"] is True
    assert fast.fields({"tflops": 559.9})["met"] is False
    assert fast.fields({})["met"] is None and fast.fields({"error": "x"})["met"] is False
    limits = [round(bars.peer_bar(131072, size).limit, 3) for size in bars.PEERS[131072]]
    assert limits == [41.312, 14.312, 6.125, 10.562]
    assert bars.peer_bar(32768, (1000, 6096)) is None and bars.peer_bar(131072, (1, 2)) is None
    assert bars.peer_bar(131072, (30, 800)).text == "<= 6.125 ms"


def test_trace(script):
    """The writes come first, then the call; events in any order."""
    before = script("device_trace").before_longest
    writes = [("fill", float(i), i + 0.9) for i in range(4)]
    own = [("estimate", 5.0, 7.0), ("plan", 8.0, 9.0), ("attention", 9.5, 20.0)]
    assert before([*reversed(own), *writes], 4) == 4.5
    assert before(writes, 4) is None and before(writes[1:] + own, 4) is None


# --- readme_table ---------------------------------------------------------------------------------


def record(path: Path, date: str, **more) -> Path:
    dense = {"target": "dense", "tokens": 131072, "case": "dense, FlashAttention-3", "ms": 200.0}
    bar = {"bar": ">= 560 TFLOP/s", "bar_field": "tflops", "bar_limit": 560}
    memory = {"bar": "<= 512 MiB", "bar_field": "extra_mib", "bar_limit": 512}
    rows = [
        dense | {"tflops": 700.0, "fa3_ms": 200.0},
        {"target": "T1", "tokens": 131072, "case": "blocks, 5%", "ms": 12.3456,
         "tflops": 571.26, "fa3_ms": 200.0, **bar, "met": True},
        {"target": "T1", "tokens": 32768, "case": "blocks, 5%", "ms": 0.95,
         "tflops": 463.0, **bar, "met": False},
        {"target": "T2", "tokens": 32768, "case": "no bar", "ms": 1.0, "tflops": 400.0},
        {"target": "T6", "tokens": 1048576, "case": "memory", "extra_mib": 178.25, **memory,
         "met": True},
        {"target": "T5", "tokens": 1048576, "case": "estimate", "ms": 5.4, "ms_is": "a trace"},
    ]  # fmt: skip
    content = {
        "benchmark": "prefill-bars",
        "machine": GPU | {"date": f"{date}T10:00:00+00:00"},
        "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "complete": True,
        "summary": {"bars": 3, "met": 2}, "peers": {"note": "other card"}, "results": rows, **more,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_table_of_a_record(script, tmp_path, capsys):
    path = record(tmp_path / "x-prefill-bars.json", "2026-11-25")
    assert script("readme_table").main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = " ".join(lines[: lines.index("")])
    for part in ("`x-prefill-bars.json`", "NVIDIA H100", "2026-11-25", "abc", "2 of 3 bars met"):
        assert part in head
    assert [line for line in lines if line.startswith("|")] == [
        "| case | tokens | ms | TFLOP/s | FlashAttention-3, ms | bar |",
        "|---|---:|---:|---:|---:|---|",
        "| blocks, 5% | 131,072 | 12.35 | 571.3 | 200.0 | at least 560 TFLOP/s: met |",
        "| blocks, 5% | 32,768 | 0.950 | 463.0 | - | at least 560 TFLOP/s: **missed** |",
        "| memory | 1,048,576 | - | - | - | at most 512 MiB: met (178.2) |",
    ]
    end = " ".join(lines[-2:])
    assert "Estimate and plan: a trace." in end and "other card" not in end
    assert script("readme_table").main([str(path), "--all"]) == 0
    assert "| no bar | 32,768 | 1.000 | 400.0 | - | - |" in capsys.readouterr().out


def test_newest_record_is_written(script, tmp_path):
    readme_table = script("readme_table")
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- prefill-table -->\nold\n<!-- /prefill-table -->\nb\n")
    arguments = ["--write", "--readme", str(readme), "--results", str(tmp_path)]
    assert readme_table.main(arguments) == 0
    nothing = readme.read_text()
    assert "There is no record" in nothing and "old" not in nothing and "|" not in nothing
    record(tmp_path / "2-prefill-bars.json", "2026-11-25")
    record(tmp_path / "1-prefill-bars.json", "2026-11-26")
    record(tmp_path / "3-prefill-bars.json", "2026-11-27", complete=False)
    record(tmp_path / "4-prefill-bars.json", "2026-11-28", machine={"date": "2026-11-28"})
    assert readme_table.main(arguments) == 0
    written = readme.read_text()
    assert written.startswith("a\n<!-- prefill-table -->\n`1-prefill-bars.json`")
    assert written.endswith("\n<!-- /prefill-table -->\nb\n") and "no record" not in written
    assert readme_table.main(arguments) == 0 and readme.read_text() == written


def test_the_readme_has_the_markers(script):
    readme_table = script("readme_table")
    text = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    assert readme_table.replaced(text, "x") != text


@pytest.mark.parametrize("text", ["", "<!-- /prefill-table --><!-- prefill-table -->",
                                  "<!-- prefill-table -->"])  # fmt: skip
def test_markers_are_needed(script, text):
    with pytest.raises(ValueError, match="expected <!-- prefill-table -->"):
        script("readme_table").replaced(text, "x")


def test_other_records_are_refused(script, tmp_path, capsys):
    path = record(tmp_path / "x.json", "2026-11-25", benchmark="prefill_attention")
    with pytest.raises(SystemExit):
        script("readme_table").main([str(path)])
    assert "expected a record of prefill_bars.py, got 'prefill_attention'" in (
        capsys.readouterr().err
    )
