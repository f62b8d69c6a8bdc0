"""Code on the pages runs as it stands, and imports point one way only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ngalore_jax as ng

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LIBRARY = sorted((ROOT / "ngalore_jax").glob("*.py"))


def blocks_of(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


TEXTS = [ROOT / "README.md", *sorted((ROOT / "notebooks").rglob("*.md"))]
PAGES = [path for path in TEXTS if blocks_of(path)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_on_a_page_runs(path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # of eight devices, which a page asks for itself
    code = f"for block in {blocks_of(path)!r}:\n    exec(block, {{}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    if path.stem in ("README", "index"):
        assert "'history'" in done.stdout


def test_the_reference_has_every_public_name():
    page = (ROOT / "notebooks" / "api.md").read_text("utf-8")
    described = re.findall(r"^\.\. auto\w+:: (\w+)", page, re.MULTILINE)
    assert {name for name in described if name != "ngalore_jax"} == {*ng.__all__}


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
