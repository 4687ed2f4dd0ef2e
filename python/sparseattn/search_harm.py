"""What a pattern of one head does to a model's predictions: the measure of a whole-model budget.

The model runs with one head's attention output replaced by a sparse one and everything else
dense. Harm is the share of its predictions that are lost: ``1 - exp(-d)``, averaged over the rows
that count, with d the Kullback-Leibler divergence in nats of the row's next-token distribution
from the dense model's. So it is about d where d is small, in a text and in an answer, and one
token that is quite wrong weighs no more than one token. What rounding alone does is taken off
(nothing to speak of in fp32). Only forward passes. They begin at the changed layer, from the dense
hidden states, and the last layer attends for the rows that count only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sparseattn import ops
from sparseattn.patterns import AShape, Dense, Pattern
from sparseattn.search_model import attention_replaced

#: Last rows of a prompt without an answer whose predictions count.
TEXT_ROWS = 1024
#: Options of a head that cost more than one of this harm are not tried.
NO_HARM = 1e-5
_NEXT_TO_NOTHING = AShape(0, 1)
_KL_ROWS = 128  # rows whose fp32 distributions exist at a time


def counted_rows(length: int, answer: int) -> int:
    """How many last rows count: those that predict the answer and what follows it, or of a text
    TEXT_ROWS (at most half)."""
    return answer + 1 if answer else min(TEXT_ROWS, max(1, length // 2))


class HarmMeter:
    """Harms on one prompt, layer after layer.

    ``layer_harms`` must be called for layers in ascending order, each at most once.
    """

    def __init__(self, model: Any, ids: Tensor, answer: int, heads: int, layers: int) -> None:
        """ids: int64 [1, L]; answer: how many of its last tokens are an answer (0: a text)."""
        self.model, self.heads, self.last = model, heads, layers - 1
        self.ids = ids.to(model.get_input_embeddings().weight.device)
        self.prefill = ids.shape[1] - answer
        self.rows = counted_rows(ids.shape[1], answer)
        # The decoder's layers, where they can be skipped.
        blocks = getattr(model.base_model, "layers", None)
        self.blocks = list(blocks) if blocks is not None and len(blocks) == layers else []
        self._hidden: dict[int, Any] = {}  # outputs of layers in the dense model
        self._reference: Tensor | None = None

    def layer_harms(
        self,
        layer: int,
        options: Sequence[Sequence[Pattern]],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[list[float]]:
        """Harms of one layer's heads.

        A head's options are tried in their order until one does next to no harm (NO_HARM).

        Args:
            options: by head, the cheapest first.
            advance: called with the number of options that are done.

        Returns:
            By head the harms of its first options; those left out do none.
        """
        seen: dict[str, Any] = {}

        def record(at: int, q: Tensor, k: Tensor, v: Tensor, scale: Any, dense: Any) -> Tensor:
            out = self._dense(at, q, k, v, scale, dense)
            if at == layer:
                p = self.prefill
                seen.update(q=q[:, :, :p], k=k[:, :, :p], v=v[:, :, :p], scale=scale, out=out)
            return out

        logits = self._run(layer, record, keep=layer)
        if self._reference is None:
            self._reference = logits.log_softmax(-1)
        harms: list[list[float]] = [[] for _ in options]
        # What rounding alone does: the same keys, by the operators.
        same = ops.sparse_attention(
            seen["q"], seen["k"], seen["v"], [Dense()] * self.heads, scale=seen["scale"]
        )
        floor = self._harm(layer, self._changed(seen["out"], same, slice(None)))
        for n in range(max(map(len, options))):
            left = [
                head
                for head, own in enumerate(options)
                if n < len(own) and (n == 0 or harms[head][-1] > NO_HARM)
            ]
            if not left:
                break
            # What the others have is not looked at.
            patterns = [own[n] if h in left else _NEXT_TO_NOTHING for h, own in enumerate(options)]
            out = ops.sparse_attention(
                seen["q"], seen["k"], seen["v"], patterns, scale=seen["scale"]
            )
            for head in left:
                harm = self._harm(layer, self._changed(seen["out"], out, head)) - floor
                harm = max(0.0, float(f"{harm:.6g}"))  # the very number of the journal
                harms[head].append(harm)
                advance(len(options[head]) - n if harm <= NO_HARM else 1)
        return harms

    def _changed(self, dense: Tensor, sparse: Tensor, head: int | slice) -> Tensor:
        changed = dense.clone()
        changed[:, head, : self.prefill] = sparse[:, head]
        return changed

    def _harm(self, layer: int, changed: Tensor) -> float:
        def attend(at: int, q: Tensor, k: Tensor, v: Tensor, scale: Any, dense: Any) -> Tensor:
            return changed if at == layer else self._dense(at, q, k, v, scale, dense)

        return self._lost(self._run(layer, attend))

    def _dense(self, at: int, q: Tensor, k: Tensor, v: Tensor, scale: Any, dense: Any) -> Tensor:
        if at < self.last:
            return dense()
        out = torch.zeros_like(q)  # of rows that do not count
        out[:, :, -self.rows :] = ops.sparse_attention(
            q[:, :, -self.rows :], k, v, [Dense()] * self.heads, scale=scale
        )
        return out

    def _lost(self, logits: Tensor) -> float:
        total = 0.0
        assert self._reference is not None
        for own, dense in zip(logits.split(_KL_ROWS), self._reference.split(_KL_ROWS), strict=True):
            divergence = (dense.exp() * (dense - own.log_softmax(-1))).sum(-1)
            total -= float(torch.expm1(-divergence.clamp(min=0)).sum())
        return total / self.rows

    def _run(self, layer: int, attend: Any, keep: int | None = None) -> Tensor:
        """fp32 [rows, vocabulary]: logits, with layers before ``layer`` left out where their output
        is known. ``keep``: keeps this layer's output."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(attention_replaced(self.model, attend))
            if layer - 1 in self._hidden:
                stack.enter_context(_skipped(self.blocks[:layer], self._hidden[layer - 1]))
            if keep is not None and self.blocks:
                hook = self.blocks[keep].register_forward_hook(
                    lambda _module, _args, out: self._hidden.update({keep: out})
                )
                stack.callback(hook.remove)
            logits = self.model(self.ids, use_cache=False, logits_to_keep=self.rows).logits
        if keep is not None:
            self._hidden = {at: out for at, out in self._hidden.items() if at in (keep - 1, keep)}
        return logits[0].float()


@contextmanager
def _skipped(blocks: Sequence[Any], hidden: Any) -> Iterator[None]:
    """Within it these layers compute nothing and give ``hidden``."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = lambda *_args, **_kwargs: hidden
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
