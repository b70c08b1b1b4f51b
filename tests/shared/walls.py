"""The walls between the rooms of the sources, read from the files themselves: nothing is imported.

Each rule takes the root of a repository and gives sentences, one for each fault: the place, what is wrong, the fix.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "sparseforge_fx"
SOURCES = {PACKAGE: PACKAGE, "passes": f"{PACKAGE}.passes"}  # folder -> the name that it is imported by
PUBLIC = "__init__"  # the names that sparseforge_fx/__init__.py gives out
#: from the lowest up: a room imports from rows below its own, and nothing beside it
ROWS = (
    ("errors",),
    ("files", "ranges", "pattern", "formats", "progress"),
    ("scales",),
    ("kernels", "graph"),
    ("passes", "data"),
    ("methods",),
    ("models", "evaluation", "report", "knapsack"),
    ("plans",),
    ("decision",),
    ("page",),
    ("training", "deploy"),
    ("planning",),
    (PUBLIC,),
    ("cli",),
)
HEIGHT = {room: height for height, row in enumerate(ROWS) for room in row}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 350, 80, 12
#: the call that takes every option of a run; commands, too, have a parameter for each of their options
WIDE = {(f"{PACKAGE}/training/sparsify.py", "sparsify")}


# -- reading ---------------------------------------------------------------------------------------------------------
def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every source."""
    found = {}
    for folder, name in SOURCES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = file
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module, line) of everything imported, wherever it stands: in a function, under TYPE_CHECKING, or named by a
    string, as importlib takes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in known else module, node.lineno
        elif isinstance(node, ast.Constant) and node.value in known and node.value != PACKAGE:  # which is a word, too
            yield node.value, node.lineno


def arrows(root: Path) -> dict[str, dict[str, int]]:
    """Module -> the modules of ours that it imports, each with a line."""
    known = modules(root)
    return {
        name: {to: line for to, line in imports(ast.parse(file.read_text()), known) if to in known and to != name}
        for name, file in known.items()
    }


def room(module: str) -> str:
    return [*module.split("."), PUBLIC][1]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All but Triton's device code, which takes its launch arguments one by one."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    yield from (f for f in found if not any("triton.jit" in ast.unparse(d) for d in f.decorator_list))


def _dotted(place: str) -> str:
    return place.removesuffix(".py").replace("/", ".")


# -- rules -----------------------------------------------------------------------------------------------------------
def rooms_without_a_row(root: Path) -> list[str]:
    return [f"{name} is in no row of ROWS: say what it stands on" for name in modules(root) if room(name) not in HEIGHT]


def upward_arrows(root: Path) -> list[str]:
    known, faults = modules(root), []
    for name, targets in arrows(root).items():
        for to, line in targets.items():
            here, there = room(name), room(to)
            if here == there or here not in HEIGHT or there not in HEIGHT:
                continue
            if HEIGHT[there] >= HEIGHT[here]:
                side = "beside" if HEIGHT[there] == HEIGHT[here] else "above"
                place = f"{known[name].relative_to(root)}:{line}"
                faults.append(f"{place} imports {to}: {there} stands {side} {here}; move what both need down")
    return faults


def cycles(root: Path) -> list[str]:
    """Modules that reach themselves, in groups that reach each other."""
    graph = arrows(root)
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(n for n in reached[m] if m in reached[n]) for m in graph if m in reached[m]}
    return [f"{' and '.join(sorted(g))} import each other: move what both need into a file of its own" for g in groups]


def _reached(graph: dict[str, dict[str, int]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def long_files(root: Path) -> list[str]:
    lengths = {file.relative_to(root): len(file.read_text().splitlines()) for file in modules(root).values()}
    return [f"{file} has {n} lines: split it, {FILE_LINES} are enough" for file, n in lengths.items() if n > FILE_LINES]


def long_functions(root: Path, folders: tuple[str, ...] = tuple(SOURCES)) -> list[str]:
    faults = []
    for file in (file for folder in folders for file in sorted((root / folder).rglob("*.py"))):
        for node in functions(ast.parse(file.read_text())):
            if (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES:
                place = f"{file.relative_to(root)}:{node.lineno}"
                faults.append(f"{place} {node.name} has {length} lines: move parts out, {FUNCTION_LINES} are enough")
    return faults


def wide_signatures(root: Path) -> list[str]:
    faults = []
    for file in modules(root).values():
        for node in functions(ast.parse(file.read_text())):
            given = node.args
            names = [
                a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a
            ]
            count = len([n for n in names if n not in ("self", "cls")])
            place = str(file.relative_to(root))
            command = any(ast.unparse(d) == "command" for d in node.decorator_list) and room(_dotted(place)) == "cli"
            if count > PARAMETERS and not command and (place, node.name) not in WIDE:
                fix = f"group what belongs together, {PARAMETERS} are enough"
                faults.append(f"{place}:{node.lineno} {node.name} has {count} parameters: {fix}")
    return faults


def bare_passes(root: Path, folders: tuple[str, ...] = (*SOURCES, "tests", "examples")) -> list[str]:
    """Imports of ``passes`` by the name of its folder, which an installed package does not have."""
    faults = []
    for file in (file for folder in folders for file in sorted((root / folder).rglob("*.py"))):
        for name, line in imports(ast.parse(file.read_text()), {}):
            if name.split(".")[0] == "passes":
                faults.append(f"{file.relative_to(root)}:{line} imports {name}: write {PACKAGE}.{name}")
    return faults


def relative_imports(root: Path) -> list[str]:
    known = modules(root)
    return [
        f"{file.relative_to(root)}:{line} imports {name}: write the whole name"
        for file in known.values()
        for name, line in imports(ast.parse(file.read_text()), known)
        if name.startswith(".")
    ]


def packages_not_installed(root: Path) -> list[str]:
    """Folders that pyproject.toml does not name, names without a folder, folders without an __init__.py."""
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    files = modules(root)
    folders = {name if file.name == "__init__.py" else name.rpartition(".")[0] for name, file in files.items()}
    here = "[tool.setuptools] packages of pyproject.toml"
    return [
        *(f"{name} is not in {here}: add it, or it is not installed" for name in sorted(folders - listed)),
        *(f"{name} is in {here} and has no file: take it out" for name in sorted(listed - folders)),
        *(f"{name} has no __init__.py: add one" for name in sorted(folders - set(files))),
    ]
