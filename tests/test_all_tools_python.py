"""The Python tool of examples/all_tools.py: its process, its limits, what it is given."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from glm4_helpers import EXAMPLES  # noqa: F401 (the path)
from glm4_tools.chat import Block
from glm4_tools.interpreter import Interpreter, PythonTool
from glm4_tools.tools import Toolbox


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """With limits that nothing here reaches by being slow."""
    document = tmp_path_factory.mktemp("given") / "document.txt"
    document.write_text("zebra\n")
    with Interpreter(
        timeout=60, memory_mb=256, max_output=1000, max_file_mb=1, files={"document.txt": document}
    ) as interpreter:
        yield interpreter


def test_output_and_state(python):
    got = python.run("import sys\nx = 20\nprint('a')\nprint('b', file=sys.stderr)\nx + 1")
    assert (got.output, got.failure) == ("a\nb\n21\n", None)
    assert python.run("x").output == "20\n"
    assert python.run("None").output == python.run("").output == ""
    assert python.run("exit()").failure is None
    assert python.run("print('größe')").output == "größe\n"
    assert python.run("x").output == "20\n"


@pytest.mark.parametrize(
    "code,said",
    [
        ("def f():\n    return 1 / 0\nf()", 'File "<python>", line 2, in f'),
        ("1 +", "SyntaxError"),
        ("return 3", "SyntaxError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("print(chr(0xd800))", "UnicodeEncodeError"),
        ("open('big', 'wb').write(bytes(2 << 20))", "OSError"),
        ("input()", "Error"),
    ],
)
def test_exceptions_are_output(python, code, said):
    got = python.run(code)
    assert got.failure is None
    assert said in got.output
    assert "worker.py" not in got.output


def test_memory_limit(python):
    got = python.run("y = 1\nbig = bytearray(1 << 30)")
    assert "MemoryError" in got.output
    assert python.run("y").output == "1\n"


def test_output_limit(python):
    got = python.run("print('y' * 1000000)")
    assert got.output == "y" * 1000 + "\n[999001 bytes of output left out]"
    assert got.failure is None


def test_nothing_is_inherited(python, monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    with open(__file__) as held, Interpreter(timeout=60) as fresh:
        os.set_inheritable(held.fileno(), True)
        code = "import os, sys\nprint('A_SECRET' in os.environ, 'glm4_tools' in sys.modules)"
        assert fresh.run(code).output == "False False\n"
        code = "for n in range(3, 100):\n    try: print(os.readlink(f'/proc/self/fd/{n}'))\n"
        code += "    except OSError: pass"
        (control,) = fresh.run(code).output.split()
        assert control.startswith("socket:")
        assert Path(fresh.run("print(os.getcwd())").output.strip()).name.startswith("glm4_python_")


def test_files_are_copies(python):
    assert python.run("print(open('document.txt').read())").output == "zebra\n\n"
    python.run("open('document.txt', 'w').write('changed')")
    tool = PythonTool(python)
    assert "`document.txt`" in tool.body()
    assert "60 秒" in tool.body()


@pytest.mark.parametrize(
    "code,failure",
    [
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import os, sys; print('last', flush=True); os.close(1); os._exit(0)", "exit code 0"),
    ],
)
def test_the_end_of_the_process(python, code, failure):
    python.run("z = 1")
    got = python.run(code)
    assert failure in got.failure
    assert ("last" in got.output) == ("last" in code)
    assert "NameError" in python.run("z").output


def test_time_limit():
    with Interpreter(timeout=1) as python:
        started = time.monotonic()
        got = python.run("print('begun', flush=True)\nwhile True: pass")
        assert got.output == "begun\n"
        assert got.failure == "stopped after 1 seconds"
        assert 0.9 < time.monotonic() - started < 20
        assert python.run("6 * 7").failure is None  # a new process
        tools = Toolbox(PythonTool(python))
        (answer,) = tools.dispatch(Block("python", "```python\nimport time\ntime.sleep(60)\n```"))
        assert answer.metadata == "system_error"
        assert answer.content == "stopped after 1 seconds; variables are lost, files are kept"
        (answer,) = tools.dispatch(Block("python", "6 * 7"))
        assert (answer.content, answer.metadata) == ("42\n", "")
        (answer,) = tools.dispatch(Block("python", "x = 1"))
        assert answer.content == "[no output]"


def test_what_it_started_ends_with_it():
    with Interpreter(timeout=60) as python:
        code = "import subprocess\nprint(subprocess.Popen(['sleep', '600']).pid)"
        child = int(python.run(code).output)
        assert python.run("import os\nif os.fork():\n    os.wait()").failure is None
        assert python.run("1").output == "1\n"
        os.kill(child, 0)
        folder = python.folder.name
    assert not os.path.exists(folder)
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("a process that the code started is still running")


def test_limits_are_checked():
    with pytest.raises(ValueError, match="expected timeout > 0, memory_mb >= 64"):
        Interpreter(timeout=0)
