"""The repository's files, and which of them imports which: what the tests of the house's rules ask."""

import ast
import functools
import subprocess
from pathlib import Path

import networkx  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_router_upcycling"


@functools.cache
def repository_files() -> list[Path]:
    """What git tracks, or would track once it is added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def source_files(*folders: str) -> dict[str, Path]:
    """Module -> file of all Python under ``folders``: ``a/b.py`` is ``a.b``, ``a/__init__.py`` is ``a``."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Those of ``modules`` that the file imports anywhere in it, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {whole if whole in modules else node.module for whole in inside.values()}
    return names & set(modules)


def import_graph(*folders: str) -> dict[str, set[str]]:
    """Module -> the modules under ``folders`` that it imports."""
    modules = source_files(*folders)
    return {module: imported(path, modules) for module, path in modules.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other, each sorted."""
    edges = networkx.DiGraph(graph)
    components = (sorted(nodes) for nodes in networkx.strongly_connected_components(edges))
    return sorted(nodes for nodes in components if len(nodes) > 1 or edges.has_edge(nodes[0], nodes[0]))
