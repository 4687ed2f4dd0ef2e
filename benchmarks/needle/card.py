"""Writes a trained model's card: MODEL_CARD.md and loss.png in its folder.

``python benchmarks/needle/card.py FOLDER``: everything is read from loss.json and config.json, and
from scores.json if it is there ({"dense": {task: {length: score}}, another attention's name: ...}).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Scores = dict[str, dict[str, float]]  # task -> length -> 0..1

GOOD = 0.95
TEMPLATE = """\
# needle

A GLM-4 model of {million:.1f} million parameters that needs its long context: it was trained from
nothing to look up what stands anywhere in up to {horizon} tokens. It is for measuring sparse
attention, and no language model: beside the tasks below it knows little.

- **Architecture** `GlmForCausalLM`: {layers} layers, hidden size {hidden}, {heads} query heads and
  {kv_heads} key-value heads of {head_dim}, interleaved RoPE on half of each (base {theta:g}),
  biases on q, k and v, tied embeddings, {vocabulary} rows of them; bf16.
- **Tokenizer** byte-level BPE trained on the same text, lossless; each of the 256 key words, and
  each group of up to three digits, is one token.
- **Data** made while training (`benchmarks/needle/needle_data.py`): the sources of CPython's
  standard library as text, with definitions and questions pasted in. Python's help topics, the text
  that evaluation uses first, were not trained on. Words, numbers and formats are those of
  `sparseattn.evaluation.tasks`; the evaluation's examples are drawn anew.
- **Training** `benchmarks/needle/train.py`, seed {seed}: {steps} steps, {tokens:.0f} million
  tokens, {minutes:.1f} minutes on {device}, torch {torch}. Lengths from 512 to {longest} tokens;
  where positions jump, sequences show the distances of longer ones.
- **Licence** that of this repository; the text is CPython's (PSF licence).

![answers' loss and accuracy while training](loss.png)

At the end of training the loss on answers was {answer_loss:.4f}, their tokens were right
{accuracy:.1f} % of the time, the loss on text was {text_loss:.2f}.

## Scores

Share of the expected strings in the output, greedy decoding. Depths are spread evenly.

{tables}
## Where it fails

{failures}
Text that looks like the formats but differs in wording is not understood, nor are keys outside the
256 words, numbers of other than six digits, or more hops and values than trained on ({hops} hops,
{values} values of a key, {queries} keys asked at once).
"""


def table(name: str, scores: Scores) -> str:
    lengths = sorted({n for found in scores.values() for n in found}, key=int)
    lines = [f"{name}:", "", "| task | " + " | ".join(lengths) + " |"]
    lines.append("|---|" + "---:|" * len(lengths))
    for task, found in scores.items():
        cells = [f"{100 * found[n]:.0f} %" if n in found else "" for n in lengths]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def failures(scores: Scores) -> str:
    """A line per task that is below GOOD somewhere."""
    lines = []
    for task, found in scores.items():
        weak = [f"{n} tokens ({100 * v:.0f} %)" for n, v in found.items() if v < GOOD]
        if weak:
            lines.append(f"- `{task}` with dense attention: {', '.join(weak)}")
    good = f"No task is below {100 * GOOD:.0f} % with dense attention at the lengths measured."
    return "\n".join(lines) + "\n" if lines else good + "\n"


def picture(curve: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [entry["tokens"] / 1e6 for entry in curve]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(tokens, [entry["answer_loss"] for entry in curve], label="answers")
    left.plot(tokens, [entry["text_loss"] for entry in curve], label="text")
    left.set(xlabel="million tokens", ylabel="loss", yscale="log")
    left.legend()
    for family in dict.fromkeys(name for entry in curve for name in entry["accuracy"]):
        values = [entry["accuracy"].get(family, float("nan")) for entry in curve]
        right.plot(tokens, values, label=family.replace("_", " "))
    right.set(xlabel="million tokens", ylabel="answers' tokens right", ylim=(0, 1.02))
    right.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write(folder: Path) -> Path:
    """The card's path. Raises FileNotFoundError where loss.json or config.json is missing."""
    from needle_package import tasks

    record = json.loads((folder / "loss.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scores: dict[str, Scores] = {}
    if record.get("dense_scores"):
        scores["dense"] = record["dense_scores"]
    if (folder / "scores.json").is_file():
        scores |= json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    tables = [table(name, found) for name, found in scores.items()]
    last = record["curve"][-1] if record["curve"] else {}
    card = TEMPLATE.format(
        million=record["parameters"] / 1e6,
        horizon=record["arguments"]["horizon"],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        theta=config["rope_parameters"]["rope_theta"],
        vocabulary=config["vocab_size"],
        seed=record["seed"],
        steps=record["steps"],
        tokens=record["tokens"] / 1e6,
        minutes=record["minutes"],
        device=record["device"],
        torch=record["versions"]["torch"],
        longest=record["arguments"]["max_length"],
        answer_loss=last.get("answer_loss", float("nan")),
        accuracy=100 * last.get("answer_accuracy", float("nan")),
        text_loss=last.get("text_loss", float("nan")),
        tables="\n".join(tables) or "None measured.\n",
        failures=failures(scores.get("dense", {})) if scores else "Not measured.\n",
        hops=tasks.HOPS,
        values=tasks.VALUES,
        queries=tasks.QUERIES,
    )
    picture(record["curve"], folder / "loss.png")
    path = folder / "MODEL_CARD.md"
    path.write_text(card, encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(write(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
