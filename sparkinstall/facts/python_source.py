"""Read what Python modules declare from their source: nothing is imported, so neither torch nor a GPU is needed."""

import ast
from collections.abc import Callable, Iterator
from functools import cached_property

from msgspec import Struct

Read = Callable[[str], bytes | None]
"""Returns the content of a file by its path below site-packages or in a wheel, or None if there is none."""

_WRAPPERS = ("Annotated", "SkipValidation", "ClassVar", "Final")
_DEEPEST = 12


class Hint(Struct, frozen=True):
    """One alternative of an annotation.

    `name`: the type's own name, and `Literal`, `Enum`, `dataclass` or `None`. `values`: the values of a Literal or the
    members of an Enum. `inner`: the alternatives of the first type in brackets.
    """

    name: str
    values: tuple[str, ...] = ()
    inner: tuple["Hint", ...] = ()


class Module:
    """The names that a module always defines: not those within `if`, which depend on the run."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.tree = parsed(content)

    @cached_property
    def defined(self) -> dict[str, ast.expr | ast.ClassDef]:
        """The classes and the values of the names that are assigned."""
        found: dict[str, ast.expr | ast.ClassDef] = {}
        for each in self.tree.body:
            if isinstance(each, ast.ClassDef):
                found[each.name] = each
            elif isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                found[each.targets[0].id] = each.value
            elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value:
                found[each.target.id] = each.value
        return found

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Module and name of what is imported from others, by the name that it has here."""
        froms = (each for each in self.tree.body if isinstance(each, ast.ImportFrom) and each.module and not each.level)
        return {name.asname or name.name: (str(each.module), name.name) for each in froms for name in each.names}


class Sources:
    """The modules that `read` finds, each parsed once."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Return a module by its dotted name, or None if there is none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            content = self._read(f"{path}.py") or self._read(f"{path}/__init__.py")
            self._modules[name] = Module(name, content) if content else None
        return self._modules[name]

    def find(self, module: Module, name: str, depth: int = 0) -> tuple[Module, ast.expr | ast.ClassDef] | None:
        """Return what `name` means in `module`, through its imports, and the module that defines it."""
        if name in module.defined:
            return module, module.defined[name]
        if name not in module.imported or depth > _DEEPEST:
            return None
        source, original = module.imported[name]
        other = self.module(source)
        return self.find(other, original, depth + 1) if other else None

    def hints(self, module: Module, annotation: ast.expr, depth: int = 0) -> Iterator[Hint]:
        """Yield the alternatives of an annotation in `module`; an unknown name is one of its own."""
        if isinstance(annotation, ast.BinOp):
            yield from self.hints(module, annotation.left, depth)
            yield from self.hints(module, annotation.right, depth)
        elif isinstance(annotation, ast.Subscript):
            yield from self._in_brackets(module, annotation, depth)
        elif isinstance(annotation, ast.Constant):
            yield Hint("None" if annotation.value is None else "unknown")
        else:
            yield from self._named(module, last_name(annotation), depth)

    def _in_brackets(self, module: Module, annotation: ast.Subscript, depth: int) -> Iterator[Hint]:
        name, inside = last_name(annotation.value), annotation.slice
        first = inside.elts[0] if isinstance(inside, ast.Tuple) and inside.elts else inside
        if name == "Literal":
            yield Hint(name, tuple(self.literals(module, inside, depth)))
        elif name in _WRAPPERS:
            yield from self.hints(module, first, depth)
        elif name in ("Optional", "Union"):
            for each in inside.elts if isinstance(inside, ast.Tuple) else (inside,):
                yield from self.hints(module, each, depth)
            yield from (Hint("None"),) if name == "Optional" else ()
        else:
            yield Hint(name.lower(), inner=tuple(self.hints(module, first, depth)))

    def _named(self, module: Module, name: str, depth: int) -> Iterator[Hint]:
        found = self.find(module, name) if depth <= _DEEPEST else None
        if found is None:
            yield Hint(name)
        elif isinstance(found[1], ast.ClassDef):
            yield _of_class(found[1])
        else:
            yield from self.hints(found[0], found[1], depth + 1)

    def literals(self, module: Module, inside: ast.expr, depth: int = 0) -> Iterator[str]:
        """Yield the values in the brackets of a Literal, also those of another Literal that is named there."""
        for each in inside.elts if isinstance(inside, ast.Tuple) else (inside,):
            if isinstance(each, ast.Constant):
                yield str(each.value)
            else:
                for hint in self.hints(module, each, depth + 1):
                    yield from hint.values


def parsed(content: bytes) -> ast.Module:
    """Return the tree of a source; an empty one if it is no Python."""
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def last_name(of: ast.expr) -> str:
    """Return `c` of `a.b.c`; "" if it is no name."""
    return of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""


def fields(of: ast.ClassDef) -> dict[str, ast.expr]:
    """Return the annotated fields of a class with their annotations."""
    annotated = (each for each in of.body if isinstance(each, ast.AnnAssign))
    return {each.target.id: each.annotation for each in annotated if isinstance(each.target, ast.Name)}


def texts(of: ast.expr | None) -> tuple[str, ...] | None:
    """Return the items of a list or tuple of literal texts; None if it is another expression."""
    items = of.elts if isinstance(of, ast.List | ast.Tuple) else None
    values = [each.value for each in items or () if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return tuple(values) if items and len(values) == len(items) else None


def _of_class(found: ast.ClassDef) -> Hint:
    if any(last_name(base).endswith("Enum") for base in found.bases):
        return Hint("Enum", tuple(_members(found)))
    return Hint("dataclass" if found.decorator_list else found.name)


def _members(of: ast.ClassDef) -> Iterator[str]:
    """Yield the names of an Enum's members, and their values if these are numbers."""
    for each in of.body:
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            yield each.targets[0].id
            if isinstance(each.value, ast.Constant) and isinstance(each.value.value, int):
                yield str(each.value.value)
