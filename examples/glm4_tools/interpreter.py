"""GLM-4's ``python`` tool: code runs in a process of its own, with limits.

The process gets nothing of this one: its own session, an environment of a few fixed variables, no
open files but its pipes, an empty folder to work in (and the files that it is given). Variables
live from call to call, as GLM-4 expects; after a timeout or a crash they are lost, and the model is
told so.

**This is no sandbox.** The limits stop accidents: endless loops, huge lists, floods of output. The
code still runs as the user, can read the user's files, use the network, and start processes that
the limits count one by one. Against hostile code use a container or a virtual machine.
"""

# ruff: noqa: RUF001 (GLM-4 was trained on full-width punctuation)

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glm4_tools.tools import ERROR, Observation, strip_fence

_WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 60.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Result:
    """What was printed (stdout and stderr in order), and what ended the process, if it ended."""

    output: str
    failure: str | None = None


class Interpreter:
    """A Python process that is started by the first ``run`` and again after it ended.

    Args:
        timeout: seconds of wall time for each run.
        memory_mb: address space of the process (RLIMIT_AS).
        max_output: bytes of output kept from each run; the rest is read and dropped.
        max_file_mb: largest file that it can write (RLIMIT_FSIZE).
        files: name -> file, copied into its folder.
    """

    def __init__(
        self,
        *,
        timeout: float = 10.0,
        memory_mb: int = 512,
        max_output: int = 20000,
        max_file_mb: int = 64,
        files: Mapping[str, str | Path] | None = None,
    ) -> None:
        if timeout <= 0 or memory_mb < 64 or max_output < 1 or max_file_mb < 1:
            raise ValueError(
                "expected timeout > 0, memory_mb >= 64, max_output and max_file_mb >= 1, "
                f"got {timeout}, {memory_mb}, {max_output} and {max_file_mb}"
            )
        self.timeout, self.memory_mb, self.max_output = timeout, memory_mb, max_output
        self._max_file_mb = max_file_mb
        self.folder = tempfile.TemporaryDirectory(prefix="glm4_python_")
        self.files = sorted(files or ())
        for name, path in (files or {}).items():
            shutil.copyfile(path, Path(self.folder.name, Path(name).name))
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove its folder."""
        self._end()
        self.folder.cleanup()

    def run(self, code: str) -> Result:
        """Run code in the process; never raises for what the code does."""
        if self._process is None:
            failure = self._start()
            if failure:
                return Result("", failure)
        data = code.encode("utf-8", "replace")
        try:
            self._control.settimeout(self.timeout)
            self._control.sendall(len(data).to_bytes(8, "big") + data)
        except OSError:  # it ended between two runs
            return Result("", self._end())
        return self._collect(self.timeout)

    def _start(self) -> str | None:
        ours, theirs = socket.socketpair()
        folder = self.folder.name
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        environment |= dict.fromkeys(_THREADS, "1") | {"MPLBACKEND": "Agg"}
        megabytes = (self.memory_mb, self._max_file_mb)
        limits = [*(str(n * 2**20) for n in megabytes), str(int(4 * self.timeout) + 2)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", _WORKER, str(theirs.fileno()), *limits],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
        self._control = ours
        os.set_blocking(self._process.stdout.fileno(), False)
        started = self._collect(_START_SECONDS)
        if started.failure:
            return f"{started.failure} at its start: {started.output[-500:]}"
        return None

    def _collect(self, seconds: float) -> Result:
        """Read output until the byte that ends a run, the end of the process or the deadline."""
        kept, dropped, failure = bytearray(), 0, None
        deadline = time.monotonic() + seconds
        output = self._process.stdout

        def drain(at_most: int) -> bool:
            """Read what is there; False at the end of the pipe."""
            nonlocal dropped
            while at_most > 0:
                try:
                    piece = os.read(output.fileno(), min(at_most, 1 << 16))
                except BlockingIOError:
                    return True
                if not piece:
                    return False
                at_most -= len(piece)
                room = self.max_output - len(kept)
                kept.extend(piece[:room])
                dropped += len(piece[room:])
            return True

        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                ready = {key.fileobj for key, _ in selector.select(max(left, 0))}
                if output in ready and not drain(1 << 16):
                    selector.unregister(output)
                if self._control in ready:
                    with contextlib.suppress(OSError):
                        if self._control.recv(1):
                            break
                    drain(1 << 20)
                    failure = self._end()
                    break
                if left <= 0:
                    self._end()
                    failure = f"stopped after {seconds:g} seconds"
                    break
        if failure is None:
            drain(1 << 20)  # a pipe holds less, unless something goes on writing
        text = kept.decode("utf-8", "replace")
        if dropped:
            text += f"\n[{dropped} bytes of output left out]"
        return Result(text, failure)

    def _end(self) -> str:
        """Kill the process and its session's others; says how it ended."""
        process, control = self._process, self._control
        self._process = self._control = None
        if process is None:
            return "the interpreter was not running"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # if it ended by itself, learn how
        code = process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        control.close()
        if code is None:
            return "the interpreter was stopped"
        if code < 0:
            return f"the interpreter was ended by {signal.Signals(-code).name}"
        return f"the interpreter ended with exit code {code}"


class PythonTool:
    """The interpreter as GLM-4's built-in tool of that name: the argument is code, not JSON."""

    name = "python"

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter

    def body(self) -> str:
        """GLM-4's own text, with this interpreter's time limit and folder in place of its own."""
        text = (
            "当你向 `python` 发送包含 Python 代码的消息时，"
            "该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
            f"`python` 返回代码执行的输出，或在执行 {self.interpreter.timeout:g} 秒后返回超时。\n"
            "当前目录将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
            "不要使用 `python` 进行任何网络请求或者在线 API 调用，"
            "这些在线内容的访问将不会成功。"
        )
        if self.interpreter.files:
            names = "、".join(f"`{name}`" for name in self.interpreter.files)
            text += f"\n当前目录中有用户的文件：{names}。"
        return text

    def call(self, argument: str) -> list[Observation]:
        result = self.interpreter.run(strip_fence(argument))
        if result.failure is None:
            return [Observation(result.output)]
        lost = f"{result.failure}; variables are lost, files are kept"
        return [Observation(f"{result.output}\n{lost}".lstrip("\n"), ERROR)]
