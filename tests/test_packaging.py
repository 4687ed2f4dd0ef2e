"""What is installed: one version, the data files, a light import, and a README that is true."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch

import sparseattn
from sparseattn import _C, PatternConfig, cli

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name}: not a checkout of the repository")
    return path.read_text(encoding="utf-8")


def test_one_version() -> None:
    version = sparseattn.__version__
    assert _C.build_info()["version"] == version
    assert metadata.version("sparseattn") == version
    (project,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), re.M)
    (cmake,) = re.findall(r"^project\(sparseattn VERSION (\S+)", read("CMakeLists.txt"), re.M)
    assert project == cmake == version
    assert re.search(rf"^## \[?{re.escape(version)}\b", read("CHANGELOG.md"), re.M)


def test_presets_and_notice_are_installed() -> None:
    folder = resources.files("sparseattn") / "presets"
    assert "MIT License" in (folder / "NOTICE").read_text(encoding="utf-8")
    names = PatternConfig.presets()
    assert len(names) >= 14
    for name in names:
        config = PatternConfig.load(name)
        assert config.model == name
    licences = metadata.metadata("sparseattn").get_all("License-File")
    assert "LICENSE" in licences and any(name.endswith("NOTICE") for name in licences)


def test_the_model_is_installed() -> None:
    folder = resources.files("sparseattn") / "models" / "needle"
    names = {
        "MODEL_CARD.md",
        "config.json",
        "loss.json",
        "loss.png",
        "model.safetensors",
        "scores.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    found = {path.name: path for path in folder.iterdir()}
    assert set(found) == names
    assert sum(len(path.read_bytes()) for path in found.values()) <= 12e6
    card = found["MODEL_CARD.md"].read_text(encoding="utf-8")
    assert "](loss.png)" in card and f"{_parameters(found) / 1e6:.1f} million parameters" in card
    assert json.loads(found["loss.json"].read_text())["parameters"] == _parameters(found)


def _parameters(found: dict) -> int:
    """From the header of model.safetensors: 8 bytes of length, then JSON."""
    data = found["model.safetensors"].read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    return sum(math.prod(tensor["shape"]) for tensor in header.values())


def test_console_script() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="sparseattn")
    assert script.load() is cli.main


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    heavy = ("transformers", "matplotlib", "tqdm", "hypothesis")
    out = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import sparseattn\n"
        "print(torch.cuda.is_initialized())\n"
        f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    )
    assert out.split("\n")[:2] == ["False", "[]"]


def test_operators_are_registered_on_import() -> None:
    names = [n for n in sparseattn.__all__ if n.endswith("_attention") or n.startswith("estimate_")]
    assert len(names) == 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparseattn::{name}", "CPU")
        on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"sparseattn::{name}", "CUDA")
        assert on_cuda == bool(_C.build_info()["cuda"] and torch.version.cuda)


@pytest.mark.parametrize("name", sparseattn.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(sparseattn, name)
    if name == "Pattern":  # a union of the patterns, not a class
        assert value.__args__ == (
            sparseattn.Dense,
            sparseattn.AShape,
            sparseattn.VerticalSlash,
            sparseattn.BlockSparse,
        )
        return
    text = inspect.getdoc(value)
    assert text and len(text) >= 20
    assert not text.startswith(f"{name}("), "the text that dataclass makes up"


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", read("README.md"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if " && python -m " in line]


def test_readme_commands() -> None:
    demo, tests = readme_commands()
    assert demo == "pip install '.[demo]' && python -m sparseattn demo"
    assert tests == "pip install '.[test]' && python -m pytest"
    extras = metadata.metadata("sparseattn").get_all("Provides-Extra")
    assert {"demo", "test"} <= set(extras)
    assert "demo" in cli.COMMANDS


def test_ci_runs_the_readme_test_command() -> None:
    (pattern,) = re.findall(r'grep -m1 -E "(.+?)" README\.md', read(".ci/run"))
    found = [line for line in read("README.md").splitlines() if re.search(pattern, line)]
    assert found == [readme_commands()[1]]


def test_readme_python_names_what_exists() -> None:
    """Every sparseattn.* call in the README is of a public function, with arguments it takes."""
    blocks = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.M | re.S)
    called = set()
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("sparseattn."):
            continue
        name = ast.unparse(node.func).removeprefix("sparseattn.")
        function = sparseattn
        for part in name.split("."):
            function = getattr(function, part)
        keywords = {keyword.arg: None for keyword in node.keywords}
        inspect.signature(function).bind(*node.args, **keywords)
        called.add(name)
    assert {"sparse_attention", "hf.enable"} <= called
