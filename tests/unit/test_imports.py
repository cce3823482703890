"""Imports run one way. Every module is parsed, so that imports inside functions count as well.

    deploy -> cluster -> shards -> models, checkpoint -> layers -> kernels -> collectives,
    quantization -> leaves

A module may import its own level and those below it, and nothing may close a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"deploy": ROOT, "cluster": ROOT, "shards": ROOT, "headwise": ROOT / "client"}

# From the top down. The longest prefix decides, so that a leaf may lie inside any package.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("deploy",),
    ("cluster",),
    ("shards",),
    ("shards.models", "shards.checkpoint"),
    ("shards.layers",),
    ("shards.kernels",),
    ("shards.collectives", "shards.quantization"),
    (
        "shards.batch",
        "shards.compile_cache",
        "shards.contract",
        "shards.dealing",
        "shards.errors",
        "shards.footprint",
        "shards.kv_cache",
        "shards.layout",
        "shards.models.family",
        "shards.models.parameters",
        "shards.models.spec",
        "shards.quantization.choice",
        "shards.quantization.scheme",
        "shards.timing",
    ),
)
RAY_OWNERS = {
    "deploy.app",
    "deploy.replica",
    "deploy.fleet.ray_directory",
    "deploy.telemetry.ray_mirror",
    "cluster.shard_group",
    "shards.actor",
}
HEAVY = {"torch", "ray", "transformers"}
LIGHT = (
    "shards.contract",
    "shards.layout",
    "shards.footprint",
    "shards.models.spec",
    "shards.models.parameters",
    "shards.quantization.choice",
    "shards.quantization.scheme",
    "shards.cost.host",
    "shards.cost.objective",
    "shards.cost.prediction",
    "cluster.scheduler",
    "cluster.blocks",
    "cluster.request",
    "deploy.plan",
    "deploy.commands.bench",
    "deploy.bench.run",
)


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, a dotted name. `deferred`: in a function, or for types alone."""

    module: str
    target: str
    where: str
    deferred: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.module} imports {self.target}"


class Tree:
    """The modules of some packages, and what each imports."""

    def __init__(self, packages: Mapping[str, Path]) -> None:
        self.files: dict[str, Path] = {}
        for package, root in packages.items():
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        self.imports = {module: list(self._imports(module)) for module in self.files}

    def __iter__(self) -> Iterator[Import]:
        for found in self.imports.values():
            yield from found

    def inside(self, target: str) -> str | None:
        """The module of this tree that a dotted name is or lies in."""
        while target and target not in self.files:
            target = target.rpartition(".")[0]
        return target or None

    def _imports(self, module: str) -> Iterator[Import]:
        path = self.files[module]
        pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(), str(path)), False)]
        while pending:
            node, deferred = pending.pop()
            for target in self._targets(node, module):
                yield Import(module, target, f"{path}:{getattr(node, 'lineno', 0)}", deferred)
            deferred |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                pending.append((child, deferred or for_types))

    def _targets(self, node: ast.AST, module: str) -> Iterator[str]:
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:
                    is_package = self.files[module].name == "__init__.py"
                    parts = module.split(".")
                    parts = parts[: len(parts) - level + is_package]
                    source = ".".join([*parts, source] if source else parts)
                for name in names:
                    submodule = f"{source}.{name.name}"
                    yield submodule if submodule in self.files else str(source)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def level(module: str) -> int | None:
    """Where a module stands in `LEVELS`, 0 on top; None outside of them."""
    depths = {prefix: depth for depth, prefixes in enumerate(LEVELS) for prefix in prefixes}
    while module and module not in depths:
        module = module.rpartition(".")[0]
    return depths.get(module)


def upward(tree: Tree) -> list[str]:
    found = []
    for each in tree:
        here, there = level(each.module), level(each.target)
        if here is not None and there is not None and there < here:
            found.append(f"{each}, which is above it")
    return found


