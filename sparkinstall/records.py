"""The stdlib's `@dataclass`, without the code that it writes and compiles for every class at every start.

That took 0.4 ms a class: a third of a run with nothing to do. Fields, defaults, `replace()`, `fields()` and `asdict()`
are the stdlib's own; the methods that it would compile anew for each class are here once for all of them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls: Any = None, /, *, frozen: bool = False) -> Any:
        """As the stdlib's; what it can do besides (order, slots, keyword-only) is not here."""
        return _made(cls, frozen) if cls else lambda each: _made(each, frozen)


def _made(cls: Any, frozen: bool) -> Any:
    if cls.__doc__ is None:
        # Or the stdlib would write the signature there, which takes the longest of all.
        cls.__doc__ = cls.__name__
    dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
    cls.__init__, cls.__repr__, cls.__eq__, cls.__hash__ = _init(cls), _repr, _eq, _hash if frozen else None
    if frozen:
        cls.__setattr__ = cls.__delattr__ = _refuse
    return cls


def _init(cls: Any) -> Callable[..., None]:
    names = cls.__match_args__
    fields = dataclasses.fields(cls)
    defaults = {each.name: each.default for each in fields if each.default is not MISSING}
    factories = {each.name: each.default_factory for each in fields if each.default_factory is not MISSING}
    after = getattr(cls, "__post_init__", None)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
            raise TypeError(f"{cls.__qualname__} takes {', '.join(names)}: too many, twice or unknown")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        made = {name: make() for name, make in factories.items() if name not in given}
        values = {**defaults, **made, **given}
        if missing := [name for name in names if name not in values]:
            raise TypeError(f"{cls.__qualname__} needs {', '.join(missing)}")
        self.__dict__.update(values)
        if after:
            after(self)

    return init


def _values(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in self.__match_args__])


def _eq(self: Any, other: Any) -> bool:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _repr(self: Any) -> str:
    shown = [each.name for each in dataclasses.fields(self) if each.repr]
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _refuse(self: Any, name: str, value: object = None) -> None:
    del value
    raise FrozenInstanceError(f"{type(self).__qualname__} is frozen: {name} stays as it is")
