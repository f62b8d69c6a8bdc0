"""The English documentation that comes with a Python installation, as text.

Docstrings are read from source files with ``ast``; no module is imported, so
reading has no side effect and does not depend on which backends can load.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("numpy", "scipy", "jax", "flax", "optax", "orbax", "grain")
"""Installed packages whose docstrings are read after the standard library's."""

_EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_vendor",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "testing",
        "tests",
    }
)
_DOCTEST = re.compile(r"^[ \t]*>>> .*(?:\n[ \t]*\S.*)*\n?", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n\s*\n+")
_MIN_DOCSTRING = 60
_MIN_DOCUMENT = 400
_TARGET_DOCUMENT = 4000


@dataclass(frozen=True)
class Documentation:
    """Documents found, and what was left out on the way.

    Attributes:
      documents: Texts of about 4,000 characters, in a deterministic order.
      duplicates: Number of docstrings dropped because their text had been seen.
      skipped: Number of source files that could not be parsed, by reason.
      source: Packages read and their versions, for people.
    """

    documents: tuple[str, ...]
    duplicates: int
    skipped: Counter[str]
    source: str


def read_documentation() -> Documentation:
    """Read the documentation of the standard library and of ``PACKAGES``.

    A document is a run of neighbouring docstrings of one module (a class keeps
    its methods with it), about 4,000 characters long, so that a context of some
    hundred tokens sees connected text. A docstring that repeats an earlier one
    word for word is dropped. Packages that are not installed are left out;
    ``source`` lists those that were read.

    Returns:
      The documentation. Empty if the installation has no source files (a zipped
      or a frozen standard library).
    """
    documents: list[str] = []
    seen: set[str] = set()
    duplicates = 0
    skipped: Counter[str] = Counter()
    sources = []
    for name, root in _roots():
        sources.append(name)
        for path in _source_files(root):
            try:
                sections = _sections(path)
            except (SyntaxError, ValueError):
                skipped["source file that does not parse"] += 1
                continue
            fresh = []
            for title, text in sections:
                if text in seen:
                    duplicates += 1
                else:
                    seen.add(text)
                    fresh.append(f"{title}\n\n{text}")
            documents.extend(_join(fresh))
    return Documentation(
        tuple(documents), duplicates, skipped, "documentation of " + ", ".join(sources)
    )


def _roots() -> Iterator[tuple[str, Path]]:
    """Yield (name and version, folder) of everything that is read."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    yield f"Python {sysconfig.get_python_version()}", standard_library
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for folder in spec.submodule_search_locations:
            yield f"{package} {_version(package)}".strip(), Path(folder)


def _version(package: str) -> str:
    """Return the version of an import name, "" if no distribution claims it."""
    try:
        # Orbax is a namespace package: its import name is no distribution's name.
        distribution = {"orbax": "orbax-checkpoint"}.get(package, package)
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _source_files(root: Path) -> Iterator[Path]:
    """Yield the Python files below ``root``, tests and vendored code left out."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        folders = path.relative_to(root).parts[:-1]
        is_test = path.stem.startswith("test_") or path.stem.endswith("_test")
        if not is_test and _EXCLUDED_FOLDERS.isdisjoint(folders):
            yield path


def _sections(path: Path) -> list[tuple[str, str]]:
    """Return (title, text) of the docstrings of one source file, in its order."""
    source = path.read_bytes()
    with warnings.catch_warnings():
        # Old sources hold invalid escapes; they are none of the reader's business.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    if path.parent.name == "pydoc_data" and path.stem == "topics":
        raw = _topics(tree)
    else:
        raw = _docstrings(
            tree, path.stem if path.stem != "__init__" else path.parent.name
        )
    cleaned = ((title, clean_docstring(text)) for title, text in raw)
    return [(title, text) for title, text in cleaned if len(text) >= _MIN_DOCSTRING]


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the language reference that ``help()`` prints, topic by topic."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).items()


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    title: str,
) -> Iterator[tuple[str, str]]:
    """Yield (title, docstring) of a definition and, save of functions, its members."""
    text = ast.get_docstring(node, clean=False)
    if text:
        yield title, text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, prefix + child.name)


def clean_docstring(text: str) -> str:
    """Return a docstring unindented, without its interactive examples.

    Lone surrogates, which UTF-8 cannot hold, become question marks.
    """
    text = inspect.cleandoc(text).encode("utf-8", "replace").decode("utf-8")
    text = _DOCTEST.sub("", text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def _join(sections: list[str]) -> Iterator[str]:
    """Join neighbouring sections to documents of about ``_TARGET_DOCUMENT``."""
    document = ""
    for section in sections:
        if document and len(document) + len(section) > _TARGET_DOCUMENT:
            yield from _long_enough(document)
            document = ""
        document = f"{document}\n\n{section}" if document else section
    yield from _long_enough(document)


def _long_enough(document: str) -> Iterator[str]:
    """Yield the document unless it is near-trivial."""
    if len(document) >= _MIN_DOCUMENT:
        yield document
