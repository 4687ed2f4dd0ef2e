"""The demo on the shipped model: numbers pasted into a long text are found, and how fast.

Five needles, each a key word and a number of six digits, lie at even depths of a real text. Three
ways to find them: dense; sparse prefill of text and question, then dense steps; sparse prefill of
the text alone into a ShadowKVCache, then every token of the questions and answers as a decode step.
As a check that the needles are not found anyway, all heads are given an A-shape of the same
density, too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparseattn import SHADOW_DEVICES, demo_measure, demo_model, demo_report, hf
from sparseattn.config import PatternConfig
from sparseattn.evaluation import methods, tasks
from sparseattn.evaluation import model as models
from sparseattn.evaluation.words import WORDS
from sparseattn.hf_arguments import with_cache

NEEDLES = 5
TOKENS = {"cpu": 8192, "cuda": 131072}
SHARE = 0.95
MIN_TOKENS = 256
ANSWER_TOKENS = 4  # a number has two; what follows shows where it ends
_PICTURED = ((0, 0), (1, 1), (2, 3), (4, 6))  # layer, head

NOTE = """\
The weights are trained, for this: looking up what stands anywhere in a long text (MODEL_CARD.md in
the model's folder tells how). The model is tiny: its answers are real, but it can do little else,
and in a large model attention is another share of the time and cache."""


@dataclass(frozen=True)
class Prompts:
    """A document, int64 [1, n], and the questions that go after it, int64 [1, m]."""

    document: Tensor
    questions: list[Tensor]
    keys: list[str]
    numbers: list[str]
    depths: list[float]
    source: str
    excerpt: str  # some of the text around a needle

    def prompt(self, number: int) -> Tensor:
        return torch.cat((self.document, self.questions[number]), dim=1)


def build(args: argparse.Namespace, tokenizer: Any) -> Prompts:
    """Text and questions of ``args.tokens`` tokens in all, at most what the text has.

    Raises ValueError or OSError where an argument cannot be met.
    """
    wanted = args.tokens or TOKENS[args.device]
    if wanted < MIN_TOKENS:
        raise ValueError(f"--tokens: expected at least {MIN_TOKENS}, got {wanted}")
    draw = random.Random(args.seed)
    keys = draw.sample(WORDS, NEEDLES)
    numbers = [str(draw.randrange(100000, 1000000)) for _ in keys]
    tokens = tasks._Tokens(tokenizer)
    head = tokens.prefix + tokens(tasks.FORMATS["open_niah"])
    needles = [
        tokens(tasks.FORMATS["needle"].format(key=key, value=number))
        for key, number in zip(keys, numbers, strict=True)
    ]
    questions = [tokens(tasks.FORMATS["ask"].format(key=key)) for key in keys]
    around = len(head) + sum(map(len, needles)) + max(map(len, questions))

    hay, source = _hay(args.text, wanted - around, tokens)
    if len(hay) + around < (args.tokens or MIN_TOKENS):
        raise ValueError(
            f"--text: expected at least {(args.tokens or MIN_TOKENS) - around} tokens, got "
            f"{len(hay)} ({source})"
        )
    room = min(wanted - around, len(hay))
    depths = [number / (NEEDLES - 1) for number in range(NEEDLES)]
    document, done = list(head), 0
    for depth, needle in zip(depths, needles, strict=True):
        upto = round(depth * room)
        document += hay[done:upto] + needle
        done = upto
    middle = round(depths[NEEDLES // 2] * room)
    excerpt = tokenizer.decode(
        hay[middle - 16 : middle] + needles[NEEDLES // 2] + hay[middle : middle + 16]
    )
    device = torch.device(args.device)
    return Prompts(
        torch.tensor([document], device=device),
        [torch.tensor([ids], device=device) for ids in questions],
        keys,
        numbers,
        depths,
        source,
        excerpt,
    )


def _hay(path: str | None, wanted: int, tokens: Any) -> tuple[list[int], str]:
    """(``wanted`` tokens of the text or more, if it has as many, where they come from)."""
    hay: list[int] = []
    source = ""
    # Python's help topics, of which one byte brings all, were not trained on, its sources were.
    for size, used in ((1, 8 * wanted), (8 * wanted, None)):
        data, source = demo_model.read_text(path, size)
        hay = tokens(data.decode("utf-8", errors="replace")[:used])
        if len(hay) >= wanted:
            break
    return hay, source


class Reader:
    """The model, asked in one way after the other."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Prompts) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.device = model.device

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _read(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits [vocab] after ``ids``, which the cache gets."""
        out = self.model(ids, logits_to_keep=1, **with_cache(self.model, cache))
        return out.logits[0, -1]

    def _prefill(self, ids: Tensor, make: Callable[[], Any]) -> tuple[float, Any, Tensor]:
        """(seconds, the cache, logits [vocab] after ``ids``); on a GPU of the second run."""
        for _ in range(2 if self.device.type == "cuda" else 1):
            cache = make()
            start = self._now()
            logits = self._read(ids, cache)
            seconds = self._now() - start
        return seconds, cache, logits

    def _dense_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _answer(self, logits: Tensor, step: Callable[[int], Tensor], times: list[float]) -> str:
        """Greedy, ANSWER_TOKENS tokens: the answer as text, without what follows the number."""
        out = [int(logits.argmax())]
        while len(out) < ANSWER_TOKENS:
            start = time.perf_counter()
            out.append(int(step(out[-1]).argmax()))
            times.append(time.perf_counter() - start)
        answer = self.tokenizer.decode(out)
        digits = len(answer) - len(answer.lstrip("0123456789"))
        return answer[:digits] if digits else answer.strip()

    def _step(self, cache: Any) -> Callable[[int], Tensor]:
        def step(token: int) -> Tensor:
            ids = torch.tensor([[token]], device=self.device)
            return self._read(ids, cache)

        return step

    def dense(self) -> dict[str, Any]:
        """The text is read once, with the first question; the others follow after it."""
        hf.enable(self.model)  # the same steps as below, all layers dense
        read = self.prompts.document.shape[1]
        seconds, cache, logits = self._prefill(self.prompts.prompt(0), self._dense_cache)
        size = methods.cache_bytes(cache)
        answers, times = [], []
        for number, question in enumerate(self.prompts.questions):
            if number:
                cache.crop(read - cache.get_seq_length())
                logits = self._read(question, cache)
            answers.append(self._answer(logits, self._step(cache), times))
        return self._report("dense", answers, [seconds], times, {"dense": size})

    def sparse(self, name: str, patterns: PatternConfig, density: float) -> dict[str, Any]:
        """Each question is read with the text: every lookup begins in the sparse prefill."""
        hf.enable(self.model, patterns, min_length=0)
        answers, prefills, times = [], [], []
        for number in range(len(self.prompts.questions)):
            seconds, cache, logits = self._prefill(self.prompts.prompt(number), self._dense_cache)
            prefills.append(seconds)
            size = methods.cache_bytes(cache)
            answers.append(self._answer(logits, self._step(cache), times))
        report = self._report(name, answers, prefills, times, {"dense": size})
        return report | {"density": density}

    def shadow(self, patterns: PatternConfig, density: float) -> dict[str, Any]:
        """The text is read once; questions and answers are single steps, one talk."""
        from sparseattn.decode_graph import GraphDecoder
        from sparseattn.shadow_cache import ShadowKVCache

        hf.enable(self.model, patterns, min_length=0)
        document, questions = self.prompts.document, self.prompts.questions
        options: dict[str, Any] = {
            **methods.ShadowSizes().options(self.model.config, document.shape[1]),
            "value_store": "host" if self.device.type == "cuda" else "device",
            "value_dtype": "fp8",
            "factor_dtype": "fp8",
        }
        seconds, cache, _ = self._prefill(
            document, lambda: ShadowKVCache(self.model.config, **options)
        )
        memory = cache.memory()
        share = methods.decode_share(cache, document.shape[1])
        steps = sum(question.shape[1] + ANSWER_TOKENS for question in questions)
        decoder = GraphDecoder(self.model, cache, max_new_tokens=steps)

        def step(token: int) -> Tensor:
            return decoder.step(torch.tensor([[token]], device=self.device))[0]

        answers, times = [], []
        for question in questions:
            for token in question[0].tolist():
                start = self._now()
                logits = step(token)
                times.append(self._now() - start)
            answers.append(self._answer(logits, step, times))
        report = self._report("sparse + ShadowKV", answers, [seconds], times, memory)
        return report | {"density": density, "decode_share": share, "options": options}

    def _report(
        self,
        name: str,
        answers: list[str],
        prefills: list[float],
        steps: list[float],
        memory: dict[str, int],
    ) -> dict[str, Any]:
        return {
            "name": name,
            "answers": answers,
            "found": sum(a == n for a, n in zip(answers, self.prompts.numbers, strict=True)),
            "prefill_s": statistics.median(prefills),
            "prefills": len(prefills),
            "density": 1.0,
            "tokens_per_s": 1 / statistics.median(steps),
            "decode_share": 1.0,
            "cache_bytes": memory,
        }


def _patterns(args: argparse.Namespace, config: Any, tokens: int) -> PatternConfig:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if args.patterns is None:
        return PatternConfig.uniform(methods.adaptive_of(tokens, SHARE), layers, heads)
    patterns = PatternConfig.load(args.patterns)
    if (patterns.num_layers, patterns.num_heads) != (layers, heads):
        raise ValueError(
            f"--patterns: expected {layers} layers x {heads} heads, got {patterns.num_layers} x "
            f"{patterns.num_heads}"
        )
    return patterns


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Any], str]:
    """(the report, JSON-ready, pictures of some heads, their caption).

    Raises ValueError or OSError where an argument cannot be met.
    """
    if args.layers is not None:
        raise ValueError("--layers: expected --model random with it, got the shipped model")
    device = torch.device(args.device)
    model, tokenizer = models.load("needle", device)
    prompts = build(args, tokenizer)
    asked = prompts.prompt(NEEDLES // 2)
    tokens = asked.shape[1]
    patterns = _patterns(args, model.config, tokens)
    reader = Reader(model, tokenizer, prompts)
    steps = tqdm(total=model.config.num_hidden_layers + 5, file=sys.stderr)
    with steps, torch.inference_mode():
        layers, pictures, exact = demo_measure.measure_layers(
            model, asked, patterns.layers, _PICTURED, steps
        )
        density = statistics.fmean(layer["density"] for layer in layers)
        same = methods.a_shape_of(tokens, density)
        control = PatternConfig.uniform(same, patterns.num_layers, patterns.num_heads)
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "dense": reader.dense,
            "sparse": lambda: reader.sparse("sparse prefill", patterns, density),
            "a_shape": lambda: reader.sparse("A-shape, same density", control, density),
        }
        if device.type in SHADOW_DEVICES:
            ways["shadowkv"] = lambda: reader.shadow(patterns, density)
        found = {}
        for name, ask in ways.items():
            steps.set_description(name)
            found[name] = ask()
            steps.update()
        hf.disable(model)
    config = model.config
    report = {
        "model": {
            "architecture": type(model).__name__,
            "name": "needle",
            "weights": "trained",
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
        },
        "text": prompts.source,
        "tokens": tokens,
        "excerpt": prompts.excerpt,
        "device": torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "needles": [
            {"depth": depth, "key": key, "number": number}
            for depth, key, number in zip(
                prompts.depths, prompts.keys, prompts.numbers, strict=True
            )
        ],
        "methods": found,
        "share": SHARE if args.patterns is None else None,
        "covering_patterns_error": exact,
        "layers": layers,
    }
    return report, pictures, f"the model needle, {tokens} tokens"


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    model, found, needles = report["model"], report["methods"], report["needles"]
    million = model["parameters"] / 1e6
    untrained = " (not trained on)" if report["text"] == "Python's help topics" else ""
    asked = tasks.FORMATS["ask"].format(key=needles[len(needles) // 2]["key"])
    lines = [
        "",
        f"text     {report['tokens']} tokens of {report['text']}{untrained}, with {len(needles)} "
        "needles",
        f"model    {model['name']}, GLM-4 architecture, {million:.1f}M parameters, "
        f"{model['layers']} layers, {model['heads']} query heads",
        f"         and {model['kv_heads']} kv heads of {model['head_dim']}",
        demo_report.device_line(report),
        "",
        *NOTE.splitlines(),
        "",
        *demo_report.layer_lines(report["layers"]),
        demo_report.exactness_line(report),
        "",
        "A needle in its text, and its question:",
        *(f"    | {line}" for line in (report["excerpt"] + "\n[...]" + asked).splitlines()),
        "",
        *_answer_lines(needles, found),
        "",
        *_method_lines(found),
        "",
        *_notes(report),
    ]
    return "\n".join(lines)


def _answer_lines(needles: list[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    names = [method["name"] for method in found.values()]
    lines = [
        "Answers (x: wrong):",
        f"{'depth':>8}  {'key':10} {'number':8} " + " ".join(f"{name:22}" for name in names),
    ]
    for row, needle in enumerate(needles):
        cells = []
        for method in found.values():
            answer = method["answers"][row]
            cells.append(answer if answer == needle["number"] else f"x {answer!r}"[:22])
        lines.append(
            f"{needle['depth']:8.0%}  {needle['key']:10} {needle['number']:8} "
            + " ".join(f"{cell:22}" for cell in cells)
        )
    return lines


def _method_lines(found: dict[str, Any]) -> list[str]:
    dense = found["dense"]["prefill_s"]
    lines = [
        f"{'':22} {'found':>7} {'prefill':>10} {'speed-up':>9} {'density':>8} {'tokens/s':>9} "
        f"{'keys a step':>12} {'cache, MiB':>11}"
    ]
    for method in found.values():
        memory = dict(method["cache_bytes"])
        host = memory.pop("host_values", 0)
        size = f"{sum(memory.values()) / 2**20:.1f}"
        lines.append(
            f"{method['name']:22} {method['found']:2} of {len(method['answers'])} "
            f"{demo_report.duration(method['prefill_s']):>10} "
            f"{dense / method['prefill_s']:8.2f}x {method['density']:8.1%} "
            f"{method['tokens_per_s']:9.1f} {method['decode_share']:12.1%} {size:>11}"
            + (f" + {host / 2**20:.1f} in host memory" if host else "")
        )
    return lines


def _notes(report: dict[str, Any]) -> list[str]:
    share = report["share"]
    lines = [
        "The sparse prefill takes "
        + (
            "the patterns given."
            if share is None
            else f"for each head the columns and offsets that cover {share:.0%} of its"
        ),
        *([] if share is None else ["attention, as estimated from the prompt's last 64 rows."]),
        "It reads each question with the text, so each lookup happens in it; its time is a median.",
        "As a check, A-shape (sinks and a window) of the same density: what is far gets lost.",
    ]
    shadow = report["methods"].get("shadowkv")
    if shadow is None:
        return [*lines, "ShadowKV was left out: it does not run on this device."]
    options = shadow["options"]
    graph = " in a CUDA graph (dense ones are not)" if report["device"] != "cpu" else ""
    return [
        *lines,
        f"ShadowKV (rank {options['rank']}, budget {options['sparse_budget']} tokens, values and "
        "factor in fp8) reads the text",
        "once and compresses it, in its prefill time; all tokens of questions and answers are "
        f"decode steps{graph}.",
    ]
