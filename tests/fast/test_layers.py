"""The floors of the package: imports point down, without a cycle, and each large library stays on its floor."""

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "sparkinstall"

# From the top; folders of one line do not import each other. Modules beside the folders are leaves, except `node`
# (settings, stack and the paths that follow from them), which is above `system`, and `services`, which imports it.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("bundle",),
    ("cluster", "support", "diagnose", "measure"),
    ("core",),
    ("journal",),
    ("steps",),
    ("resources", "probes"),
    ("facts",),
    ("node", "services", "wheelhouse", "wheel_index"),
    ("system",),
    ("payloads", "leaves"),
)
HEIGHT = {name: len(FLOORS) - at for at, names in enumerate(FLOORS) for name in names}
TOUCHING = ("sparkinstall.system.local", "sparkinstall.system.processes", "sparkinstall.journal")
KEPT_IN = {"plumbum": "system", "typer": "cli", "click": "cli", "rich": "cli", "prometheus_client": "measure"}

MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@cache
def imports(module: str) -> tuple[str, ...]:
    """Full names of what a module imports anywhere in it, `from a import b` as `a.b`."""
    found: list[str] = []
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def floor(name: str) -> str:
    """The floor of a dotted name below sparkinstall."""
    top = name.split(".")[1] if "." in name else ""
    return top if top in HEIGHT else "leaves"


def dotted(module: str) -> str:
    return "sparkinstall." + module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_folders_have_a_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders - {"config", "stacks", "recipes", "models"} <= set(HEIGHT)


def test_how_it_works_shows_the_floors() -> None:
    text = (PACKAGE.parent / "docs/how-it-works.md").read_text().split("## Floors")[1].split("```")[1]
    drawn = [tuple(re.split(r" \| |, ", line.split("  ")[0])) for line in text.strip().splitlines()]
    assert tuple(drawn) == FLOORS[1:]


def test_imports_point_down() -> None:
    up = [
        f"{module} -> {name}"
        for module in MODULES
        for name in imports(module)
        if name.startswith("sparkinstall.") and HEIGHT[floor(name)] > HEIGHT[floor(dotted(module))]
    ]
    assert up == []


def test_resources_and_probes_do_not_import_each_other() -> None:
    sides = {"resources": "probes", "probes": "resources"}
    across = [
        f"{module} -> {name}"
        for module in MODULES
        for name in imports(module)
        if name.startswith("sparkinstall.") and sides.get(floor(dotted(module))) == floor(name)
    ]
    assert across == []


def test_imports_have_no_cycle() -> None:
    known = {dotted(module) for module in MODULES}
    edges = {
        dotted(module): {
            target
            for name in imports(module)
            for target in (name, name.rpartition(".")[0])
            if target in known and target != dotted(module) and not (target + ".").startswith(dotted(module) + ".")
        }
        for module in MODULES
    }
    # All modules of a package import it, which is no cycle.
    edges = {each: {to for to in targets if not each.startswith(to + ".")} for each, targets in edges.items()}
    done: set[str] = set()
    while ready := {each for each in edges if each not in done and not edges[each] - done}:
        done |= ready
    assert sorted(set(edges) - done) == []


def test_large_libraries_are_imported_on_their_floor_only() -> None:
    astray = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports(module)
        if KEPT_IN.get(name.split(".")[0], floor(dotted(module))) != floor(dotted(module))
    ]
    assert astray == []


def test_functions_import_only_slow_libraries() -> None:
    """Only what is slow to import and not needed by every verb. Payloads import what the node's environment has."""
    heavy = {"yaml", "jinja2", "requests", "plumbum", "rich"}
    ours = ("sparkinstall.cli.text_output", "sparkinstall.cli.live_output", "sparkinstall.bundle.supply")
    inside = {
        f"{name}:{node.lineno}": (f"{node.module}." if isinstance(node, ast.ImportFrom) else "") + node.names[0].name
        for name in MODULES
        for function in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    own = {place: module for place, module in inside.items() if not place.startswith("payloads/")}
    assert not {
        place: found for place, found in own.items() if found.split(".")[0] not in heavy and not found.startswith(ours)
    }
    assert len(inside) <= 30, inside


def test_probes_steps_and_facts_import_no_type_that_changes_the_node() -> None:
    astray = [
        f"{module} imports {name}"
        for module in MODULES
        if module.startswith(("probes/", "steps/", "facts/"))
        for name in imports(module)
        if name.startswith(TOUCHING) or (name == "sparkinstall.system.System" and not module.startswith("steps/"))
    ]
    assert astray == []


def test_check_gets_a_reader_and_apply_a_system() -> None:
    """In the signatures of all resources."""
    found = 0
    for path in (PACKAGE / "resources").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in ("check", "apply"):
                wanted = {"check": "Reader", "apply": "System"}[node.name]
                annotation = node.args.args[1].annotation
                assert isinstance(annotation, ast.Name) and annotation.id == wanted, f"{path.name}: {node.name}"
                found += 1
    assert found > 10


def test_test_modules_do_not_import_each_other() -> None:
    tests = PACKAGE.parent / "tests"
    offenders = [
        f"{path.relative_to(tests)} imports {node.module}"
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests.")
        if any(part.startswith("test_") for part in [*node.module.split("."), *(each.name for each in node.names)])
    ]
    assert not offenders, "helpers of several modules belong in tests/support"


def test_tests_call_no_private_function() -> None:
    offenders = [
        f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
        for path in (PACKAGE.parent / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        if re.match("_[a-z]", node.func.attr) and node.func.value.id not in ("self", "cls", "os")
    ]
    assert not offenders, "test public functions"
