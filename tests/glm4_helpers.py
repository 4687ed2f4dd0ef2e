"""The example's modules on the path, a byte tokenizer with GLM-4's tokens, scripted replies."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]


@functools.cache
def byte_tokenizer(special: bool = True):
    """One token per byte (ids 0 .. 255), then GLM-4's special tokens; not marked so, if asked."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if not special:
        core.add_tokens(SPECIAL)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )


def ids_of(text: str) -> list[int]:
    """Ids of text in which the names of special tokens mean the tokens."""
    return byte_tokenizer().encode(text, add_special_tokens=False)


def text_of(ids) -> str:
    return byte_tokenizer().decode(ids)


class ScriptedSession:
    """In place of a Session: every generate gives the next reply, the last one again and again.

    A reply is text that ends with its stop token, or does not if it is cut by its length."""

    def __init__(self, *replies: str) -> None:
        self.ids: list[int] = []
        self.replies = list(replies)
        self.generated = 0

    def append(self, ids) -> None:
        self.ids.extend(ids)

    def prefill(self) -> None:
        pass

    def generate(self, stops, max_new_tokens):
        reply = ids_of(self.replies[min(self.generated, len(self.replies) - 1)])
        self.generated += 1
        stop = reply.pop() if reply and reply[-1] in stops else None
        new = reply[:max_new_tokens]
        self.ids.extend(new)
        return new, stop

    @property
    def text(self) -> str:
        return text_of(self.ids)
