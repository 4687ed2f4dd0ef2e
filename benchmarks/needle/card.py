"""Writes a trained model's card: MODEL_CARD.md and loss.png in its folder.

``python benchmarks/needle/card.py FOLDER``: everything is read from loss.json and config.json, and
from scores.json if it is there. ``--eval eval.json`` first writes scores.json from a record of
``python -m sparseattn eval FOLDER``:

    {"settings": {"examples": ..., ...},
     "methods": {method: {"density": ..., "decode_share": ..., "scores": {task: {length: score}}}}}
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
  tokens, {minutes:.1f} minutes on {device}, torch {torch}; options in `loss.json`.
  Lengths from 512 to {longest} tokens; where positions jump, sequences show the distances of
  longer ones.
- **Initialisation** not all random: {local}every o_proj
  starts as the transpose of v_proj, so that heads write back what they read (`initialise` in
  `needle_model.py`). All of it is trained on; recall comes within minutes because of it.
- **Licence** that of this repository; the text is CPython's (PSF licence).

![answers' loss and accuracy while training](loss.png)

At the end of training the loss on answers was {answer_loss:.4f}, their tokens were right
{accuracy:.1f} % of the time, the loss on text was {text_loss:.2f}.

## Scores

Share of the expected strings in the output, greedy decoding.

{tables}
{comparison}## Where it fails

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


def from_eval(record: dict[str, Any]) -> dict[str, Any]:
    """The content of scores.json: an evaluation's synthetic tasks, means of their examples."""
    found: dict[str, dict[str, Any]] = {}
    for cell in record["cells"]:
        if cell["kind"] == "task":
            method = found.setdefault(cell["method"], {"density": [], "decode_share": []})
            for name in ("density", "decode_share"):
                method[name].append(cell[name])
            lengths = method.setdefault("scores", {}).setdefault(cell["task"], {})
            lengths[str(cell["length"])] = cell["score"]
    for method in found.values():
        for name in ("density", "decode_share"):
            method[name] = sum(method[name]) / len(method[name])
    settings = {
        name: record["settings"][name]
        for name in ("weights", "dtype", "seed", "examples", "density", "share")
    }
    machine = record["machines"][-1]
    settings |= {name: machine[name] for name in ("gpu", "cpu", "torch", "date") if name in machine}
    return {"settings": settings, "methods": found}


def check_weights(folder: Path, record: dict[str, Any]) -> None:
    """Raises ValueError if the evaluation was of other weights than the folder's."""
    from needle_package import search_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    own, evaluated = search_model.fingerprint(model), record["settings"]["weights"]
    if own != evaluated:
        raise ValueError(f"--eval: expected a record of the weights {own}, got {evaluated}")


def comparison(scores: dict[str, Any]) -> str:
    """A table for each length of scores.json: methods down, tasks across."""
    settings, found = scores["settings"], scores["methods"]
    tasks = list(dict.fromkeys(task for method in found.values() for task in method["scores"]))
    lengths = {
        n for method in found.values() for lengths in method["scores"].values() for n in lengths
    }
    where = settings.get("gpu", settings.get("cpu", "an unknown device"))
    lines = []
    for length in sorted(lengths, key=int):
        lines += [
            f"Methods of `python -m sparseattn eval` at {length} tokens: {settings['examples']} "
            f"examples a task, {settings['dtype']}, {where}, {settings['date']}. Share of the "
            "causal pairs that prefill visits and of the keys that a step attends to, means over "
            "tasks.",
            "",
            "| method | prefill | step | " + " | ".join(tasks) + " |",
            "|---|" + "---:|" * (2 + len(tasks)),
        ]
        for name, method in found.items():
            cells = [method["scores"].get(task, {}).get(length) for task in tasks]
            shares = [method["density"], method["decode_share"], *cells]
            lines.append(
                f"| `{name}` | "
                + " | ".join("" if x is None else f"{100 * x:.0f} %" for x in shares)
                + " |"
            )
        lines.append("")
    lines += [
        "Steps see all keys, but for shadowkv: a sparse prefill can only fail at what it looks up",
        "itself, of four numbers in `niah_multiquery` the first. `common_words` needs no far keys:",
        "the latest part of the list has the same words.",
    ]
    return "\n".join(lines) + "\n\n"


def local_heads(layers: int, group: int) -> str:
    """Where heads start local; ``group`` query heads of a KV head."""
    if not layers:
        return ""
    where = "the first layer" if layers == 1 else f"the first {layers} layers"
    last = 1 + (group - 1) * layers
    return (
        f"in {where} the {group} heads of KV head 0 start local\n  (biases on q and k make them "
        f"look 1 to {last} tokens back), and "
    )


def failures(dense: list[tuple[str, Scores]]) -> str:
    """A line per task that is below GOOD somewhere, of measurements by name."""
    lines: dict[str, list[str]] = {}
    for name, scores in dense:
        for task, found in scores.items():
            for length, score in found.items():
                if score < GOOD:
                    text = f"{length} tokens ({100 * score:.0f} %, {name})"
                    lines.setdefault(task, []).append(text)
    good = f"No task is below {100 * GOOD:.0f} % with dense attention at the lengths measured.\n"
    return (
        "".join(
            f"- `{task}` with dense attention: {', '.join(weak)}\n" for task, weak in lines.items()
        )
        or good
    )


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
    arguments = record["arguments"]
    dense: list[tuple[str, Scores]] = []
    tables = ""
    if record.get("dense_scores"):
        name = f"{arguments['eval_examples']} examples"
        dense.append((name, record["dense_scores"]))
        tables = table(
            f"Dense attention right after training, {name} a task, depths spread evenly",
            record["dense_scores"],
        )
    compared = ""
    if (folder / "scores.json").is_file():
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        compared = comparison(scores)
        if "dense" in scores["methods"]:
            name = f"{scores['settings']['examples']} examples"
            dense.append((name, scores["methods"]["dense"]["scores"]))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    last = record["curve"][-1] if record["curve"] else {}
    card = TEMPLATE.format(
        million=record["parameters"] / 1e6,
        horizon=arguments["horizon"],
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
        longest=arguments["max_length"],
        local=local_heads(arguments["local_layers"], group),
        answer_loss=last.get("answer_loss", float("nan")),
        accuracy=100 * last.get("answer_accuracy", float("nan")),
        text_loss=last.get("text_loss", float("nan")),
        tables=tables or ("" if compared else "None measured.\n"),
        comparison=compared,
        failures=failures(dense) if dense else "Not measured.\n",
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
    parser.add_argument("--eval", type=Path, help="eval.json of the model, for scores.json")
    args = parser.parse_args(argv)
    if args.eval:
        record = json.loads(args.eval.read_text(encoding="utf-8"))
        check_weights(args.folder, record)
        text = json.dumps(from_eval(record), indent=1) + "\n"
        (args.folder / "scores.json").write_text(text, encoding="utf-8")
    print(write(args.folder))


if __name__ == "__main__":
    main()
