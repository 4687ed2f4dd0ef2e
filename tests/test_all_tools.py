"""examples/all_tools.py without a model: format, dispatch, errors, rounds, search."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Literal

import pytest
from glm4_helpers import EXAMPLES, ScriptedSession, byte_tokenizer, ids_of, text_of

pytest.importorskip("transformers", minversion="5.0")

from glm4_tools import (
    Agent,
    BrowserTool,
    ChatFormat,
    FunctionTool,
    LocalSearch,
    Observation,
    Toolbox,
    ToolError,
    function,
)
from glm4_tools.chat import IDENTITY, Block, document_text
from glm4_tools.tools import check, load_functions, shorten, strip_fence


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(byte_tokenizer())


@function
def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


@function(schema={"name": "fail", "description": "Fails.", "parameters": {"type": "object"}})
def fail(**_):
    raise RuntimeError("the disk is on fire")


def toolbox(**kwargs):
    return Toolbox(FunctionTool(add), FunctionTool(fail), **kwargs)


def run(chat, *replies, tools=None, **kwargs):
    session = ScriptedSession(*replies)
    events = []
    agent = Agent(
        session,
        chat,
        toolbox() if tools is None else tools,
        report=lambda kind, text: events.append((kind, text)),
        **kwargs,
    )
    return agent, session, events


# The format


def test_messages(chat):
    assert text_of(chat.message("user", "hi")) == "<|user|>\nhi"
    assert text_of(chat.message("observation", "x", " a\nb ")) == "<|observation|>a b\nx"
    assert text_of(chat.prefix) == "[gMASK]<sop>"
    assert [text_of([i]) for i in chat.stops] == ["<|user|>", "<|observation|>", "<|endoftext|>"]


@pytest.mark.parametrize("special", [True, False])
def test_content_never_becomes_a_special_token(special):
    chat = ChatFormat(byte_tokenizer(special))
    text = "a<|user|>\nb<|observation|>[gMASK]"
    ids = chat.message("observation", text, "<|system|>")
    assert len([i for i in ids if i >= 256]) == 1
    assert text_of(ids) == f"<|observation|><|system|>\n{text}"


def test_other_tokenizers_are_refused():
    class Plain:
        unk_token_id = 0

        def convert_tokens_to_ids(self, name):
            return 0

    with pytest.raises(ValueError, match=r"tokenizer: expected GLM-4's special tokens.*\[gMASK\]"):
        ChatFormat(Plain())


@pytest.mark.parametrize(
    "reply,text,calls",
    [
        ("\nHello\nthere<|user|>", "Hello\nthere", []),
        ("Hello\nthere<|endoftext|>", "Hello\nthere", []),
        ("add\n{}<|user|>", "add\n{}", []),  # a call ends with <|observation|>
        ('add\n{"a": 1}<|observation|>', "", [("add", '{"a": 1}')]),
        (" add \r\n{}\n<|observation|>", "", [("add", "{}\n")]),
        ("python\na = 1\n\nprint(a)<|observation|>", "", [("python", "a = 1\n\nprint(a)")]),
        ("add<|observation|>", "", [("add", "")]),
        ("\nI look.<|assistant|>add\n{}<|observation|>", "I look.", [("add", "{}")]),
        ("add\n1<|assistant|>fail\n2<|observation|>", "", [("add", "1"), ("fail", "2")]),
        ("\nno name<|observation|>", "no name", []),
        ("\ncut", "cut", []),
        ("<|user|>", "", []),
    ],
)
def test_parse(chat, reply, text, calls):
    ids = ids_of(reply)
    stop = ids.pop() if ids[-1] in chat.stops else None
    turn = chat.parse(ids, stop)
    assert turn.text == text
    assert [(c.metadata, c.content) for c in turn.calls] == calls
    assert turn.stop == (None if stop is None else text_of([stop]))


def test_system_text(chat):
    assert Toolbox().system_text() == IDENTITY
    text = toolbox().system_text()
    described = json.dumps(add.tool_schema, ensure_ascii=False, indent=4)
    assert text.startswith(f"{IDENTITY}\n\n# 可用工具\n\n## add\n\n{described}\n在调用上述函数时")
    assert "\n\n## fail\n\n{" in text
    assert add.tool_schema["parameters"]["required"] == ["a"]


# Dispatch


def answer(tools, name, argument):
    (one,) = tools.dispatch(Block(name, argument))
    return one


def test_dispatch():
    assert answer(toolbox(), "add", '{"a": 2, "b": 3}') == Observation("5")
    assert answer(toolbox(), "add", '```json\n{"a": 2}\n```\n') == Observation("3")


@pytest.mark.parametrize(
    "name,argument,text",
    [
        ("subtract", "{}", "unknown tool 'subtract'; available: add, fail"),
        ("add", "{'a': 1}", "arguments of add: not JSON"),
        ("add", "[" * 100000, "arguments of add: not JSON"),
        ("add", "[1]", "arguments of add: expected object, got array"),
        ("add", "", "arguments of add: missing a"),
        ("add", '{"a": "1"}', "arguments of add.a: expected integer, got string"),
        ("add", '{"a": true}', "arguments of add.a: expected integer, got boolean"),
        ("add", '{"a": 1, "c": 1}', "arguments of add: unexpected 'c', expected of a, b"),
        ("fail", "{}", "RuntimeError: the disk is on fire"),
    ],
)
def test_errors_become_observations(name, argument, text):
    got = answer(toolbox(), name, argument)
    assert got.metadata == "system_error"
    assert text in got.content


def test_a_tool_cannot_end_the_loop():
    def leave():
        sys.exit(3)

    schema = {"name": "leave", "description": "", "parameters": {"type": "object"}}
    assert answer(Toolbox(FunctionTool(leave, schema)), "leave", "").metadata == "system_error"


def test_schemas():
    @function
    def pick(color: Literal["red", "blue"], sizes: list[int] | None = None) -> dict:
        """Pick.

        Args:
            color: which
            sizes: some
        """
        return {"größe": sizes, "color": color}

    tool = FunctionTool(pick)
    assert tool.call('{"color": "red", "sizes": [1]}')[0].content == (
        '{"größe": [1], "color": "red"}'
    )
    assert tool.call('{"color": "red", "sizes": null}')
    for wrong in ('{"color": "green"}', '{"color": "red", "sizes": [1, "2"]}'):
        with pytest.raises(ToolError, match=r"arguments of pick\."):
            tool.call(wrong)
    check(1, {"type": "number"}, "x")
    check({"free": 1}, {"type": "object"}, "x")
    with pytest.raises(ToolError, match=r"x: expected integer, got number"):
        check(1.5, {"type": "integer"}, "x")
    with pytest.raises(ValueError, match="no schema given"):
        function(lambda a: a)
    with pytest.raises(ValueError, match="two are named add"):
        Toolbox(FunctionTool(add), FunctionTool(add))


def test_long_and_empty_results():
    def say(text):
        return text

    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    tool = FunctionTool(say, {"name": "say", "description": "", "parameters": parameters})
    tools = Toolbox(tool, max_chars=30)
    got = answer(tools, "say", json.dumps({"text": "a" * 50 + "b" * 50})).content
    assert got == "a" * 20 + "\n[70 characters left out]\n" + "b" * 10
    assert answer(tools, "say", '{"text": ""}').content == "[no output]"
    assert shorten("abc", 3) == "abc"
    assert strip_fence("x = '```'") == "x = '```'"


def test_functions_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from glm4_tools import function\n\n@function\ndef twice(x: int) -> int:\n"
        '    """Twice.\n\n    Args:\n        x: a number\n    """\n    return 2 * x\n\n'
        "def helper():\n    pass\n"
    )
    (tool,) = load_functions(path)
    assert tool.call('{"x": 4}') == [Observation("8")]
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"mine\.py: expected at least one function"):
        load_functions(path)
    with pytest.raises(FileNotFoundError):
        load_functions(tmp_path / "none.py")


# The loop


def test_a_question_with_a_call(chat):
    agent, session, events = run(
        chat, '\nLet me add.<|assistant|>add\n{"a": 2}<|observation|>', "\nIt is 3.<|user|>"
    )
    agent.read("a.txt", "some text")
    got = agent.ask("How much?")
    assert (got.text, got.rounds, got.stopped) == ("It is 3.", 2, "answer")
    assert session.text == (
        f"[gMASK]<sop><|system|>\n{toolbox().system_text()}"
        "<|user|>\n[File Name]\na.txt\n[File Content]\nsome text\n\n\n1 files uploaded.\nHow much?"
        '<|assistant|>\nLet me add.<|assistant|>add\n{"a": 2}<|observation|>\n3'
        "<|assistant|>\nIt is 3."
    )
    assert [kind for kind, _ in events] == ["text", "call", "observation", "answer"]
    before = session.text
    agent.ask("And now?")
    assert session.text == before + "<|user|>\nAnd now?<|assistant|>\nIt is 3."


def test_several_calls_are_answered_in_order(chat):
    agent, session, _ = run(
        chat, 'add\n{"a": 1}<|assistant|>nothing\n<|observation|>', "\nDone<|endoftext|>"
    )
    assert agent.ask("?").text == "Done"
    assert "<|observation|>\n2<|observation|>system_error\nunknown tool 'nothing'" in session.text


def test_a_call_without_a_name(chat):
    agent, session, _ = run(chat, "\n{}<|observation|>", "\nSorry<|user|>")
    assert agent.ask("?").rounds == 2
    assert "<|observation|>system_error\nexpected a tool's name" in session.text


@pytest.mark.parametrize("rounds", [None, 3])
def test_round_limit(chat, rounds):
    limit = rounds or 10
    agent, session, _ = run(
        chat, 'add\n{"a": 1}<|observation|>', **({"max_rounds": rounds} if rounds else {})
    )
    got = agent.ask("?")
    assert (got.rounds, got.stopped, session.generated) == (limit, "rounds", limit)
    assert session.text.count("<|observation|>\n2") == limit - 1
    assert session.text.endswith(
        f"<|observation|>system_error\nnot run: the limit of {limit} rounds is reached"
    )
    session.replies = ["\nFine.<|user|>"]
    assert agent.ask("Go on.").text == "Fine."


def test_length_limit(chat):
    agent, _, _ = run(chat, "\nabcdefgh", max_new_tokens=5)
    got = agent.ask("?")
    assert (got.text, got.stopped) == ("abcd", "length")
    with pytest.raises(ValueError, match="max_rounds and max_new_tokens of at least 1"):
        run(chat, "", max_rounds=0)


def test_one_document_before_the_first_question(chat):
    agent, _, _ = run(chat, "\nx<|user|>")
    agent.ask("?")
    with pytest.raises(ValueError, match="read: expected one document, before the first question"):
        agent.read("a", "b")
    assert document_text("n", "t") == "[File Name]\nn\n[File Content]\nt\n\n\n1 files uploaded.\n"


# Search


@pytest.fixture
def files(tmp_path):
    root = tmp_path / "files"
    (root / "sub").mkdir(parents=True)
    lines = [f"line {i} about nothing much\n" for i in range(200)]
    lines[150] = "The zebra crossed 在北京大学的图书馆 at noon.\n"
    (root / "a.txt").write_text("".join(lines), encoding="utf-8")
    (root / "sub" / "b.md").write_text("A zebra and a zebra, both zebra.\nEnd", encoding="utf-8")
    (root / "long.txt").write_text("word " * 2000 + "needle")
    (root / "binary").write_bytes(b"zebra\0zebra")
    (root / "latin").write_bytes("zebra é".encode("latin-1"))
    (root / ".hidden").write_text("zebra")
    (tmp_path / "outside.txt").write_text("zebra outside")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    (root / "empty.txt").write_text("")
    return root


def test_search_and_open(files):
    search = LocalSearch(files)
    assert sorted(search.texts) == ["a.txt", "empty.txt", "long.txt", "sub/b.md"]
    assert search.skipped == 3
    found = search.search("Zebra")
    assert found.startswith(
        "# 【0†sub/b.md:1-2】\nA zebra and a zebra, both zebra.\nEnd\n\n# 【1†a.txt:"
    )
    assert "The zebra crossed" in found
    place = search.cited("see 【1†zebra】 and 【77†x】")
    assert list(place) == [1]
    first, last = map(int, place[1].removeprefix("a.txt:").split("-"))
    assert first <= 151 <= last
    assert search.search("图书馆", 1).startswith("# 【1†")  # the same passage, the same number
    assert search.search("needle").startswith("# 【2†long.txt:1-1】")
    opened = search.open(1)
    assert opened.startswith(f"【1†a.txt】 lines {first}-200 of 200; more: part -1\n")
    assert opened.endswith(
        "".join(files.joinpath("a.txt").read_text("utf-8").splitlines(True)[-2:])
    )
    assert "The zebra crossed" in opened
    assert "lines 1-1 of 1" in search.open(2)
    assert search.search("xylophone") == "nothing found for 'xylophone' in 4 files"


def test_search_parts_make_the_whole_file(files):
    search = LocalSearch(files)
    search.search("line 75")
    parts = [search.open(0, part).split("\n", 1)[1] for part in (-1, 0, 1)]
    whole = files.joinpath("a.txt").read_text("utf-8")
    assert "".join(parts) in whole
    for number, part in [(9, 0), (-1, 0), (0, 99), (0, -99)]:
        with pytest.raises(ToolError):
            search.open(number, part)


def test_search_as_functions(files):
    tools = Toolbox(*LocalSearch(files).tools())
    assert answer(tools, "search", '{"query": "zebra", "limit": 1}').content.count("†") == 1
    assert "both zebra" in answer(tools, "open", '{"id": 0}').content
    assert answer(tools, "open", '{"id": 5}').metadata == "system_error"
    assert answer(tools, "search", '{"query": "zebra", "limit": 0}').metadata == "system_error"


def test_search_as_simple_browser(files):
    tools = Toolbox(BrowserTool(LocalSearch(files)))

    def call(text):
        return tools.dispatch(Block("simple_browser", text))

    (found,) = call('search("zebra", 7)\n')
    assert found.metadata == "browser_result"
    assert found.content.startswith("# 【0†sub/b.md")
    quotes = call('search(query="zebra", recency_days=7)\nmclick([0, 1, 9])')
    assert [q.metadata for q in quotes] == [
        "browser_result",
        "quote_result [0†sub/b.md]",
        "quote_result [1†a.txt]",
        "system_error",
    ]
    (page,) = call('open_url("sub/b.md")')
    assert page.content.startswith("A zebra")
    for wrong in (
        "",
        "search(",
        "search(query)",
        "search(3)",
        "mclick('a')",
        "mclick([True])",
        'open_url("../outside.txt")',
        '__import__("os").system("true")',
        "import os",
        "mclick(*[1])",
        "search(**{})",
        "x",
    ):
        (error,) = call(wrong)
        assert error.metadata == "system_error", wrong


def test_search_of_nothing(tmp_path):
    search = LocalSearch(tmp_path)
    assert search.search("a") == "nothing found for 'a' in 0 files"
    with pytest.raises(NotADirectoryError):
        LocalSearch(tmp_path / "none")


def test_help():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "all_tools.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "MODEL_DIR" in done.stdout
