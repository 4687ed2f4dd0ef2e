"""A tokenizer, tasks and a model loader that need no files, for the tests of ``eval``."""

from __future__ import annotations

import random
import sys
import types
from dataclasses import dataclass

from hf_models import fresh

import sparseattn.evaluation

END = 2


class Bytes:
    """A token for every byte, after two that open a text."""

    eos_token_id = END
    chat_template = None
    prefix = (300, 301)

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [3 + byte for byte in text.encode()]
        return types.SimpleNamespace(input_ids=[*self.prefix] * add_special_tokens + ids)

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


class Chatty(Bytes):
    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        (message,) = messages
        return [302, *self(message["content"], add_special_tokens=False).input_ids, 303]


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    depth: float | None


TASKS = {
    name: name
    for name in (
        "niah_single",
        "niah_multikey",
        "niah_multivalue",
        "niah_multiquery",
        "variable_tracking",
        "common_words",
    )
}


def haystack_text() -> str:
    draw = random.Random(0)
    return "".join(draw.choice("abcdefgh .") for _ in range(2000))


def make(task, tokenizer, length, *, seed, index, depth=None):
    assert task in TASKS
    draw = random.Random(f"{task} {seed} {index} {length}")
    ids = [3 + draw.randrange(97, 123) for _ in range(length)]
    answers = ("a",) if index % 2 == 0 else ("a", "\N{SNOWMAN}")
    return Example(
        ids, answers, 3 + index % 2, "exact_all", draw.random() if depth is None else depth
    )


def load(path_or_name="needle", device="cpu", dtype=None):
    if path_or_name != "needle":
        raise ValueError(f"model: expected 'needle', got {path_or_name!r}")
    model = fresh("glm-2kv", device)
    return model.to(dtype), Bytes()


def install(monkeypatch) -> None:
    """Puts them in place of the package's modules of these names."""
    for name, members in {
        "tasks": (TASKS, haystack_text, make),
        "model": (load,),
    }.items():
        module = types.ModuleType(f"sparseattn.evaluation.{name}")
        for member in members:
            setattr(module, getattr(member, "__name__", "TASKS"), member)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sparseattn.evaluation, name, module, raising=False)
