"""Offline search for the pattern of every head, with the real operators on a model's own q, k, v.

Every layer of the model runs dense. On each layer's q, k and v every candidate is also run by
``sparse_attention``, and scored by the error of its output against the dense one; the best
candidate of equal cost is kept. MInference (arXiv 2407.02490, section 3.3) searches in this
manner; here cost is measured in the units of the kernels (see ``search_cost``), not by counting
diagonals.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sparseattn import ops
from sparseattn.config import PatternConfig, pattern_to_json
from sparseattn.patterns import PATTERNS, AShape, Dense, Pattern
from sparseattn.search_budget import MEASURED, NEARLY_DENSE, ModelBudget
from sparseattn.search_cost import (
    TOLERANCE,
    CostMeter,
    budget_keys,
    check_candidates,
    default_candidates,
    fit,
    share_out,
    shrink,
)
from sparseattn.search_harm import NO_HARM, TEXT_ROWS
from sparseattn.search_journal import Journal
from sparseattn.search_model import attention_visitor, checked_prompts, digest, fingerprint

DEFAULT_BUDGET = 0.1
#: Parts of the budget at which candidates take part where heads share it.
SHARES = (0.5, 1.0, 2.0, 4.0)
#: The same where all heads of the model do: most need little.
MODEL_SHARES = (0.125, 0.25, *SHARES)
_MOST = 0.95  # of dense attention's keys: what default candidates may cost
# Stands in for a candidate that a head does not take; its output is not looked at.
_NEXT_TO_NOTHING = AShape(0, 1)


def search_patterns(
    model: Any,
    prompt_ids: torch.Tensor | Sequence[torch.Tensor],
    *,
    candidates: Sequence[Pattern] | None = None,
    budget: float | None = None,
    shared: bool | Literal["layer", "model"] = False,
    answers: Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> PatternConfig:
    """Finds the pattern of every query head of every layer of a transformers model.

    For each prompt, layer and head the score of a candidate is the relative L2 error of its output
    over all rows, ``|sparse - dense| / |dense|``, averaged over the prompts; the smallest wins
    (equal errors: the smaller cost, then the earlier candidate).

    Budget rule: a candidate's cost is measured for each head on the longest prompt, in keys per
    query row that the kernel visits. Where it exceeds the budget by more than 10 % its offsets
    (window, blocks) are reduced by a quarter as often as needed, and the reduced pattern takes part
    for that head. A candidate that still does not fit is dropped for that head. If that drops all,
    the cheapest takes part alone.

    Args:
        model: a transformers causal language model whose attention goes through transformers'
            attention interface (Llama, Glm, Glm4, Qwen2, Qwen3, Phi3 and others), on any device,
            in a dtype the operators take there. Its attention setting is restored afterwards.
        prompt_ids: token ids ``[L]`` or ``[1, L]``, or a list of those (lengths may differ).
        candidates: patterns to choose from; None makes a set of about equal cost, scaled to the
            longest prompt.
        budget: share of dense attention's keys, 0 < budget < 1. None: 0.1 with the default
            candidates, no limit with given ones.
        shared: "layer" (or True): heads of a layer share its budget: candidates take part at half
            the budget, once, twice and four times it (those given only as far as they are large
            enough), none is dropped, and the sum of the heads' errors is made small for costs that
            are the budget on average (``search_cost.share_out``). "model": all heads of the model
            share one budget, dense is a candidate too, and what is made small is the sum of the
            harms: of the model's predictions that are lost when this head alone is sparse
            (``search_harm``). Harm is measured for at most six options of a head, those of the
            smallest errors for costs up to three quarters of dense attention's, from the cheapest
            to the first that does none: up to 6 * heads * layers forwards of each prompt, each
            from the head's layer on. The costs are at most the budget on average.
        answers: for each prompt how many of its last tokens are an answer. Their rows attend to all
            keys, as in decode, and count for no error; with "model" the rows that predict them and
            what follows count, and of a prompt without an answer the last 1024, at most half
            (``search_harm.counted_rows``). None: no answers.
        output: file that gets the config after every layer (layers not yet searched are dense).
            Beside it ``<output>.search.jsonl`` keeps all errors and costs, one line a layer.
        resume: go on from ``<output>.search.jsonl``, with the same result as without the
            interruption. False starts anew.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: bad arguments; a model with sliding-window layers or with attention
            that does not go through the interface; files of a search with other settings.
    """
    search = _Search(model, prompt_ids, candidates, budget, output, resume, shared, answers)
    return search.run(progress)


class _Search:
    def __init__(
        self,
        model: Any,
        prompt_ids: torch.Tensor | Sequence[torch.Tensor],
        candidates: Sequence[Pattern] | None,
        budget: float | None,
        output: str | os.PathLike[str] | None,
        resume: bool,
        shared: bool | str = False,
        answers: Sequence[int] | None = None,
    ) -> None:
        if shared not in (False, True, "layer", "model"):
            raise ValueError(f"shared: expected False, True, 'layer' or 'model', got {shared!r}")
        self.model = model
        self.shared = "layer" if shared is True else shared
        config = model.config.get_text_config()
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.prompts = checked_prompts(prompt_ids, config.vocab_size, answers)
        longest = self.prompts[0][0].shape[1] - self.prompts[0][1]
        if budget is None and candidates is None:
            budget = DEFAULT_BUDGET
        self.limit = None if budget is None else TOLERANCE * budget_keys(budget, longest)
        if shared and budget is None:
            raise ValueError("budget: expected a share that heads can share, got None")
        given = None if candidates is None else check_candidates(candidates)
        # Of every candidate the part of the budget that it may cost a head.
        self.parts: list[float] = []
        self.candidates: list[Pattern] = []
        shares = {False: (1.0,), "layer": SHARES, "model": MODEL_SHARES}[self.shared]
        for part in shares:
            own = given
            if own is None:
                own = self._default_candidates(longest, part, budget)
            self.candidates += own
            self.parts += [part] * len(own)
        if shared == "model" and Dense() not in self.candidates:
            self.candidates.append(Dense())
            self.parts.append(math.inf)
        self.output = None if output is None else Path(output)
        name = getattr(model.config, "_name_or_path", "") or None
        header = {
            "format": "sparseattn-search",
            "version": 1,
            "model": name,
            "shape": [self.layers, self.heads],
            "dtype": str(model.dtype),
            "weights": fingerprint(model),
            "prompts": [digest(ids) for ids, _ in self.prompts],
            "candidates": [pattern_to_json(pattern) for pattern in self.candidates],
            "budget": budget,
        }
        if any(answer for _, answer in self.prompts):
            header["answers"] = [answer for _, answer in self.prompts]
        if shared:
            header["shared"] = list(shares)
        if shared == "model":
            header["measured"] = [MEASURED, NEARLY_DENSE, TEXT_ROWS, NO_HARM]
        self.journal = Journal(self.output, header, resume)
        self.model_budget = ModelBudget(self) if shared == "model" else None
        self.name = name

    def _default_candidates(self, length: int, part: float, budget: float) -> list[Pattern]:
        try:
            return default_candidates(length, min(_MOST, part * budget) if self.shared else budget)
        except ValueError:
            # Too short a prompt for this part; the largest must do.
            if self.shared and part < SHARES[-1]:
                budget_keys(budget, length)
                return []
            raise

    def run(self, progress: bool) -> PatternConfig:
        from tqdm.auto import tqdm

        runs = len(self.candidates)
        with tqdm(
            total=len(self.prompts) * self.layers * runs,
            initial=len(self.journal.records) * runs,
            desc="search",
            unit="run",
            disable=not progress,
        ) as bar:
            for number, (ids, _) in enumerate(self.prompts):
                if all((number, layer) in self.journal.records for layer in range(self.layers)):
                    continue
                self._run_prompt(number, ids, bar)
        self._write()
        if self.model_budget is not None:
            self.model_budget.run(progress)
            self._write()
        return self.config()

    def _run_prompt(self, number: int, ids: torch.Tensor, bar: Any) -> None:
        def visit(layer: int, q: Any, k: Any, v: Any, scale: float | None, dense: Any) -> None:
            if (number, layer) in self.journal.records:
                return
            bar.set_postfix_str(f"prompt {number + 1}/{len(self.prompts)}, layer {layer}")
            self.journal.add(self._score(number, layer, q, k, v, scale, dense, bar))
            self._write()

        with attention_visitor(self.model, visit), torch.no_grad():
            device = self.model.get_input_embeddings().weight.device
            self.model.base_model(input_ids=ids.to(device), use_cache=False)
        for layer in range(self.layers):
            if (number, layer) not in self.journal.records:
                raise ValueError(
                    f"model: expected attention through transformers' attention interface, got "
                    f"none from layer {layer} of {type(self.model).__name__}"
                )

    def _score(
        self,
        number: int,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        dense: torch.Tensor,
        bar: Any,
    ) -> dict[str, Any]:
        """Errors of all candidates for all heads: one record of the journal."""
        prefill = q.shape[2] - self.prompts[number][1]
        q, k, v, dense = (x[:, :, :prefill] for x in (q, k, v, dense))
        if q.shape[1] != self.heads:
            raise ValueError(
                f"model: expected {self.heads} query heads in layer {layer}, got {q.shape[1]}"
            )
        record: dict[str, Any] = {"prompt": number, "layer": layer}
        if number == 0:
            record.update(self._sizes(q, k))
            steps = record["steps"]
        else:
            steps = self.journal.records[0, layer]["steps"]
        record["errors"] = []
        for candidate, head_steps in zip(self.candidates, steps, strict=True):
            patterns = [
                _NEXT_TO_NOTHING if step is None else shrink(candidate, step) for step in head_steps
            ]
            out = ops.sparse_attention(q, k, v, patterns, scale=scale)
            errors = _relative_errors(out, dense)
            for head, error in enumerate(errors):
                if head_steps[head] is not None and not math.isfinite(error):
                    raise ValueError(
                        f"model: expected finite attention outputs, got others in layer {layer}, "
                        f"head {head} (a dtype of too small range?)"
                    )
            record["errors"].append(
                [None if step is None else e for step, e in zip(head_steps, errors, strict=True)]
            )
            bar.update()
        return record

    def _sizes(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
        """Steps (None: dropped) and costs ``[candidate][head]`` by the budget rule."""
        meter = CostMeter(q, k)
        fits = [
            fit(candidate, q, k, None if self.limit is None else part * self.limit, meter)
            for candidate, part in zip(self.candidates, self.parts, strict=True)
        ]
        steps: list[list[int | None]] = [list(f[0]) for f in fits]
        # Heads that share a budget may take what is over their part of it.
        for head in range(0 if self.shared else self.heads):
            if any(within[head] for _, _, within in fits):
                kept = {c for c, (_, _, within) in enumerate(fits) if within[head]}
            else:
                kept = {min(range(len(fits)), key=lambda c, head=head: fits[c][1][head])}
            for c in range(len(fits)):
                if c not in kept:
                    steps[c][head] = None
        return {"steps": steps, "costs": [[float(f"{x:.6g}") for x in f[1]] for f in fits]}

    def pattern(self, layer: int, head: int, candidate: int) -> Pattern:
        """The candidate as the budget rule left it for this head."""
        steps = self.journal.records[0, layer]["steps"][candidate][head]
        return shrink(self.candidates[candidate], steps)

    def options(self, layer: int) -> list[list[tuple[float, float, int]]]:
        """Mean error over the prompts done, cost and candidate of every option, by head."""
        first = self.journal.records[0, layer]
        done = [
            self.journal.records[number, layer]["errors"]
            for number in range(len(self.prompts))
            if (number, layer) in self.journal.records
        ]
        return [
            [
                (sum(errors[c][head] for errors in done) / len(done), first["costs"][c][head], c)
                for c in range(len(self.candidates))
                if first["steps"][c][head] is not None
            ]
            for head in range(self.heads)
        ]

    def best(self, layer: int) -> list[tuple[Pattern, float, float]]:
        """Pattern, mean error (harm, once known) and cost of every head's winner."""
        winners = None if self.model_budget is None else self.model_budget.winners(layer)
        if winners is None:
            ranked = self.options(layer)
            if self.shared:
                assert self.limit is not None
                chosen = share_out([[option[:2] for option in own] for own in ranked], self.limit)
            else:
                chosen = [own.index(min(own)) for own in ranked]
            winners = [own[i] for own, i in zip(ranked, chosen, strict=True)]
        return [
            (self.pattern(layer, head, c), error, cost)
            for head, (error, cost, c) in enumerate(winners)
        ]

    def config(self) -> PatternConfig:
        layers = [
            [pattern for pattern, _, _ in self.best(layer)]
            if (0, layer) in self.journal.records
            else [Dense()] * self.heads
            for layer in range(self.layers)
        ]
        return PatternConfig.from_layers(layers, self.name)

    def _write(self) -> None:
        if self.output is not None:
            self.config().save(self.output)

    def report(self) -> str:
        """How often each pattern won, with its mean error and cost."""
        winners = [winner for layer in range(self.layers) for winner in self.best(layer)]
        counts = Counter(pattern for pattern, _, _ in winners)
        lines = ["heads  mean error  keys/row  pattern"]
        for pattern, count in counts.most_common():
            own = [(error, cost) for p, error, cost in winners if p == pattern]
            error, cost = (sum(column) / count for column in zip(*own, strict=True))
            lines.append(f"{count:5d}  {error:10.4f}  {cost:8.0f}  {pattern}")
        return "\n".join(lines)


