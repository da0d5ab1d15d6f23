"""Who may import whom, who must live without jax, and how long a file may get."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only its own rank or lower ones. Most packages are ranked whole.
RANKS = {
    "pallas_kernels": 0,
    "loongjax.errors": 0,
    "loongjax.plan": 1,
    "loongjax.config": 1,
    "loongjax.cluster": 2,
    "loongjax.costmodel": 2,
    "loongjax.esp": 2,
    "loongjax.kvcache": 2,
    "loongjax.models": 2,
    "loongjax.sampling": 2,
    "loongjax.text": 2,
    "loongjax.programs": 3,
    "loongjax.executor": 4,
    "loongjax.scheduler": 4,
    "loongjax.engine": 5,
    "loongjax.timeline": 6,
    "loongjax.simulator": 6,
    "loongjax.aot": 7,
    "loongjax.profiler": 7,
    "loongjax.api": 7,
    "loongjax": 8,
    "loongjax.bench": 8,
    "serving": 9,
    "loongjax.cli": 10,
    "scripts": 10,
}
OURS = {"loongjax", "pallas_kernels", "serving", "scripts"}
# Of one rank, and still strangers: a policy does not know what runs its plans.
STRANGERS = [{"loongjax.scheduler", "loongjax.executor"}]
LEANS_ON_JAX_INTERNALS = "loongjax.programs.rebind"
MAX_LINES = 600


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, at the top, inside functions, or for types.

    `jax._src` can also be reached as an attribute, without being imported.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "_src":
            yield f"{ast.unparse(node.value)}._src"


def package_of(module: str) -> str | None:
    """The ranked package that a module, or a name in one, belongs to."""
    parts = module.split(".")
    if parts[0] == "loongjax" and len(parts) > 1 and f"loongjax.{parts[1]}" not in RANKS:
        path = ROOT / "loongjax" / parts[1]
        if path.is_dir() or path.with_suffix(".py").exists():
            return None
    known = [".".join(parts[:size]) for size in (2, 1)]
    return next((name for name in known if name in RANKS), None)


def wrong_imports(module: str, source: str) -> list[str]:
    """What a module must not import, and why."""
    own, wrong = package_of(module), []
    if own is None:
        return [f"{module} belongs to no ranked package; give it a rank in {Path(__file__).name}"]
    for name in imports(source):
        if name.startswith("."):
            wrong.append(f"{module} imports {name}: write the whole name")
        internal = name.startswith("jax._src") or name.startswith("jaxlib.")
        if internal and module != LEANS_ON_JAX_INTERNALS:
            wrong.append(f"{module} imports {name}: only {LEANS_ON_JAX_INTERNALS} may")
        if name.split(".")[0] not in OURS:
            continue
        other = package_of(name)
        if other is None:
            wrong.append(f"{module} imports {name}, which has no rank")
        elif RANKS[other] > RANKS[own] or {own, other} in STRANGERS:
            wrong.append(f"{module} imports {name}: {own} must not know {other}")
    return wrong


def test_imports_run_one_way():
    found = []
    for path in sources(*sorted(OURS)):
        found += wrong_imports(module_name(path), path.read_text())
    assert not found, "\n".join(found)


def test_kernels_know_nothing_of_loongjax():
    for path in sources("pallas_kernels"):
        ours = {name.split(".")[0] for name in imports(path.read_text())} & OURS
        assert ours <= {"pallas_kernels"}, path


def test_messages_know_only_errors():
    found = [
        name for name in imports((ROOT / "loongjax/plan.py").read_text()) if "loongjax" in name
    ]
    assert all(name.startswith("loongjax.errors.") for name in found)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("pallas_kernels.partials", "import loongjax.plan", "must not know loongjax.plan"),
        ("loongjax.plan", "from loongjax.scheduler import Policy", "know loongjax.scheduler"),
        ("loongjax.esp.decode", "from loongjax import LLM", "must not know loongjax"),
        ("loongjax.esp.decode", "from loongjax import engine", "must not know loongjax.engine"),
        ("loongjax.engine.loop", "def f():\n  import serving.grpc", "must not know serving"),
        ("loongjax.api.llm", "from serving import client", "must not know serving"),
        ("serving.server", "import scripts.bench", "must not know scripts"),
        (
            "loongjax.scheduler.policy",
            "import loongjax.executor.protocol",
            "know loongjax.executor",
        ),
        (
            "loongjax.executor.inputs",
            "from jax._src import compiler",
            "only loongjax.programs.rebind",
        ),
        ("loongjax.cluster.mesh", "from jaxlib.xla_client import DeviceList", "only loongjax"),
        ("loongjax.cluster.mesh", "import jax._src.lib", "only loongjax"),
        ("loongjax.cluster.mesh", "import jax\njax._src.dtypes.x()", "only loongjax"),
        ("loongjax.api.llm", "from ..plan import Plan", "write the whole name"),
    ],
)
def test_a_wrong_import_is_seen(module, source, complaint):
    (found,) = wrong_imports(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loongjax.cli.serve", "import serving.grpc\nfrom loongjax import LLM"),
        ("scripts.bench", "from loongjax.simulator import run\nimport pallas_kernels.partials"),
        ("loongjax.programs.rebind", "from jax._src.lib import xla_client"),
        ("loongjax.programs.key", "import jaxlib"),
        ("loongjax.esp.decode", "from loongjax.esp.meta import Meta"),
    ],
)
def test_a_right_import_is_let_through(module, source):
    assert wrong_imports(module, source) == []


def test_a_package_without_a_rank_is_seen(tmp_path, monkeypatch):
    (tmp_path / "loongjax" / "novelty").mkdir(parents=True)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert "give it a rank" in wrong_imports("loongjax.novelty.part", "")[0]
    (found,) = wrong_imports("loongjax.engine.loop", "import loongjax.novelty.part")
    assert "has no rank" in found


# The pool in kvcache uses jax, and is imported by name.
WITHOUT_JAX = {
    "loongjax": False,
    "loongjax.plan": False,
    "loongjax.config": False,
    "loongjax.cluster.topology": False,
    "loongjax.sampling.params": False,
    "loongjax.executor.protocol": False,
    "loongjax.costmodel": True,
    "loongjax.kvcache": False,
    "loongjax.scheduler": True,
    "loongjax.simulator": True,
    "loongjax.text": True,
    "loongjax.timeline": True,
}


@pytest.mark.parametrize(("module", "whole"), WITHOUT_JAX.items())
def test_importing_it_does_not_load_jax(module, whole):
    """`whole` packages are held to it with everything inside."""
    script = f"""
import importlib, pkgutil, sys
found = importlib.import_module({module!r})
for part in pkgutil.walk_packages(found.__path__, {module + "."!r}) if {whole} else ():
    importlib.import_module(part.name)
loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib"))
sys.exit(f"{module} loads {{loaded[:3]}}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_check_for_jax_can_fail():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, loongjax.cluster.mesh; print('jax' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.strip() == "True", done.stderr


def test_no_file_is_longer_than_a_few_screens():
    long = {}
    for path in sources(*sorted(OURS), "tests"):
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            long[str(path.relative_to(ROOT))] = lines
    assert not long, f"over {MAX_LINES} lines, cut them into parts with one job each: {long}"
