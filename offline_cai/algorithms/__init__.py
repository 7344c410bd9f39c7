"""One file per algorithm, found by name: `algorithms/NAME.py` holds one subclass of Algorithm and is called NAME."""

import importlib
import pkgutil

from offline_cai.core import Algorithm
from offline_cai.errors import UserError, did_you_mean


def names() -> list[str]:
    """The algorithms there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> type[Algorithm]:
    """The algorithm of a name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        raise UserError(f"there is no algorithm {name!r}; {did_you_mean(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    (algorithm,) = (c for c in classes if issubclass(c, Algorithm))
    return algorithm
