"""The floors of the house: imports only ever point down; plumbum, typer and rich stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sparkinstall"

# From the top. Modules beside the folders are leaves, which everybody may use and which use only each other,
# but for `node`: settings, stack and the places that follow from them, which is why it stands on `system`.
FLOORS = ("cli", "plans", "steps", "resources", "probes", "node", "system", "leaves")
ENTRY = "__main__"
TOUCHING = ("sparkinstall.system.local", "sparkinstall.system.processes", "sparkinstall.plans")
KEPT_IN = {"plumbum": "system", "typer": "cli", "click": "cli", "rich": "cli"}

MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def imports(module: str) -> Iterator[str]:
    """Full names of what a module imports, wherever in it, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name: str) -> str:
    """The floor of a dotted name beneath sparkinstall."""
    top = name.split(".")[1] if "." in name else ""
    return top if top in FLOORS else "leaves"


def dotted(module: str) -> str:
    return "sparkinstall." + module.removesuffix(".py").replace("/", ".")


def test_every_folder_has_a_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders - {"stacks"} <= set(FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != f"{ENTRY}.py"])
def test_imports_point_down(module: str) -> None:
    mine = FLOORS.index(floor(dotted(module)))
    for name in imports(module):
        if name.startswith("sparkinstall."):
            assert FLOORS.index(floor(name)) >= mine, f"{module} reaches up to {name}"


@pytest.mark.parametrize("module", MODULES)
def test_each_of_the_large_libraries_stays_on_its_floor(module: str) -> None:
    for name in imports(module):
        where = KEPT_IN.get(name.split(".")[0])
        assert where in (None, floor(dotted(module))), f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(("probes/", "steps/"))])
def test_what_only_looks_knows_no_type_that_touches(module: str) -> None:
    for name in imports(module):
        assert not name.startswith(TOUCHING), f"{module} imports {name}"
        if module.startswith("probes/"):
            assert name != "sparkinstall.system.System", f"{module} imports {name}"


def test_check_is_given_a_reader_and_apply_a_system() -> None:
    """The second idea of the house, in the signatures of all that can be declared."""
    found = 0
    for path in (PACKAGE / "resources").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in ("check", "apply"):
                wanted = {"check": "Reader", "apply": "System"}[node.name]
                annotation = node.args.args[1].annotation
                assert isinstance(annotation, ast.Name) and annotation.id == wanted, f"{path.name}: {node.name}"
                found += 1
    assert found > 10
