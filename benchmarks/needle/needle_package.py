"""``sparseattn.evaluation``, also where the extension is not built: it needs nothing compiled."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

try:
    import sparseattn  # noqa: F401
except ImportError as error:
    folder = Path(__file__).resolve().parents[2] / "python" / "sparseattn"
    print(f"sparseattn is not installed ({error}): its Python files are taken from the checkout")
    package = types.ModuleType("sparseattn")
    package.__path__ = [str(folder)]
    for name in [name for name in sys.modules if name.startswith("sparseattn.")]:
        del sys.modules[name]
    sys.modules["sparseattn"] = package

tasks = importlib.import_module("sparseattn.evaluation.tasks")
words = importlib.import_module("sparseattn.evaluation.words")
search_model = importlib.import_module("sparseattn.search_model")
