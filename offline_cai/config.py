"""YAML files to frozen dataclasses and back: strict, typed, with a suggestion for a name that does not exist.

A field's docstring (the string below it) is its help text. Recipes are looked up as a path, then in the working
directory's `configs/`, `datasets/` or `eval/`, then among those that the package ships; so are the actors that recipes
name, in `datasets/actors/`.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from offline_cai.errors import UserError, did_you_mean

T = TypeVar("T")
Kind = Literal["configs", "datasets", "eval", "datasets/actors", "eval/scoreboards"]


def build(cls: type[T], data: Any, where: str) -> T:
    """A `cls` (a dataclass, nested ones included) from a mapping such as YAML gives.

    Raises:
        UserError: an unknown key, a missing one, or a value of another type; it names the file and the key.
    """
    if isinstance(data, _Flag):
        data = data.value(where)
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected a mapping of {cls.__name__}'s fields, not {data!r}.")
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    for name in data:
        if name not in hints:
            raise UserError(f"{where}: unknown key {name!r}; {did_you_mean(str(name), [f.name for f in fields])}")
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in data:
            raise UserError(f"{where}: the key {f.name!r} is missing: {help_texts(cls).get(f.name, 'it is required')}")
    values = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in data.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def part(cls: type[T], data: Any, where: str) -> T:
    """A `cls` from the keys of `data` that are its fields; there may be others. So what a file has to hold is checked.

    Raises:
        UserError: as `build`, but for unknown keys.
    """
    if isinstance(data, Mapping):
        data = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}  # type: ignore[arg-type]
    return build(cls, data, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    words = hint is str or (origin is Literal and all(isinstance(arg, str) for arg in args))
    if isinstance(value, _Flag):
        value = str(value) if words else value.value(where)
    if hint is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{where}: {value!r} is not a choice; {did_you_mean(str(value), map(str, args))}")
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) == len(value):
            return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    if isinstance(value, _Flag) and type(None) in args and value.value(where) is None:
        return None
    inner = [arg for arg in args if arg is not type(None)]
    for i, arg in enumerate(inner):
        try:
            return _convert(arg, value, where)
        except UserError:
            if i == len(inner) - 1:
                raise
    raise UserError(f"{where}: null is not allowed here.")


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, not {value!r}.")


def to_dict(config: Any) -> Any:
    """Plain data for YAML and JSON: the inverse of `build`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return [to_dict(value) for value in config] if isinstance(config, list | tuple) else config


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) for each leaf of nested mappings."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def help_texts(cls: Any) -> dict[str, str]:
    """Field name to the docstring written below it."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    except OSError:
        return {}
    texts = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            texts[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return texts


def describe(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(flag, value, help) for each leaf field of a config: what `train CONFIG --help` prints."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", to_dict(value), help_texts(type(config)).get(f.name, "")


# Files ---------------------------------------------------------------------------------------------------------------


def _folders(kind: Kind) -> list[Path]:
    package = Path(__file__).parent
    return [Path.cwd() / kind, package / "recipes" / kind, package.parent / kind]


def _suffix(kind: Kind) -> str:
    return ".npz" if kind == "datasets/actors" else ".yaml"


def names(kind: Kind) -> list[str]:
    """The recipes of a kind, by name."""
    return sorted({path.stem for folder in _folders(kind) for path in folder.glob(f"*{_suffix(kind)}")})


def find(name: str | Path, kind: Kind) -> Path:
    """The file of a recipe, from its path or its name.

    Raises:
        UserError: there is none; it names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    for folder in _folders(kind):
        candidate = folder / f"{path.name.removesuffix(_suffix(kind))}{_suffix(kind)}"
        if path.parent.name in ("", Path(kind).name) and candidate.is_file():
            return candidate
    raise UserError(f"no file and no recipe {str(name)!r} in {kind}/; {did_you_mean(path.stem, names(kind))}")


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a mapping of keys to values, not {type(data).__name__}.")
    return data


def override(data: dict[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
    """`data` with dotted flags such as {"training.steps": "100"} set; values are read as YAML."""
    for name, text in flags.items():
        *parents, leaf = name.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--{name}: {parent!r} is a value, not a group of keys.")
        node[leaf] = _Flag(text)
    return data


class _Flag(str):
    """The text of a flag: read as YAML, unless its field is one of words."""

    def value(self, where: str) -> Any:
        try:
            return yaml.safe_load(self)
        except yaml.YAMLError as error:
            raise UserError(f"{where}: {str(self)!r} is not valid YAML: {' '.join(str(error).split())}") from None


def dump(config: Any) -> str:
    """YAML of a config, in the order of its fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
