"""What prefill_bars.py judges its rows by: bars, and the peers' times that T3's bar is made of."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

#: Milliseconds of the peers' vertical-slash kernels, tokens -> (columns, offsets) -> peer. Taken on
#: one NVIDIA H200 on 2026-11-23, driver 580, torch 2.11 with CUDA 13.0: the same shapes and lists
#: (`common.clustered_indexes`), the kernels without their index conversion. They do not run here.
PEERS: dict[int, dict[tuple[int, int], dict[str, float]]] = {
    32768: {
        (1000, 6096): {"vLLM": 13.8, "MInference Triton": 13.0},
        (512, 2048): {"vLLM": 5.5, "MInference Triton": 5.4},
        (30, 800): {"vLLM": 2.5, "MInference Triton": 2.46},
        (3500, 100): {"vLLM": 4.2, "MInference Triton": 5.9},
    },
    131072: {
        (1000, 6096): {"vLLM": 74.4, "MInference Triton": 66.1},
        (512, 2048): {"vLLM": 25.6, "MInference Triton": 22.9},
        (30, 800): {"vLLM": 10.5, "MInference Triton": 9.8},
        (3500, 100): {"vLLM": 16.9, "MInference Triton": 22.5},
    },
}
PEERS_CARD = "NVIDIA H200"
PEER_FACTOR = 1.6
BAR_TOKENS = 131072  # the length of T2's and T3's bars
T13 = {131072: 5.4, 1048576: 60.0}  # seconds of a sparse prefill, Llama-3-8B shapes, PEERS_CARD
ESTIMATE_BARS = {32768: 0.5, 131072: 0.8, 1048576: 5.0}  # ms, T5

FA3 = "dense, FlashAttention-3"  # the case's name
SOUND = "sound"  # a field that is 1 where the output is as it must be


@dataclass(frozen=True)
class Bar:
    """What a row's field must reach: ``limit`` at least, or at most."""

    field: str
    limit: float
    unit: str
    at_least: bool = True

    @property
    def text(self) -> str:
        if self.field == SOUND:
            return self.unit
        return f"{'>=' if self.at_least else '<='} {self.limit:.4g} {self.unit}"

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's judgement; ``met`` is None where the field was not measured, and
        False after an error."""
        value = row.get(self.field)
        met = False if "error" in row else None
        if met is None and value is not None:
            met = bool(value >= self.limit if self.at_least else value <= self.limit)
        return {
            "bar": self.text,
            "bar_field": self.field,
            "bar_limit": self.limit,
            "met": met,
        }


def peer_bar(tokens: int, size: tuple[int, int]) -> Bar | None:
    times = PEERS.get(tokens, {}).get(size)
    if times is None or tokens != BAR_TOKENS:
        return None
    return Bar("ms", min(times.values()) / PEER_FACTOR, "ms", at_least=False)


def peers_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What T3's bar is made of, for the record."""
    here = {name: importlib.util.find_spec(name) is not None for name in ("vllm", "minference")}
    card = facts.get("gpu", facts["cpu"])
    note = f"T3's bar uses these times, taken on one {PEERS_CARD} on 2026-11-23; no peer's kernel "
    note += "ran here"
    if card != PEERS_CARD:
        note += f", and this card is another one ({card})"
    absent = [name for name, found in here.items() if not found]
    if absent:
        note += f"; cannot be imported here: {', '.join(absent)}"
    times = {
        str(tokens): {f"{c}, {o}": ms for (c, o), ms in sizes.items()}
        for tokens, sizes in PEERS.items()
    }
    return {
        "measured_on": PEERS_CARD,
        "factor": PEER_FACTOR,
        "importable_here": here,
        "ms": times,
        "note": note,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [row for row in rows if "bar" in row]
    return {
        "bars": len(judged),
        "met": sum(row["met"] is True for row in judged),
        "missed": [f"{r['target']} {r['tokens']} {r['case']}" for r in judged if r["met"] is False],
        "not_judged": [
            f"{r['target']} {r['tokens']} {r['case']}" for r in judged if r["met"] is None
        ],
    }
