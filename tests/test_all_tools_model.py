"""examples/all_tools.py on small random GLM models: appended turns equal one shot."""

from __future__ import annotations

import copy
import importlib.util
import inspect

import pytest
import torch
from glm4_helpers import EXAMPLES, byte_tokenizer, ids_of, text_of
from glm4_tools import (
    Agent,
    ChatFormat,
    ContextFull,
    FunctionTool,
    Session,
    Toolbox,
    sampler,
)
from hf_models import SHAPES, SPARSE_PATTERNS, cached_model, fresh, spread, transformers

import sparseattn
from sparseattn import hf
from sparseattn.patterns import AShape

SIZE_SCHEMA = {"name": "size", "description": "A size.", "parameters": {"type": "object"}}


@pytest.fixture(params=[name for name in SHAPES if name.startswith("glm")])
def model(request):
    return cached_model(request.param, "sdpa")


def new_cache(model):
    return transformers.DynamicCache(config=model.config)


class Script:
    """A sampler: given ids one after the other, then the largest logit; keeps all logits."""

    def __init__(self, text=""):
        self.ids = ids_of(text)
        self.seen = []
        self.chosen = []

    def __call__(self, logits):
        self.seen.append(logits)
        self.chosen.append(self.ids.pop(0) if self.ids else int(logits.argmax()))
        return self.chosen[-1]


class Calls:
    """The lengths that a model is called with."""

    def __init__(self, model, monkeypatch):
        self.lengths = []
        real = model.forward

        def spy(input_ids, **kwargs):
            self.lengths.append(input_ids.shape[1])
            return real(input_ids, **kwargs)

        spy.__signature__ = inspect.signature(real)
        monkeypatch.setattr(model, "forward", spy)


