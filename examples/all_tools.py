"""GLM-4's All Tools over one long document: read once, then many short turns on the same cache.

    python examples/all_tools.py MODEL_DIR --document report.txt --files notes/ \\
        --question "Which of my notes contradict section 3?"

MODEL_DIR is a GLM-4 checkpoint that transformers reads without remote code (``glm-4-9b-chat-hf``,
``glm-4-9b-chat-1m-hf``, GLM-4-0414), on this machine: nothing is fetched. Without ``--question`` it
asks for questions until the input ends. The model may call

* ``python``: code in a process of its own with limits of time, memory and output (no sandbox, see
  ``glm4_tools/interpreter.py``), where the document is a file;
* ``search`` and ``open`` over the text files below ``--files``;
* functions of your own, from ``--functions FILE.py``, marked with ``glm4_tools.function``.

The document is prefilled once; questions, the model's turns and the tools' results are appended to
the same cache, ``sparseattn.ShadowKVCache`` where it runs on the model's device.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from glm4_tools import (
    Agent,
    BrowserTool,
    ChatFormat,
    Interpreter,
    LocalSearch,
    PythonTool,
    Session,
    Toolbox,
    sampler,
)
from glm4_tools.agent import MAX_ROUNDS
from glm4_tools.tools import load_functions

import sparseattn

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder with a GLM-4 checkpoint and its tokenizer")
    add("--document", required=True, metavar="FILE", help="the text to read, UTF-8")
    add("--files", metavar="DIR", help="text files to search")
    add("--functions", metavar="FILE.py", help="Python functions marked with glm4_tools.function")
    add("--question", action="append", metavar="TEXT", help="ask this (may be repeated), then end")

    group = parser.add_argument_group("attention and memory")
    group.add_argument("--patterns", metavar="NAME", help="sparse prefill: a preset or a file")
    group.add_argument("--min-length", type=int, metavar="N", help="shortest length that is sparse")
    group.add_argument("--cache", choices=("auto", "shadowkv", "dynamic"), default="auto")
    group.add_argument("--rank", type=int, help="of ShadowKVCache")
    group.add_argument("--sparse-budget", type=int, help="of ShadowKVCache")
    group.add_argument("--prefill-chunk", type=int, metavar="N", help="tokens fed at once")
    group.add_argument("--device", help="default: cuda where there is a GPU")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))

    group = parser.add_argument_group("the loop")
    group.add_argument("--max-rounds", type=int, default=MAX_ROUNDS, metavar="N")
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="a round")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    group.add_argument("--top-p", type=float, default=0.8)
    group.add_argument("--top-k", type=int, default=10)
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("tools")
    group.add_argument("--search-as", choices=("functions", "simple_browser"), default="functions")
    group.add_argument("--no-python", action="store_true", help="without the interpreter")
    group.add_argument("--python-timeout", type=float, default=10.0, metavar="SECONDS")
    group.add_argument("--python-memory-mb", type=int, default=512, metavar="MB")
    group.add_argument("--max-result-chars", type=int, default=8000, metavar="N")
    return parser.parse_args(argv)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, without the network and without code from the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(options.model).is_dir():
        raise FileNotFoundError(f"{options.model}: expected a folder with a GLM-4 checkpoint")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, local_files_only=True, dtype=getattr(torch, dtype)
    )
    return model.to(device).eval(), tokenizer


def make_cache(model: Any, options: argparse.Namespace) -> Any:
    """An empty cache for the model, which is enabled for sparse attention where that is needed."""
    from transformers import DynamicCache

    there = model.device.type in sparseattn.SHADOW_DEVICES
    use_shadow = options.cache == "shadowkv" or (options.cache == "auto" and there)
    if options.patterns or use_shadow:
        sparseattn.hf.enable(model, patterns=options.patterns, min_length=options.min_length)
    if use_shadow:
        sizes = {"rank": options.rank, "sparse_budget": options.sparse_budget}
        print("cache: sparseattn's ShadowKVCache")
        given = {name: size for name, size in sizes.items() if size is not None}
        return sparseattn.ShadowKVCache(model.config, **given)
    why = "as asked for" if there else f"ShadowKVCache does not run on {model.device.type} yet"
    print(f"cache: transformers' DynamicCache, all keys and values on the device ({why})")
    return DynamicCache(config=model.config)


def show(kind: str, text: str) -> None:
    """Print what happens in the loop; the answer stands alone."""
    text = _CONTROL.sub("", text)  # what a document or a model says must not steer the terminal
    mark = {"call": "-> ", "observation": "<- ", "text": "", "answer": ""}[kind]
    if mark:
        lines = text.strip().splitlines() or [""]
        cut = [f"   ... {len(lines) - 12} lines more"] if len(lines) > 12 else []
        text = "\n".join([f"{mark}{lines[0]}", *(f"   {line}" for line in lines[1:12]), *cut])
    print(text, flush=True)


def ask(agent: Agent, search: LocalSearch | None, question: str) -> None:
    session = agent.session
    read, written, started = session.counts.read, session.counts.written, time.perf_counter()
    answer = agent.ask(question)
    seconds = time.perf_counter() - started
    ends = {
        "rounds": f"stopped: {answer.rounds} rounds, and the model still wanted a tool",
        "length": "stopped: --max-new-tokens reached",
        "context": "stopped: the model's context is full",
    }
    for number, place in (search.cited(answer.text) if search else {}).items():
        print(f"  [{number}] {place}")
    if answer.stopped in ends:
        print(f"[{ends[answer.stopped]}]")
    read, written = session.counts.read - read, session.counts.written - written
    print(
        f"[{answer.rounds} rounds in {seconds:.1f} s: {read} tokens appended, {written} written; "
        f"{session.fed} in the cache]"
    )


def questions() -> Any:
    while True:
        try:
            text = input("\n? ").strip()
        except EOFError:
            return
        if text:
            yield text


def run(options: argparse.Namespace) -> None:
    document = Path(options.document)
    try:
        text = document.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{document}: expected UTF-8 text: {error}") from error
    search = LocalSearch(options.files) if options.files else None
    toolbox = Toolbox(max_chars=options.max_result_chars)
    if search:
        print(f"files: {len(search.texts)} indexed, {search.skipped} left out (no text, too large)")
        browser = options.search_as == "simple_browser"
        for tool in [BrowserTool(search)] if browser else search.tools():
            toolbox.add(tool)
    for tool in load_functions(options.functions) if options.functions else ():
        toolbox.add(tool)
    with Interpreter(
        timeout=options.python_timeout,
        memory_mb=options.python_memory_mb,
        files={} if options.no_python else {document.name: document},
    ) as interpreter:
        if not options.no_python:
            toolbox.add(PythonTool(interpreter))
        model, tokenizer = load(options)
        sample = sampler(options.temperature, options.top_p, options.top_k, options.seed)
        session = Session(
            model,
            make_cache(model, options),
            sample=sample,
            prefill_chunk=options.prefill_chunk,
        )
        agent = Agent(
            session,
            ChatFormat(tokenizer),
            toolbox,
            max_rounds=options.max_rounds,
            max_new_tokens=options.max_new_tokens,
            report=show,
        )
        print(f"reading {document.name}", flush=True)
        started = time.perf_counter()
        agent.read(document.name, text)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"read: {session.fed} tokens in {time.perf_counter() - started:.1f} s", flush=True)
        for question in options.question or questions():
            ask(agent, search, question)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(arguments(argv))
    except (OSError, ValueError, TypeError, torch.OutOfMemoryError) as error:
        print(f"all_tools.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
