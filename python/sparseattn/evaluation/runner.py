"""Runs an evaluation: every method on the same prompts, cell by cell.

The prompts of a task and length are made and tokenised once; methods share nothing else, neither
caches nor estimates. The record is written after every cell (one method, task and length).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparseattn import hf
from sparseattn.bench_tools import available_memory
from sparseattn.evaluation import forward, methods, metrics, published
from sparseattn.evaluation.methods import Method, PatternBook, ShadowSizes
from sparseattn.evaluation.published import Question, QuestionFile
from sparseattn.evaluation.record import Record

#: Seeds of prompts that patterns are fitted on lie this far from those of the examples.
FIT_SEED = 1_000_003
#: Prompts that patterns are fitted on, beside windows of text. Several values of a key hang on a
#: few heads whose patterns serve one prompt and fail the next: three such prompts miss one of them.
FIT_TASKS = ("niah_multikey", *9 * ("niah_multivalue",), "niah_multiquery", "variable_tracking")
FIT_WINDOWS = 6
NIAH_TASK = "niah_single"
_MOST_BATCHED = 64


@dataclass(frozen=True)
class Plan:
    """What is run. ``depths``, ``needles``: the needle grid has ``needles`` examples for every
    length and depth; ``tasks`` have ``examples`` for every length; perplexity has ``windows``."""

    methods: tuple[Method, ...]
    lengths: tuple[int, ...]
    parts: tuple[str, ...] = ("niah", "tasks", "perplexity")
    tasks: tuple[str, ...] = ()
    examples: int = 5
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 1
    windows: int = 1
    loss_tokens: int = 1024
    loss_steps: int = 128
    files: tuple[QuestionFile, ...] = ()
    chat: bool = False
    max_length: int = 0
    batch: int | None = None
    seed: int = 0
    sizes: ShadowSizes = field(default_factory=ShadowSizes)


@dataclass(frozen=True)
class Item:
    """One tokenised example."""

    ids: tuple[int, ...]
    question: Question  # its prompt is empty where only tokens were made
    depth: float | None = None
    cut: bool = False


class Runner:
    """Runs a plan; ``progress`` is called with (examples done, what is being done)."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        book: PatternBook,
        record: Record,
        text_ids: Sequence[int] | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        """text_ids: the tokens that perplexity is measured on. note: gets what was left out."""
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.book, self.record, self.note = book, record, note
        self.text_ids = text_ids
        self.device = next(model.parameters()).device
        self.ends = forward.end_tokens(model, tokenizer)

    # --- what there is to do -----------------------------------------------------------------

    def cells(self) -> Iterator[tuple[str, str, int | None, str | None, int]]:
        """(kind, task, length, source, examples) of everything, without the methods."""
        plan = self.plan
        for length in plan.lengths:
            if "niah" in plan.parts:
                yield "niah", NIAH_TASK, length, None, len(plan.depths) * plan.needles
            if "tasks" in plan.parts:
                for task in plan.tasks:
                    yield "task", task, length, None, plan.examples
            if "perplexity" in plan.parts and self._windows(length):
                yield "perplexity", "perplexity", length, None, len(self._windows(length))
        for file in plan.files:
            yield "file", file.name, None, file.digest, len(file.questions)

    def total(self) -> int:
        """Examples over all methods."""
        return sum(count for *_, count in self.cells()) * len(self.plan.methods)

    def run(self, advance: Callable[[int, str], None] = lambda count, text: None) -> None:
        """Runs what the record does not have yet."""
        if "perplexity" in self.plan.parts:
            for length in self.plan.lengths:
                if not self._windows(length):
                    self.note(
                        f"perplexity at {length} tokens is left out: the text has "
                        f"{len(self.text_ids or ())}"
                    )
        for kind, task, length, source, count in self.cells():
            todo = []
            for method in self.plan.methods:
                key = {"kind": kind, "task": task, "length": length, "source": source}
                if self.record.has(method=method.name, **key):
                    advance(count, "done before")
                else:
                    todo.append(method)
            if not todo:
                continue
            where = task if length is None else f"{task} {length}"
            advance(0, f"{where}: prompts")
            run = self._perplexity if kind == "perplexity" else self._questions
            for method, cell in run(kind, task, length, source, todo, advance, where):
                names = {"kind": kind, "method": method.name, "task": task, "length": length}
                self.record.add({**names, "source": source, **cell})

    # --- prompts -----------------------------------------------------------------------------

    def _items(self, kind: str, task: str, length: int | None, source: str | None) -> list[Item]:
        from sparseattn.evaluation import tasks

        plan = self.plan
        if kind == "file":
            file = next(f for f in plan.files if (f.name, f.digest) == (task, source))
            items = []
            for question in file.questions:
                limit = plan.max_length - question.max_new_tokens
                if limit < 2:
                    raise ValueError(
                        f"--max-length: expected more than the {question.max_new_tokens} tokens of "
                        f"an answer of {file.name}, got {plan.max_length}"
                    )
                ids, cut = published.encode(question, self.tokenizer, limit, chat=plan.chat)
                items.append(Item(tuple(ids), replace(question, prompt=""), cut=cut))
            return items
        if kind == "niah":
            wanted = [(d, n) for d in plan.depths for n in range(plan.needles)]
            places = [(index, depth) for index, (depth, _) in enumerate(wanted)]
        else:
            places = [(index, None) for index in range(plan.examples)]
        items = []
        for index, depth in places:
            example = tasks.make(
                task, self.tokenizer, length, seed=plan.seed, index=index, depth=depth
            )
            if len(example.input_ids) != length:
                raise RuntimeError(f"{task}: made {len(example.input_ids)} tokens, not {length}")
            question = Question(
                index, "", tuple(example.answers), example.max_new_tokens, example.metric
            )
            items.append(Item(tuple(example.input_ids), question, example.depth))
        return items

    def _batches(self, items: list[Item]) -> list[list[int]]:
        """Positions of items of equal length, at most a batch together."""
        groups: dict[int, list[int]] = {}
        for position, item in enumerate(items):
            groups.setdefault(len(item.ids), []).append(position)
        batches = []
        for length, positions in groups.items():
            new = max(items[position].question.max_new_tokens for position in positions)
            step = self.plan.batch or self.fitting_batch(length + new)
            batches += [positions[n : n + step] for n in range(0, len(positions), step)]
        return batches

    def fitting_batch(self, tokens: int) -> int:
        """How many prompts fit into half of the free memory, roughly, by the model's sizes."""
        config, weight = self.model.config, next(self.model.parameters())
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        working = 8 * config.hidden_size + 4 * config.intermediate_size + 6 * heads * head_dim
        # The cache twice: it grows by copies.
        needed = (2 * cached + working) * weight.element_size() * tokens
        if weight.is_cuda:
            free, most = torch.cuda.mem_get_info(weight.device)[0], _MOST_BATCHED
            free += torch.cuda.memory_reserved(weight.device)  # held, but not in use
            free -= torch.cuda.memory_allocated(weight.device)
        else:
            free, most = available_memory(), _MOST_BATCHED // 8
        return int(min(most, max(1, free / 2 // needed)))

    # --- methods -----------------------------------------------------------------------------

    @contextmanager
    def _enabled(self, prefill: str, length: int) -> Iterator[None]:
        hf.enable(self.model, self.book.config(prefill, length), min_length=0)
        try:
            yield
        finally:
            hf.disable(self.model)

    def _densities(self, ids: Sequence[int], todo: Sequence[Method]) -> dict[str, float]:
        """By prefill, on one prompt."""
        length = len(ids)
        prefills = dict.fromkeys(method.prefill for method in todo)
        configs = {name: self.book.config(name, length) for name in prefills if name != "dense"}
        found = {"dense": 1.0}
        if configs and length >= hf.MIN_QUERY_ROWS:
            one = torch.tensor([ids], device=self.device)
            found |= forward.densities(self.model, one, configs)
        return found | {name: 1.0 for name in configs if name not in found}

    def _questions(
        self,
        kind: str,
        task: str,
        length: int | None,
        source: str | None,
        todo: Sequence[Method],
        advance: Callable[[int, str], None],
        where: str,
    ) -> Iterator[tuple[Method, dict[str, Any]]]:
        items = self._items(kind, task, length, source)
        batches = self._batches(items)
        tensors = [torch.tensor([items[n].ids for n in batch]) for batch in batches]
        # One prompt tells the density; of a file the one of middle length.
        middle = sorted(items, key=lambda item: len(item.ids))[len(items) // 2]
        density = self._densities(middle.ids, todo)
        for method in todo:
            rows: list[dict[str, Any]] = [{} for _ in items]
            shares, sizes, start = [], [], time.perf_counter()
            for batch, ids in zip(batches, tensors, strict=True):
                advance(0, f"{where}: {method.name}")
                tokens = ids.shape[1]
                cache = methods.cache_of(method, self.model.config, self.plan.sizes, tokens)
                with self._enabled(method.prefill, tokens):
                    new = max(items[position].question.max_new_tokens for position in batch)
                    outputs = forward.generate(
                        self.model, ids.to(self.device), new, cache, self.ends
                    )
                shares.append(methods.decode_share(cache, tokens))
                sizes.append(methods.cache_bytes(cache) / len(batch))
                for position, output in zip(batch, outputs, strict=True):
                    rows[position] = self._scored(items[position], output)
                advance(len(batch), f"{where}: {method.name}")
            yield (
                method,
                {
                    "score": _mean([row["score"] for row in rows]),
                    "density": density[method.prefill],
                    "decode_share": _mean(shares),
                    "cache_bytes": round(_mean(sizes)),
                    "batch": max(map(len, batches)),
                    "seconds": round(time.perf_counter() - start, 3),
                    "examples": rows,
                },
            )

    def _scored(self, item: Item, output: list[int]) -> dict[str, Any]:
        question = item.question
        output = output[: question.max_new_tokens]  # others of its batch may have more
        text = self.tokenizer.decode(output, skip_special_tokens=True)
        scored = published.scored_text(question, text)
        row = {
            "index": question.index,
            "tokens": len(item.ids),
            "score": metrics.score(question.metric, scored, question.answers, question.classes),
            "output": text,
            "answers": list(question.answers),
            "metric": question.metric,
        }
        if item.depth is not None:
            row["depth"] = item.depth
        if item.cut:
            row["cut"] = True
        return row

    # --- perplexity --------------------------------------------------------------------------

    def _windows(self, length: int) -> list[int]:
        """Where the windows of ``length`` tokens start: evenly spaced over the text's first
        ``2 * length`` tokens, no more than have tokens of their own that count."""
        spare = min(len(self.text_ids or ()), 2 * length) - length
        if spare < 0:
            return []
        count = min(self.plan.windows, spare // max(1, self._counts(length)[0]) + 1)
        return [spare * n // max(1, count - 1) for n in range(count)]

    def _counts(self, length: int) -> tuple[int, int]:
        """Tokens whose loss counts: all, and those that are also fed one by one."""
        all_tokens = min(self.plan.loss_tokens, length // 2)
        return all_tokens, min(self.plan.loss_steps, all_tokens)

    def _perplexity(
        self,
        kind: str,
        task: str,
        length: int,
        source: str | None,
        todo: Sequence[Method],
        advance: Callable[[int, str], None],
        where: str,
    ) -> Iterator[tuple[Method, dict[str, Any]]]:
        text = torch.tensor(self.text_ids)
        starts = self._windows(length)
        windows = torch.stack([text[start : start + length] for start in starts])
        density = self._densities(windows[0].tolist(), todo)
        count, steps = self._counts(length)
        step = self.plan.batch or min(8, self.fitting_batch(length))
        for method in todo:
            losses, share, size, begin = [], 1.0, [], time.perf_counter()
            for ids in windows.split(step):
                advance(0, f"{where}: {method.name}")
                # A prompt is shorter by the tokens that are fed one by one.
                prompt = length - steps if method.shadow else length
                cache = methods.cache_of(method, self.model.config, self.plan.sizes, prompt)
                with self._enabled(method.prefill, prompt):
                    if method.shadow:
                        found = forward.decode_losses(self.model, ids.to(self.device), steps, cache)
                        share = methods.decode_share(cache, prompt)
                        size.append(methods.cache_bytes(cache) / len(ids))
                    else:
                        found = forward.prefill_losses(self.model, ids.to(self.device), count)
                losses.append(found)
                advance(len(ids), f"{where}: {method.name}")
            rows = [
                {"start": start, "decode_loss": float(row[-steps:].mean())}
                | ({} if method.shadow else {"loss": float(row.mean())})
                for start, row in zip(starts, torch.cat(losses), strict=True)
            ]
            cell = {
                "score": None if method.shadow else _perplexity_of(rows, "loss"),
                "decode_score": _perplexity_of(rows, "decode_loss"),
                "loss_tokens": count,
                "loss_steps": steps,
                "density": density[method.prefill],
                "decode_share": share if method.shadow else None,
                "batch": min(step, len(starts)),
                "seconds": round(time.perf_counter() - begin, 3),
            }
            if size:
                cell["cache_bytes"] = round(_mean(size))
            yield method, cell | {"examples": rows}


def fit_prompts(
    model: Any, tokenizer: Any, seed: int, text_from: int
) -> Callable[[int], Iterator[tuple[torch.Tensor, int]]]:
    """What patterns are fitted on, for a length: (int64 [1, length + answer], answer), each made
    when it is asked for.

    A prompt for each of FIT_TASKS, of another seed than any example, with the tokens that the dense
    model answers, and FIT_WINDOWS windows of the haystack's text from token ``text_from`` on, one
    after the other (of its end where it is shorter, as many as it holds), without an answer.
    """

    def prompts_of(length: int) -> Iterator[tuple[torch.Tensor, int]]:
        from transformers import DynamicCache

        from sparseattn.evaluation import tasks

        ends, device = forward.end_tokens(model, tokenizer), next(model.parameters()).device
        for place, task in enumerate(FIT_TASKS):
            index = FIT_TASKS[:place].count(task)
            example = tasks.make(task, tokenizer, length, seed=seed + FIT_SEED, index=index)
            ids = torch.tensor([example.input_ids])
            cache = DynamicCache(config=model.config)
            new = example.max_new_tokens
            (answer,) = forward.generate(model, ids.to(device), new, cache, ends)
            yield torch.cat([ids, torch.tensor([answer], dtype=torch.long)], 1), len(answer)
        windows = FIT_WINDOWS * length
        text = forward.first_tokens(tokenizer, tasks.haystack_text(), text_from + windows)
        text = text[-windows:]
        for start in range(0, len(text) - length + 1, length):
            yield torch.tensor([text[start : start + length]]), 0

    return prompts_of


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _perplexity_of(rows: Sequence[dict[str, Any]], key: str) -> float:
    return math.exp(_mean([row[key] for row in rows]))


def output_folder(path: str | Path) -> Path:
    """The folder, made if it is not there; ValueError if a file is in its place."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
