"""Imports point one way, optional libraries stay in their leaves, and composing needs no torch."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each package may import of the others: those below it.
BELOW = {
    "configs": set(),
    "core": set(),
    "monitoring": {"core"},
    "parallel": {"core"},
    "trainer": {"core", "monitoring", "parallel"},
    "compression": {"core", "monitoring", "parallel", "trainer"},
    "serving": {"core", "monitoring", "parallel", "trainer", "compression"},
    "launch": {"core", "monitoring", "parallel", "trainer"},  # what imports no torch of them
}
OURS = {*BELOW, "benchmarks", "tests"}
PACKAGES = list(BELOW)

# The only file that may import a library that is an extra, or slow, or both.
LEAVES = {
    "deepspeed": {"parallel/zero.py"},
    "wandb": {"monitoring/wandb_sink.py"},
    "compressed_tensors": {"compression/targets/compressed_tensors.py"},
    "gguf": {"compression/targets/gguf.py"},
    "torchao": {"compression/targets/torchao.py"},
    "celery": {"serving/batches/celery_queue.py"},
}

# Modules that import, in functions or for their types, what imports them, and why.
LAZY = {
    "core.settings.command": "help page and refusals of a Command, needed seldom, are about it",
    "parallel.config": "build() of a config makes its strategy, which takes that config",
}


@cache
def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


@cache
def parsed(path):
    return ast.parse(path.read_text(), str(path))


@cache
def imported(path, everywhere=True):
    """Top-level names that a file imports: anywhere in it, or when it is itself imported."""
    return {name.split(".")[0] for name in imported_names(path, everywhere)}


@cache
def imported_names(path, everywhere=True):
    """Dotted names; what is imported from a module may be a module itself, so it is named too."""
    names, todo = set(), [parsed(path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if not everywhere:
                continue
        todo += ast.iter_child_nodes(node)
    return names


def test_every_package_has_its_place():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found <= OURS, "give a new package its row in BELOW"
    assert found >= set(BELOW), "a package that is gone has no row in BELOW"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    allowed = BELOW[package] | {package}
    for path in sources(package):
        against = imported(path) & OURS - allowed
        assert not against, f"{path.relative_to(ROOT)} imports {', '.join(sorted(against))}"


def test_no_module_imports_what_imports_it():
    paths = [path for package in [*PACKAGES, "benchmarks"] for path in sources(package)]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    graph = {
        name: imported_names(path, everywhere=name not in LAZY) & modules.keys()
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("library", LEAVES)
def test_extras_are_imported_in_their_leaves_only(library):
    files = [path for package in [*PACKAGES, "benchmarks"] for path in sources(package)]
    users = {str(path.relative_to(ROOT)) for path in files if library in imported(path)}
    users = {user for user in users if not user.startswith("benchmarks/")}
    assert users == LEAVES[library]
    for path in files:
        name = str(path.relative_to(ROOT))
        if name not in LEAVES[library]:
            assert library not in imported(path, everywhere=False), name


def test_the_gateways_domain_knows_no_http():
    edge = {"admin", "app", "batches", "errors", "http_limits", "incoming"}
    users = {
        path.stem
        for path in (ROOT / "serving/gateway").glob("*.py")
        if imported(path) & {"fastapi", "starlette", "uvicorn"}
    }
    assert users == edge


def test_leaves_are_imported_inside_functions():
    """A user without wandb imports nothing that needs it."""
    leaves = {f[:-3].replace("/", ".") for files in LEAVES.values() for f in files}
    for package in PACKAGES:
        for path in sources(package):
            for node in parsed(path).body:
                if isinstance(node, ast.ImportFrom):
                    assert node.module not in leaves, f"{path}:{node.lineno}"


_COMPOSE_ALL = """
import sys
from core.settings.command import CONFIG_DIR
from trainer.command import TRAINER

# Composed are all first options at once, then all second ones, ...
groups = {g: sorted(p.stem for p in (CONFIG_DIR / g).glob("*.yaml")) for g in TRAINER.group_names}
assert sum(map(len, groups.values())) > 20, groups
for i in range(max(map(len, groups.values()))):
    TRAINER.compose_tree([f"{g}={names[i]}" for g, names in groups.items() if i < len(names)])
print(sorted({"torch", "transformers", "datasets", "deepspeed", "wandb"} & set(sys.modules)))
"""


def test_composing_every_option_imports_no_heavy_library():
    result = subprocess.run(
        [sys.executable, "-c", _COMPOSE_ALL], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


_IMPORT_LAUNCH = """
import importlib, pkgutil, sys
import launch

for module in pkgutil.walk_packages(launch.__path__, "launch."):
    importlib.import_module(module.name)
print(sorted({"torch", "transformers", "datasets", "sky"} & set(sys.modules)))
"""


def test_launch_imports_no_heavy_library():
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_LAUNCH], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_python_programs_of_ours_are_started_so_that_they_find_ours():
    """`core/process/python.py` says how; whoever names the interpreter by itself forgets."""
    files = [path for package in [*PACKAGES, "benchmarks"] for path in sources(package)]
    naming = {str(p.relative_to(ROOT)) for p in files if "sys.executable" in p.read_text()}
    assert naming == {
        "core/process/python.py",
        "trainer/reporter.py",  # shows it to the user
        "benchmarks/bench_serving.py",  # starts a server of transformers
    }
    for path in files:
        starts = re.search(r"core\.process\.python import .*\bpython\b", path.read_text())
        told = {"launch/pipeline/stages.py", "serving/engines/selection.py"}  # others start theirs
        if starts and str(path.relative_to(ROOT)) not in told:
            assert "environment(" in path.read_text(), path
