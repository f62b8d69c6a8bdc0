"""The README's code runs as it stands, and imports point one way only."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LIBRARY = sorted((ROOT / "ngalore_jax").glob("*.py"))


def test_readme_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "'history'" in capsys.readouterr().out


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ngalore_jax":
            names |= {f"ngalore_jax.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_the_library_imports_jax_optax_and_downwards(path):
    order = re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE)
    assert {*order, "__init__"} == {library.stem for library in LIBRARY}
    for name in imported(path):
        top, _, module = name.partition(".")
        assert top in {"jax", "optax", "ngalore_jax", *sys.stdlib_module_names}
        if top == "ngalore_jax" and path.stem != "__init__":
            assert order.index(module) > order.index(path.stem), name
