"""One budget for all heads of a model, shared out by what patterns do to its predictions.

Errors of heads' outputs do not tell what a model needs the heads for: a few of them carry its
retrieval, and nearly all keys may be what they need. So harm is measured at the model's output
(``search_harm``), for one head after the other, and taken to add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseattn.patterns import Dense
from sparseattn.search_cost import TOLERANCE, frontier, share_out
from sparseattn.search_harm import HarmMeter

if TYPE_CHECKING:
    from sparseattn.search import _Search

#: Options of a head whose harm is measured, of those with the least error for their cost.
MEASURED = 6

#: Part of dense attention's cost from which on an option is none: what it leaves out on one prompt
#: is little, and on the next it may be what the head is there for.
NEARLY_DENSE = 0.75

Option = tuple[float, float, int]  # harm, cost, candidate


class ModelBudget:
    """Measures and shares out, for a search whose errors are all known.

    All results are in the search's journal. Forwards: of each prompt two a layer, and one for each
    option of a head until one does no harm, MEASURED at most; each from the head's layer on.
    """

    def __init__(self, search: _Search) -> None:
        self.search, self.harms = search, search.journal.harms
        self.prompts, self.layers = range(len(search.prompts)), range(search.layers)
        self._measured: dict[int, list[list[int]]] = {}
        self._winners: list[Option] | None = None

    def run(self, progress: bool) -> None:
        from tqdm.auto import tqdm

        search = self.search
        counts = [sum(map(len, self.measured(layer))) for layer in self.layers]
        with tqdm(
            total=len(self.prompts) * sum(counts),
            initial=sum(counts[layer] for _, layer in self.harms),
            desc="harm",
            unit="run",
            disable=not progress,
        ) as bar:
            for prompt, (ids, answer) in enumerate(search.prompts):
                meter = HarmMeter(search.model, ids, answer, search.heads, search.layers)
                for layer in self.layers:
                    if (prompt, layer) in self.harms:
                        continue
                    bar.set_postfix_str(f"prompt {prompt + 1}/{len(self.prompts)}, layer {layer}")
                    options = [
                        [search.pattern(layer, head, c) for c in own]
                        for head, own in enumerate(self.measured(layer))
                    ]
                    found = meter.layer_harms(layer, options, bar.update)
                    search.journal.add({"prompt": prompt, "layer": layer, "harms": found})

    def measured(self, layer: int) -> list[list[int]]:
        """By head the candidates whose harm is measured, the cheapest first; dense is known."""
        if layer not in self._measured:
            dense = self._dense()
            self._measured[layer] = found = []
            for options in self.search.options(layer):
                most = NEARLY_DENSE * next(cost for _, cost, c in options if c == dense)
                sparse = [option for option in options if option[2] != dense]
                own = [option for option in sparse if option[1] <= most]
                own = own or sorted(sparse, key=lambda option: option[1])[:1]
                found.append([own[i][2] for i in frontier([o[:2] for o in own], MEASURED)])
        return self._measured[layer]

    def winners(self, layer: int) -> list[Option] | None:
        """What each head of the layer gets; None as long as some harm is unknown."""
        if len(self.harms) < len(self.prompts) * len(self.layers):
            return None
        heads = range(self.search.heads)
        if self._winners is None:
            options = [self._options(at, head) for at in self.layers for head in heads]
            assert self.search.limit is not None
            # A head may exceed what it is given a little, all of them together may not.
            limit = self.search.limit / TOLERANCE
            chosen = share_out([[o[:2] for o in own] for own in options], limit)
            self._winners = [own[i] for own, i in zip(options, chosen, strict=True)]
        return self._winners[layer * len(heads) : (layer + 1) * len(heads)]

    def _options(self, layer: int, head: int) -> list[Option]:
        costs = self.search.journal.records[0, layer]["costs"]
        harms = [self.harms[prompt, layer][head] for prompt in self.prompts]
        found = [
            # What was left out does as little harm as the last that was tried.
            (sum(own[min(n, len(own) - 1)] for own in harms) / len(harms), costs[c][head], c)
            for n, c in enumerate(self.measured(layer)[head])
        ]
        dense = self._dense()
        return [*found, (0.0, costs[dense][head], dense)]

    def _dense(self) -> int:
        return self.search.candidates.index(Dense())
