"""The process behind interpreter.py; run as a script with ``python -I``, it imports nothing here.

Code comes over a socket (eight bytes of length, then UTF-8) and runs in one namespace that lives as
long as the process. What it prints goes to file descriptors 1 and 2. One byte goes back when the
process is ready and after each piece of code, when everything printed is in the pipe.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import resource
import socket
import sys
import traceback

NAME = "<python>"


def limit(memory: int, file_size: int) -> None:
    """Hard limits, in bytes: address space, size of a file; no core dumps."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: int) -> None:
    """From now on. The parent's clock comes first; this ends a loop whose parent is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def receive(control: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        piece = control.recv(min(count - len(data), 1 << 16))
        if not piece:
            return None
        data += piece
    return data


def run(code: str, namespace: dict) -> None:
    """Run the code; a last line that is an expression is printed, as in a notebook."""
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    try:
        tree = ast.parse(code, NAME)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        traceback.print_exception(type(error), error, None, file=sys.__stdout__)
        return
    try:
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NAME, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), NAME, "eval"), namespace)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass  # exit() ends the piece, not the process
    except BaseException as error:
        trace = error.__traceback__ and error.__traceback__.tb_next  # without this frame
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.flush()
        traceback.print_exception(type(error), error, trace, file=sys.__stdout__)


def main() -> None:
    descriptor, memory, file_size, cpu = map(int, sys.argv[1:])
    del sys.argv[1:]
    limit(memory, file_size)
    control, process = socket.socket(fileno=descriptor), os.getpid()
    sys.stdout.reconfigure(line_buffering=True)  # in order with stderr, there when it is killed
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    control.sendall(b".")
    while (header := receive(control, 8)) is not None:
        code = receive(control, int.from_bytes(header, "big"))
        if code is None:
            return
        limit_cpu(cpu)
        run(code.decode("utf-8", "replace"), namespace)
        for stream in (sys.stdout, sys.stderr, sys.__stdout__):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.flush()
        if os.getpid() != process:
            os._exit(0)  # a fork that the code left running
        control.sendall(b".")


if __name__ == "__main__":
    main()
