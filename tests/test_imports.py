"""What importing the library brings along, and which of its modules imports which."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import focalkern

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_library_costs_little_beside_torch_and_brings_its_modules():
    """torch._dynamo with sympy takes 2 s, triton half of one: both wait until they are used."""
    code = """if True:
        import sys, focalkern
        heavy = ("torch._dynamo", "sympy", "triton", "transformers", "trl", "deepspeed")
        print([x for x in heavy if x in sys.modules])
        for name in ("methods", "recipes", "diagnostics", "reference"):
            assert getattr(focalkern, name).__name__ == f"focalkern.{name}"
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    assert done.stdout.strip() == "[]"


def test_no_public_function_hides_a_module_of_its_name():
    functions = [name for name in focalkern.__all__ if not isinstance(getattr(focalkern, name), ModuleType)]
    assert len(functions) > 10
    assert not [name for name in functions if (ROOT / f"focalkern/{name}.py").exists()]


def imports() -> dict[str, set[str]]:
    """The modules of the library that each of them names in an import, wherever it stands."""
    files = [*ROOT.glob("focalkern/**/*.py"), *ROOT.glob("csrc_triton/*.py")]
    modules = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files
    }
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        # The package itself lists the public names: whoever imports a module of it runs that list.
        graph[name] = {other for other in found if other in modules} - {name, "focalkern"}
    return graph


def test_no_module_imports_itself_by_way_of_others():
    graph = imports()
    assert len(graph) > 40
    TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_records_import_nothing_of_the_library():
    assert imports()["focalkern.records"] == set()


def test_the_operators_know_nothing_of_preferences():
    graph = imports()
    for name, used in graph.items():
        if name.startswith(("focalkern.logps", "focalkern.kl")):
            assert not [x for x in used if x.startswith(("focalkern.pairs", "focalkern.methods"))], name