def circles(tree: Tree) -> list[str]:
    """One line for each circle: the imports that close it, in order."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: list[Import]) -> None:
        modules = [each.module for each in path]
        if module in modules:
            found.append("; ".join(map(str, path[modules.index(module) :])))
        elif module not in done:
            for each in tree.imports[module]:
                target = tree.inside(each.target)
                if target is not None:
                    visit(target, [*path, each])
            done.add(module)

    for module in tree.files:
        visit(module, [])
    return found


def misplaced_ray(tree: Tree) -> list[str]:
    return [
        f"{each}; only {', '.join(sorted(RAY_OWNERS))} may"
        for each in tree
        if each.target.split(".")[0] == "ray" and each.module not in RAY_OWNERS
    ]


def heavy_chains(tree: Tree, start: str) -> list[str]:
    """The chains of imports that lead from `start` to a heavy package.

    Deferred imports count in `start` itself, not further on. Importing a.b.c runs a and a.b first.
    """
    chains: dict[str, list[Import]] = {start: []}
    pending = [start]
    found = []
    while pending:
        module = pending.pop()
        parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
        for parent in parents:
            if parent not in chains:
                chains[parent] = chains[module]
                pending.append(parent)
        for each in tree.imports[module]:
            if each.deferred and module != start:
                continue
            target = tree.inside(each.target)
            chain = [*chains[module], each]
            if each.target.split(".")[0] in HEAVY:
                found.append("; ".join(map(str, chain)))
            elif target is not None and target not in chains:
                chains[target] = chain
                pending.append(target)
    return found


def strays_of_the_client(tree: Tree) -> list[str]:
    barred = {"deploy", "cluster", "shards", *HEAVY}
    return [
        f"{each}; the client stands alone"
        for each in tree
        if each.module.split(".")[0] == "headwise" and each.target.split(".")[0] in barred
    ]


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(PACKAGES)


def test_every_package_is_read(tree: Tree) -> None:
    assert {module.split(".")[0] for module in tree.files} == set(PACKAGES)


def test_no_module_imports_one_above_it(tree: Tree) -> None:
    found = upward(tree)
    assert not found, "\n".join(found)


def test_no_circles(tree: Tree) -> None:
    found = circles(tree)
    assert not found, "\n".join(found)


def test_ray_stays_with_its_owners(tree: Tree) -> None:
    found = misplaced_ray(tree)
    assert not found, "\n".join(found)


def test_the_client_stands_alone(tree: Tree) -> None:
    found = strays_of_the_client(tree)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(tree: Tree, module: str) -> None:
    found = heavy_chains(tree, module)
    assert not found, "\n".join(found)


def test_light_modules_load_nothing_heavy() -> None:
    """The same, asked of the interpreter: what third parties import counts too."""
    script = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    if heavy := sorted({HEAVY!r} & set(sys.modules)):\n"
        "        sys.exit(f'importing {name} loaded {heavy}')\n"
    )
    command = [sys.executable, "-c", script]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr


# The rules themselves, on small trees that break them.


def planted(root: Path, files: Mapping[str, str]) -> Tree:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree({name.split("/")[0]: root for name in files})


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("shards/runner.py", "from cluster import driver"),
        ("cluster/driver.py", "def f():\n    import deploy.app"),
        ("shards/layers/norm.py", "from ..models import decoder"),
        ("shards/kernels/cpu.py", "from shards.layers.norm import Norm"),
        ("shards/layout.py", "import importlib\nimportlib.import_module('shards.runner')"),
        ("cluster/blocks.py", "if TYPE_CHECKING:\n    from deploy import app"),
    ],
)
def test_an_upward_import_is_named_with_file_and_line(
    tmp_path: Path, importer: str, line: str
) -> None:
    files = {
        "deploy/app.py": "",
        "cluster/driver.py": "",
        "shards/runner.py": "",
        "shards/models/__init__.py": "",
        "shards/models/decoder.py": "",
        "shards/layers/norm.py": "",
    }
    (found,) = upward(planted(tmp_path, {**files, importer: line}))
    assert found.startswith(f"{tmp_path / importer}:{len(line.splitlines())}: ")


def test_a_circle_is_named_import_by_import(tmp_path: Path) -> None:
    files = {
        "cluster/a.py": "from cluster import b",
        "cluster/b.py": "def late():\n    from cluster.c import x",
        "cluster/c.py": "import cluster.a",
        "cluster/__init__.py": "",
    }
    (found,) = circles(planted(tmp_path, files))
    assert [f"{name}.py:" in found for name in "abc"] == [True] * 3


def test_ray_in_a_function_is_found(tmp_path: Path) -> None:
    tree = planted(tmp_path, {"cluster/driver.py": "def f():\n    from ray import serve"})
    (found,) = misplaced_ray(tree)
    assert f"{tmp_path / 'cluster/driver.py'}:2: cluster.driver imports ray" in found


def test_heavy_imports_are_followed_through_packages(tmp_path: Path) -> None:
    files = {
        "cluster/__init__.py": "from cluster.engine import Engine",
        "cluster/engine.py": "import torch",
        "cluster/blocks.py": "def late():\n    import ray",
    }
    torch, ray = sorted(heavy_chains(planted(tmp_path, files), "cluster.blocks"))
    assert ray.startswith(f"{tmp_path / 'cluster/blocks.py'}:2: ")
    assert "cluster.engine imports torch" in torch


def test_a_client_that_reaches_into_the_server_is_found(tmp_path: Path) -> None:
    tree = planted(tmp_path, {"headwise/client.py": "from cluster.request import Usage"})
    assert len(strays_of_the_client(tree)) == 1
