"""A conversation's token ids and the one cache that holds them.

Whatever is appended is fed once: the cache object lives as long as the session, and a call of the
model gets only the ids that are not in it yet. The token that ends a turn is never kept, because
the next message opens with a role token of its own (after a tool call it is the same one).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn.hf_arguments import with_cache


class ContextFull(ValueError):
    """The conversation would be longer than the model's context."""


@dataclass
class Counts:
    """Tokens since the session began: fed to the model in appended turns, and generated."""

    read: int = 0
    written: int = 0


class Session:
    """Append ids, generate, append, generate, on one transformers Cache.

    Args:
        model: a transformers causal language model.
        cache: an empty transformers ``Cache``, which belongs to the session from now on.
        sample: logits, fp32 ``[vocab_size]``, to the next token's id; None: the largest.
        limit: the longest conversation in tokens; None: the model's ``max_position_embeddings``.
        prefill_chunk: feed at most so many ids in one call of the model; None: all at once.

    Raises ValueError if the cache is not empty.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        *,
        sample: Callable[[Tensor], int] | None = None,
        limit: int | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        if int(cache.get_seq_length()) != 0:
            raise ValueError(f"cache: expected an empty one, got {cache.get_seq_length()} tokens")
        self.model, self.cache = model, cache
        self.ids: list[int] = []
        self.fed = 0  # ids[:fed] are in the cache
        self.counts = Counts()
        self._sample = sample or sampler()
        self._limit = limit or getattr(model.config, "max_position_embeddings", None)
        self._chunk = prefill_chunk

    def append(self, ids: Sequence[int]) -> None:
        """Add ids to the conversation; they are fed by the next prefill or generate.

        Raises ContextFull, and adds nothing, if they do not fit.
        """
        total = len(self.ids) + len(ids)
        if self._limit is not None and total > self._limit:
            raise ContextFull(f"the model's context is {self._limit} tokens, {total} are needed")
        self.ids.extend(ids)

    def prefill(self) -> None:
        """Feed what was appended."""
        if self.fed < len(self.ids):
            self._feed()

    @torch.no_grad()
    def generate(self, stops: Collection[int], max_new_tokens: int) -> tuple[list[int], int | None]:
        """(new ids, the stop token that ended them or None if the length did).

        The new ids are part of the conversation from now on, the stop token is not. Something must
        have been appended, or else there is nothing to start from (ValueError).
        """
        if self.fed == len(self.ids):
            raise ValueError("generate: expected something appended since the last call")
        new: list[int] = []
        while len(new) < max_new_tokens and not self._full():
            token = self._sample(self._feed())
            if token in stops:
                return new, token
            new.append(token)
            self.ids.append(token)
            self.counts.written += 1
        return new, None

    def _full(self) -> bool:
        return self._limit is not None and len(self.ids) >= self._limit

    @torch.no_grad()
    def _feed(self) -> Tensor:
        """Feed ids[fed:]; logits of the last one, fp32 [vocab_size]."""
        held = int(self.cache.get_seq_length())
        if held != self.fed:
            raise ValueError(f"cache: expected {self.fed} tokens, it holds {held}")
        pending = torch.tensor([self.ids[self.fed :]], device=self.model.device)
        if pending.shape[1] > 1:
            self.counts.read += pending.shape[1]
        for part in pending.split(self._chunk or pending.shape[1], dim=1):
            given = with_cache(self.model, self.cache)
            logits = self.model(part, use_cache=True, logits_to_keep=1, **given).logits
            self.fed += part.shape[1]
        return logits[0, -1].float()


def sampler(
    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0
) -> Callable[[Tensor], int]:
    """A function from logits ``[vocab_size]`` to a token's id; temperature 0: the largest."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "sampler: expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
            f"got {temperature}, {top_p} and {top_k}"
        )
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generators: dict[torch.device, torch.Generator] = {}

    def sample(logits: Tensor) -> int:
        if logits.device not in generators:
            generators[logits.device] = torch.Generator(logits.device).manual_seed(seed)
        values, order = (logits / temperature).sort(descending=True)
        if top_k:
            values, order = values[:top_k], order[:top_k]
        weights = values.softmax(0)
        before = weights.cumsum(0) - weights  # the first is always kept
        weights = weights.masked_fill(before >= top_p, 0)
        return int(order[weights.multinomial(1, generator=generators[logits.device])])

    return sample
