"""Kinds that are found by their files: each module of a package holds one class, and both are called the same."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from fedsea.errors import UsageError

Kind = TypeVar("Kind")


class Registry(Generic[Kind]):
    """The classes of a package's modules, by the attribute `name` of each. Names are known without importing any.

    A new one is a new file: `search_map.py` holds the class whose name is `search-map`.

    Parameters
    ----------
    package
        Whose modules are meant, as `fedsea.tasks.datasets`.
    what
        What one of them is, for errors: "task".
    """

    def __init__(self, package: str, what: str) -> None:
        self._package, self._what = package, what

    @property
    def names(self) -> list[str]:
        """All names, in the order of the alphabet."""
        return sorted(module.name.replace("_", "-") for module in iter_modules(import_module(self._package).__path__))

    def find(self, name: str) -> type[Kind]:
        """The class of this name; a UsageError, which names those that there are, if there is none."""
        if name not in self.names:
            raise UsageError(f"there is no {self._what} {name!r}; there are {', '.join(self.names)}")
        module = import_module(f"{self._package}.{name.replace('-', '_')}")
        found: type[Kind] = next(one for one in vars(module).values() if getattr(one, "name", None) == name)
        return found