@torch.no_grad()
def one_shot(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def full_shadow_cache(model):
    """With a rank and a budget that hold everything, compressed from 100 tokens on."""
    cache = sparseattn.ShadowKVCache(model.config, rank=1024, outlier_chunks=3, local_tokens=16)
    for layer in cache.layers:
        layer.dense_limit = 100
    return cache


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("make", [new_cache, full_shadow_cache], ids=["dynamic", "shadow"])
def test_appended_turns_equal_one_shot(model, make, chunk):
    """Document, then three turns of some appended and some generated tokens."""
    if make is full_shadow_cache:
        model = hf.enable(copy.deepcopy(model))
    script, cache = Script(), make(model)
    session = Session(model, cache, sample=script, prefill_chunk=chunk)
    session.append(ids_of("A document. " * 20))
    session.prefill()
    assert cache.get_seq_length() == session.fed == len(session.ids) == 240
    places = []
    for turn in range(3):
        session.append(ids_of(f"<|user|>\nturn {turn}<|assistant|>"))
        start = len(session.ids)
        new, stop = session.generate(set(), 10)
        assert (len(new), stop, session.ids[start:]) == (10, None, new)
        assert session.cache is cache and cache.get_seq_length() == len(session.ids) - 1
        places += range(start - 1, len(session.ids) - 1)
    wanted = one_shot(model, session.ids)[places]
    close(torch.stack(script.seen), wanted)
    assert script.chosen == wanted.argmax(-1).tolist()


def test_greedy_tokens_equal_generate(model):
    """The same tokens as transformers' own generate over the concatenated ids."""
    session = Session(model, new_cache(model))
    session.append(ids_of("text " * 30))
    session.prefill()
    session.append(ids_of("<|observation|>\nresult<|assistant|>"))
    prompt = list(session.ids)
    new, _ = session.generate(set(), 20)
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert prompt + new == wanted[0].tolist()


def test_the_loop_on_one_cache(model, monkeypatch):
    """Scripted replies on a real model: every id is fed once, and the cache holds what one shot
    over the whole conversation gives."""
    calls = Calls(model, monkeypatch)
    script = Script(
        "\nI look.<|assistant|>size\n{}<|observation|>" + "\nTen.<|user|>" + "\nYes.<|endoftext|>"
    )
    session = Session(model, new_cache(model), sample=script)
    tools = Toolbox(FunctionTool(lambda: "10 <|user|> cm", SIZE_SCHEMA))
    agent = Agent(session, ChatFormat(byte_tokenizer()), tools, max_new_tokens=100)
    agent.read("a.txt", "The size is known. " * 20)
    read = session.fed
    assert calls.lengths == [read]
    assert agent.ask("How large?").text == "Ten."
    assert agent.ask("Sure?").text == "Yes."
    assert text_of(session.ids).endswith(
        "How large?<|assistant|>\nI look.<|assistant|>size\n{}<|observation|>\n10 <|user|> cm"
        "<|assistant|>\nTen.<|user|>\nSure?<|assistant|>\nYes."
    )
    assert sum(calls.lengths) == len(session.ids) == session.cache.get_seq_length()
    assert script.ids == []
    assert session.counts.written == len(ids_of("\nI look.<|assistant|>size\n{}\nTen.\nYes."))
    monkeypatch.undo()
    close(script.seen[-1], one_shot(model, session.ids)[-1])


def test_a_scripted_call_with_an_error(model):
    def broken():
        raise OSError("no disk")

    script = Script("size\n{}<|observation|>\nSorry.<|user|>")
    session = Session(model, new_cache(model), sample=script)
    tools = Toolbox(FunctionTool(broken, SIZE_SCHEMA))
    agent = Agent(session, ChatFormat(byte_tokenizer()), tools)
    assert agent.ask("?").text == "Sorry."
    assert "<|observation|>system_error\nOSError: no disk<|assistant|>" in text_of(session.ids)


def test_sparse_prefill_under_the_session():
    """hf.enable works with it: a session with patterns equals one call with patterns."""
    model = fresh("glm-2kv")
    hf.enable(model, spread(SPARSE_PATTERNS, model), min_length=64)
    script = Script()
    session = Session(model, new_cache(model), sample=script)
    session.append(ids_of("A document. " * 40))
    with torch.no_grad():
        wanted = model(torch.tensor([session.ids])).logits[0, -1]
        session.generate(set(), 3)
    torch.testing.assert_close(script.seen[0], wanted)


@pytest.mark.cuda
def test_the_loop_on_a_gpu():
    """bf16, with patterns: no more than rounding apart, where a lost turn would be all apart."""
    model = fresh("glm-4kv", "cuda")
    hf.enable(model, spread([AShape(2**12, 1)], model), min_length=64)
    script = Script("size\n{}<|observation|>" + "\nTen.<|user|>")
    session = Session(model, new_cache(model), sample=script)
    tools = Toolbox(FunctionTool(lambda: "10 cm", SIZE_SCHEMA))
    agent = Agent(session, ChatFormat(byte_tokenizer()), tools)
    agent.read("a.txt", "The size is known. " * 20)
    assert agent.ask("How large?").text == "Ten."
    with torch.no_grad():
        wanted = model(torch.tensor([session.ids], device="cuda")).logits[0, -1].float()
    error = (script.seen[-1] - wanted).square().mean().sqrt()
    assert float(error) < 0.1 * float(wanted.square().mean().sqrt())


def test_context_limit(model):
    def letter(logits):
        return 40

    session = Session(model, new_cache(model), limit=50, sample=letter)
    with pytest.raises(ContextFull, match="context is 50 tokens, 51 are needed"):
        session.append([1] * 51)
    assert session.ids == []
    session.append([1] * 45)
    assert len(session.generate(set(), 20)[0]) == 5
    assert session.generate(set(), 20) == ([], None)

    session = Session(model, new_cache(model), limit=600, sample=Script("size\n{}<|observation|>"))
    tools = Toolbox(FunctionTool(lambda: "x" * 500, SIZE_SCHEMA))
    agent = Agent(session, ChatFormat(byte_tokenizer()), tools)
    assert agent.ask("?").stopped == "context"
    session = Session(model, new_cache(model), limit=700, sample=letter)
    agent = Agent(session, ChatFormat(byte_tokenizer()), Toolbox())
    assert agent.ask("?").stopped == "context"
    assert Session(model, new_cache(model))._limit == model.config.max_position_embeddings


def test_the_cache_belongs_to_the_session(model):
    session = Session(model, new_cache(model))
    with pytest.raises(ValueError, match="expected something appended"):
        session.generate(set(), 1)
    session.append([1, 2, 3])
    session.prefill()
    with pytest.raises(ValueError, match="expected something appended"):
        session.generate(set(), 1)
    with pytest.raises(ValueError, match="cache: expected an empty one, got 3 tokens"):
        Session(model, session.cache)
    session.cache = new_cache(model)
    session.append([4])
    with pytest.raises(ValueError, match="cache: expected 3 tokens, it holds 0"):
        session.prefill()


def test_samplers():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert sampler()(logits) == 1
    assert {sampler(1.0, top_k=1)(logits), sampler(1.0, top_p=0.1)(logits)} == {1}
    draw = sampler(2.0, top_k=2)
    assert {draw(logits) for _ in range(100)} == {1, 2}
    one, two = sampler(1.0, seed=3), sampler(1.0, seed=3)
    assert [one(logits) for _ in range(20)] == [two(logits) for _ in range(20)]
    with pytest.raises(ValueError, match="sampler: expected temperature >= 0"):
        sampler(-1.0)


# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm4")
    cached_model("glm-2kv", "sdpa").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("all_tools", EXAMPLES / "all_tools.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(checkpoint, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a zebra")
    document = tmp_path / "document.txt"
    document.write_text("A long document. " * 10)
    return [
        *(str(checkpoint), "--document", str(document), "--device", "cpu", "--dtype", "float32"),
        *("--max-new-tokens", "4", "--python-timeout", "60", "--cache", "dynamic"),
    ]


def test_command(program, command, tmp_path, capsys):
    notes = str(tmp_path / "notes")
    options = ["--files", notes, "--no-python", "--question", "a", "--question", "b"]
    assert program.main([*command, *options]) == 0
    out = capsys.readouterr().out
    assert "files: 1 indexed, 0 left out" in out
    assert "cache: transformers' DynamicCache" in out
    assert out.count("rounds in ") == 2
    assert "--max-new-tokens reached" in out


def test_command_asks_for_questions(program, command, capsys, monkeypatch):
    lines = iter(["", "one", "two"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert program.main([*command, "--search-as", "simple_browser", "--temperature", "1"]) == 0
    assert capsys.readouterr().out.count("rounds in ") == 2


def test_command_with_patterns(program, command, tmp_path, capsys):
    from sparseattn import PatternConfig

    PatternConfig.uniform(AShape(4, 64), 2, 8).save(tmp_path / "patterns.json")
    options = ["--patterns", str(tmp_path / "patterns.json"), "--min-length", "64"]
    assert program.main([*command, *options, "--question", "a"]) == 0
    assert "1 rounds" in capsys.readouterr().out


def test_command_says_what_is_wrong(program, command, tmp_path, capsys):
    assert program.main([str(tmp_path / "none"), *command[1:]]) == 1
    assert "expected a folder with a GLM-4 checkpoint" in capsys.readouterr().err
    assert program.main([*command, "--document", str(tmp_path / "no.txt")]) == 1
    assert "no.txt" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert program.main([*command, "--document", str(tmp_path / "latin.txt")]) == 1
    assert "latin.txt: expected UTF-8 text" in capsys.readouterr().err
    (tmp_path / "big.txt").write_text("x" * 5000)
    assert program.main([*command, "--document", str(tmp_path / "big.txt"), "--question", "a"]) == 1
    assert "the model's context is 4096 tokens" in capsys.readouterr().err


def test_control_characters_are_not_printed(program, capsys):
    program.show("answer", "a\x1b[2Jb\tc\nd\x9b")
    program.show("call", "python\n" + "x\n" * 20)
    out = capsys.readouterr().out
    assert out.startswith("a[2Jb\tc\nd\n-> python\n   x\n")
    assert out.endswith("   ... 9 lines more\n")


def test_which_cache(program, monkeypatch, capsys):
    model, parse = fresh("glm-2kv"), ["m", "--document", "d", "--rank", "64"]
    cache = program.make_cache(model, program.arguments(parse))
    assert isinstance(cache, sparseattn.ShadowKVCache) and cache.options.rank == 64
    assert model.config._attn_implementation == "sparseattn"
    cache = program.make_cache(model, program.arguments([*parse, "--cache", "dynamic"]))
    assert isinstance(cache, transformers.DynamicCache)
    monkeypatch.setattr("sparseattn.SHADOW_DEVICES", ())
    assert isinstance(
        program.make_cache(model, program.arguments(parse)), transformers.DynamicCache
    )
    assert "ShadowKVCache does not run on cpu yet" in capsys.readouterr().out
