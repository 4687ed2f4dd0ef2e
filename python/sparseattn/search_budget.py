"""One budget for all heads of a model, shared out by what patterns do to its predictions.

Heads' errors do not tell what a model needs them for: a few of them carry its retrieval. So harm
is measured at the model's output (``search_harm``), head by head. In the first round all else is
dense. Harms do not simply add up, so further rounds start from the patterns chosen before, and
measure for each head what the next cheaper, the next dearer and dense attention would change.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparseattn.patterns import Dense, Pattern
from sparseattn.search_cost import TOLERANCE, frontier, share_out
from sparseattn.search_harm import NO_HARM, HarmMeter

if TYPE_CHECKING:
    from sparseattn.search import _Search

#: Options of a head whose harm is measured in the first round, those of least error for the cost.
MEASURED = 6
#: Rounds of measuring and sharing out; later ones measure three options of a head at most.
ROUNDS = 2

Option = tuple[float, float, int]  # error or harm, cost, candidate


class ModelBudget:
    """Measures and shares out for a search whose errors are all known.

    All results are in the search's journal. Forwards: for each prompt up to MEASURED a head in the
    first round and 3 a head in each further one, and a few for all heads together.
    """

    def __init__(self, search: _Search) -> None:
        self.search, self.journal = search, search.journal
        self.prompts = range(len(search.prompts))
        self._chosen: dict[int, list[list[Option]]] = {}
        self._kept: dict[int, list[list[int]]] = {}

    def run(self, progress: bool) -> None:
        for number in range(ROUNDS):
            self._round(number, progress)

    def winners(self, layer: int) -> list[Option] | None:
        """What each head of a layer gets, by the best round so far; None before the first's end."""
        done = [n for n in range(ROUNDS) if all((n, p) in self.journal.joint for p in self.prompts)]
        if not done:
            return None
        best = min(done, key=lambda n: self._mean([self.journal.joint[n, p] for p in self.prompts]))
        return self._share_out(best)[layer]

    # --- rounds ------------------------------------------------------------------------------

    def _round(self, number: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        search, harms, joint = self.search, self.journal.harms, self.journal.joint
        base = self._patterns(number - 1) if number else None
        measured = [self._measured(number, layer) for layer in range(search.layers)]
        counts = [sum(map(len, heads)) for heads in measured]
        with tqdm(
            total=len(search.prompts) * sum(counts),
            initial=sum(
                counts[layer]
                for layer in range(search.layers)
                for prompt in self.prompts
                if (number, prompt, layer) in harms
            ),
            desc=f"harm, round {number + 1} of {ROUNDS}",
            unit="run",
            disable=not progress,
        ) as bar:
            for prompt, (ids, answer) in enumerate(search.prompts):
                todo = [n for n in range(search.layers) if (number, prompt, n) not in harms]
                if not todo:
                    continue
                meter = HarmMeter(search.model, ids, answer, search.heads, search.layers, base)
                for layer in todo:
                    bar.set_postfix_str(f"prompt {prompt + 1}/{len(self.prompts)}, layer {layer}")
                    options = [
                        [search.pattern(layer, head, c) for c in own]
                        for head, own in enumerate(measured[layer])
                    ]
                    found = meter.layer_harms(layer, options, bar.update)
                    self.journal.add(
                        {"round": number, "prompt": prompt, "layer": layer, "harms": found}
                    )
        patterns = self._patterns(number)
        for prompt, (ids, answer) in enumerate(search.prompts):
            if (number, prompt) not in joint:
                meter = HarmMeter(search.model, ids, answer, search.heads, search.layers, patterns)
                self.journal.add({"round": number, "prompt": prompt, "joint": meter.joint()})

    def _measured(self, number: int, layer: int) -> list[list[int]]:
        """The candidates of every head of a layer whose harm a round measures."""
        if number:
            return [self._neighbours(number, layer, head) for head in range(self.search.heads)]
        if layer not in self._kept:
            self._kept[layer] = found = []
            for options in self.search.options(layer):
                own = [option for option in options if option[2] != self._dense]
                found.append([own[i][2] for i in frontier([o[:2] for o in own], MEASURED)])
        return self._kept[layer]

    def _neighbours(self, number: int, layer: int, head: int) -> list[int]:
        chosen = self._share_out(number - 1)[layer][head][2]
        own = [c for _, _, c in self._first(layer, head)]
        at = own.index(chosen)
        return list(
            dict.fromkeys(own[max(0, at - 1) : at] + own[at + 1 : at + 2] + own[at + 1 :][-1:])
        )

    # --- sharing out -------------------------------------------------------------------------

    @property
    def _dense(self) -> int:
        return self.search.candidates.index(Dense())

    @staticmethod
    def _mean(harms: list[float]) -> float:
        """Of the prompts' divergences: as shares of the answers, or texts' tokens, that are lost.

        So no prompt counts more than one that is lost, whatever is the divergence.
        """
        return sum(-math.expm1(-harm) for harm in harms) / len(harms)

    def _first(self, layer: int, head: int) -> list[Option]:
        """What the first round found for a head, the cheapest first, up to what does no harm."""
        costs = self.journal.records[0, layer]["costs"]
        harms = [self.journal.harms[0, prompt, layer][head] for prompt in self.prompts]
        found: list[Option] = []
        for n, c in enumerate(self._measured(0, layer)[head]):
            if n and n >= max(map(len, harms)):
                break
            # What was left out does as little harm as the last that was tried.
            harm = self._mean([own[min(n, len(own) - 1)] for own in harms])
            found.append((harm, costs[c][head], c))
        if not found or found[-1][0] > NO_HARM:
            found.append((0.0, costs[self._dense][head], self._dense))
        return found

    def _later(self, number: int, layer: int, head: int) -> list[Option]:
        """What a later round found: with the chosen option, and with others in its place."""
        costs = self.journal.records[0, layer]["costs"]
        chosen = self._share_out(number - 1)[layer][head][2]
        joint = self._mean([self.journal.joint[number - 1, prompt] for prompt in self.prompts])
        found = [(joint, costs[chosen][head], chosen)]
        for n, c in enumerate(self._neighbours(number, layer, head)):
            harms = [self.journal.harms[number, p, layer][head][n] for p in self.prompts]
            found.append((self._mean(harms), costs[c][head], c))
        return found

    def _share_out(self, number: int) -> list[list[Option]]:
        """``[layer][head]``: what each head gets by a round that is done."""
        if number not in self._chosen:
            layers, heads = range(self.search.layers), range(self.search.heads)
            options = [
                self._later(number, layer, head) if number else self._first(layer, head)
                for layer in layers
                for head in heads
            ]
            assert self.search.limit is not None
            limit = self.search.limit / TOLERANCE  # no head's own excess, so none in all
            picked = share_out([[o[:2] for o in own] for own in options], limit)
            flat = [own[i] for own, i in zip(options, picked, strict=True)]
            self._chosen[number] = [
                flat[layer * len(heads) : (layer + 1) * len(heads)] for layer in layers
            ]
        return self._chosen[number]

    def _patterns(self, number: int) -> list[list[Pattern]]:
        return [
            [self.search.pattern(layer, head, c) for head, (_, _, c) in enumerate(row)]
            for layer, row in enumerate(self._share_out(number))
        ]
