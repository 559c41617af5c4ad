"""What holds for every test file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("*.py"))
CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "process_time_ns", "time"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def reads_a_clock(expression: ast.expr) -> bool:
    called = (node.func for node in ast.walk(expression) if isinstance(node, ast.Call))
    return any(
        isinstance(f, ast.Attribute) and f.attr in CLOCKS and getattr(f.value, "id", "") == "time" for f in called
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_test_files_are_not_imported(path):
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.startswith("test_")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_asserted_of_seconds(path):
    """A clock stands in an assertion only where its reading is divided by another one."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Assert) or not reads_a_clock(node.test):
            continue
        ratios = [e for e in ast.walk(node.test) if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Div)]
        assert any(reads_a_clock(ratio) for ratio in ratios), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.xdist_group("told")
def test_xdist_forms_its_groups(request):
    """Under some pairs of versions it silently does not, and two workers start one cluster (findings/xdist_groups_*.sh)."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("runs without --dist loadgroup")
    assert request.node.nodeid.endswith("@told")
