"""Build backend: scikit-build-core, plus torch and CUTLASS where the target interpreter lacks them.

The operators are built against whatever torch is installed (any 2.10 or newer will do: they use the
stable ABI).
Listing torch under ``build-system.requires`` would instead download a second, newer one
into every isolated build.
"""

import shutil
import subprocess
import sys

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import (
    get_requires_for_build_editable as _requires_for_editable,
)
from scikit_build_core.build import (
    get_requires_for_build_wheel as _requires_for_wheel,
)


def _missing(module: str) -> bool:
    # -I ignores PYTHONPATH, through which pip's isolation hides the interpreter's site-packages.
    code = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    return subprocess.run([sys.executable, "-I", "-c", code, module]).returncode != 0


def _extra() -> list[str]:
    requires = ["torch>=2.10"] if _missing("torch") else []
    if shutil.which("nvcc") and _missing("cutlass_library"):
        requires.append("nvidia-cutlass==4.2.0.0")
    return requires


def get_requires_for_build_wheel(config_settings=None):
    return [*_requires_for_wheel(config_settings), *_extra()]


def get_requires_for_build_editable(config_settings=None):
    return [*_requires_for_editable(config_settings), *_extra()]
