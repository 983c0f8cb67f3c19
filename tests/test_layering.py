"""Imports inside ``tnc`` go one way."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "tnc"
FILES = sorted(ROOT.rglob("*.py"))
# Each layer may import the layers before it and itself; a tuple is one rung whose members may not know each other.
ORDER = [
    ("errors", "compiled"),
    ("formats",),
    ("stats",),
    ("metric", "stats_file", "symmetric"),
    ("column_space",),
    ("hadamard",),
    ("terms",),
    ("networks",),
    ("quant",),
    ("decompose",),
    ("planning",),
    ("kernels",),
    ("modules", "experts"),
    ("forms", "drawing", "embedding", "ties", "siblings"),
    ("checkpoint", "testing", "foreign"),
    ("models",),
    ("cluster",),
    ("export",),
    ("cli",),
    ("__main__",),
]  # fmt: skip
RUNG = {name: rung for rung, names in enumerate(ORDER) for name in names}


def layer(module: str) -> str | None:
    """``tnc.decompose.engine`` -> ``decompose``; the package root itself is ``None``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def module_name(path: Path) -> str:
    parts = ["tnc", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p) for p in FILES}


def imported(path: Path, tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Every ``tnc`` module a file imports, with the node."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, a.name) for a in node.names if a.name.split(".")[0] == "tnc"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            if (node.module or "").split(".")[0] == "tnc":
                names = [f"{node.module}.{a.name}" for a in node.names]
                found += [(node, name if name in MODULES else node.module) for name in names]
    return found


@cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def violations(trees: dict[Path, ast.Module]) -> list[str]:
    broken = []
    for path, tree in trees.items():
        own = layer(module_name(path))
        for node, target in imported(path, tree):
            other = layer(target)
            if own is None or own == other:
                continue
            if other is None or RUNG[other] >= RUNG[own]:
                broken.append(f"{path.relative_to(ROOT)}:{node.lineno}: {own} imports {target}")
    return broken


def test_every_layer_has_a_place():
    assert {layer(module_name(p)) for p in FILES} - {None} <= RUNG.keys()


def test_imports_go_one_way():
    assert violations(parsed()) == []


@pytest.mark.parametrize("line", ["import tnc.cli", "from tnc.models import compress", "from tnc import metric"])
def test_an_upward_import_is_seen(line):
    assert violations({ROOT / "stats.py": ast.parse(line)})


def test_no_import_of_tnc_inside_a_function():
    inside = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in parsed().items()
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for node, _ in imported(path, scope)
    ]
    assert inside == []


def test_no_import_cycles():
    graph = {module_name(p): {t for _, t in imported(p, tree)} for p, tree in parsed().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for target in graph.get(name, ()):
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_no_pickle():
    banned = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for path, tree in parsed().items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
                raise AssertionError(f"{path}:{node.lineno}: {ast.unparse(node.func)} reads or writes pickle")