def _relative_errors(out: torch.Tensor, dense: torch.Tensor) -> list[float]:
    """``|out - dense| / |dense|`` over rows and dims, per head of ``[1, Hq, L, D]``; 6 digits.

    The digits are cut here, so that a resumed search decides on the very numbers of its file.
    """
    errors = []
    for head in range(out.shape[1]):  # one head at a time: fp32 copies stay small
        reference = dense[0, head].float()
        error = (out[0, head].float() - reference).norm() / reference.norm().clamp(min=1e-12)
        errors.append(error)
    return [float(f"{error:.6g}") for error in torch.stack(errors).tolist()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line's ``search``."""
    parser.add_argument("model", help="model name or folder, as transformers loads it")
    parser.add_argument(
        "--prompt", nargs="+", required=True, metavar="FILE", help="text files to search on"
    )
    parser.add_argument(
        "--length",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens taken from each prompt; with several, each prompt at each length "
        "(default: the whole file)",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="pattern config to write")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"share of dense attention's keys (default: {DEFAULT_BUDGET}; no limit with "
        "--candidate)",
    )
    parser.add_argument(
        "--candidate",
        action="append",
        type=parse_pattern,
        metavar="KIND:SIZES",
        help="a candidate instead of the default set, e.g. vertical_slash:1000,6096, "
        "a_shape:128,3968, block_sparse:100 (repeat for more)",
    )
    parser.add_argument(
        "--share-budget",
        nargs="?",
        choices=("layer", "model"),
        const="layer",
        default=False,
        help="heads of a layer (the default) or of the whole model share one budget: some cost "
        "more, some less; for the whole model by what patterns do to its predictions",
    )
    parser.add_argument("--restart", action="store_true", help="do not go on from an earlier run")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 on cuda, float32 on the cpu",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def parse_pattern(text: str) -> Pattern:
    """``kind:size,size`` as a pattern; argparse shows the error's text."""
    kind, _, sizes = text.partition(":")
    try:
        return PATTERNS[kind](*(int(size) for size in sizes.split(",") if size))
    except (KeyError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected KIND:SIZES with a kind of {', '.join(PATTERNS)}, got {text!r} ({error})"
        ) from error


def run(args: argparse.Namespace) -> int:
    """The command line's ``search``: returns the exit status."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for length in args.length or ():
        if length < 1:
            raise ValueError(f"--length: expected at least 1, got {length}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = []
    for path in args.prompt:
        ids = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt").input_ids
        for length in args.length or (ids.shape[1],):
            if ids.shape[1] < length:
                raise ValueError(
                    f"--length: expected at most the {ids.shape[1]} tokens of {path}, got {length}"
                )
            prompts.append(ids[:, :length])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype))
    search = _Search(
        model.to(device),
        prompts,
        args.candidate,
        args.budget,
        args.output,
        not args.restart,
        args.share_budget,
    )
    try:
        search.run(not args.no_progress)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {search.journal.path}")
        return 130
    print(search.report())
    print(f"wrote {args.output}; all scores are in {search.journal.path}")
    return 0
