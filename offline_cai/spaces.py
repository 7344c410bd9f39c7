"""Gymnasium's spaces to a Spec, and what they hold to flat rows and back.

The rule: the leaves of nested Dict and Tuple spaces, a Dict's in the sorted order of their names and a Tuple's by
number, nested names joined by "/"; a space without names becomes one field called "observation". In observations
numbers (Box, MultiBinary) are flattened and choices (Discrete, MultiDiscrete) are one-hot, as in
`gymnasium.spaces.flatten`. Actions keep their choices as whole numbers; their leaves are all continuous or all choices.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from offline_cai import core
from offline_cai.core import Field, Spec
from offline_cai.errors import UserError


class Leaf(NamedTuple):
    """A part of a space that holds no further ones."""

    path: tuple[str | int, ...]  # names of a Dict's parts, numbers of a Tuple's
    space: gym.Space

    @property
    def name(self) -> str:
        return "/".join(map(str, self.path)) or "observation"

    @property
    def choices(self) -> tuple[int, ...]:
        """The number of choices of each component; empty for numbers."""
        if isinstance(self.space, Discrete):
            return (int(self.space.n),)
        return tuple(int(n) for n in np.ravel(self.space.nvec)) if isinstance(self.space, MultiDiscrete) else ()

    @property
    def components(self) -> int:
        return int(np.prod(self.space.shape))  # type: ignore[arg-type]  # the shape of a leaf is known

    @property
    def low(self) -> np.ndarray:
        """The least number of each component."""
        if isinstance(self.space, MultiBinary):
            return np.zeros(self.components)
        return np.ravel(self.space.low if isinstance(self.space, Box) else self.space.start)  # type: ignore[attr-defined]

    @property
    def high(self) -> np.ndarray:
        """The greatest number of each component."""
        if isinstance(self.space, MultiBinary):
            return np.ones(self.components)
        return np.ravel(self.space.high) if isinstance(self.space, Box) else self.low + np.array(self.choices) - 1


def leaves(space: gym.Space, path: tuple[str | int, ...] = ()) -> Iterator[Leaf]:
    """The leaves in the order of the rule.

    Raises:
        UserError: a space that has no flat numbers: texts, sequences, graphs.
    """
    leaf = Leaf(path, space)
    if isinstance(space, Dict):
        for key in sorted(space.spaces):
            if not isinstance(key, str) or "/" in key:
                raise UserError(f"a space has a part called {key!r}; names have to be words without '/'.")
            yield from leaves(space[key], (*path, key))
    elif isinstance(space, Tuple):
        for number, part in enumerate(space.spaces):
            yield from leaves(part, (*path, number))
    elif isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
        yield leaf
    else:
        raise UserError(
            f"{leaf.name!r} is {space}, which is not a fixed number of numbers. There is room for Box, Discrete, "
            "MultiDiscrete, MultiBinary, and Dict and Tuple of these."
        )


def spec_of(observation: gym.Space, action: gym.Space, dt: float | None = None) -> Spec:
    """The Spec of an environment's or a dataset's spaces.

    Raises:
        UserError: a space of images, texts or sequences; no observation; actions of both kinds, or without bounds.
    """
    fields = tuple(_field(leaf) for leaf in leaves(observation))
    if not sum(field.width for field in fields):
        raise UserError(f"the observation space {observation} is empty: there is nothing to train on.")
    parts = list(leaves(action))
    if not sum(part.components for part in parts):
        raise UserError(f"the action space {action} is empty: there is nothing to act with.")
    continuous = {isinstance(part.space, Box) for part in parts}
    if len(continuous) > 1:
        raise UserError(f"the action space {action} mixes numbers and choices: actions are of one kind.")
    low, high = (np.concatenate([np.asarray(getattr(part, end)) for part in parts]) for end in ("low", "high"))
    if continuous == {True}:
        return Spec(fields, core.Box(tuple(map(float, low)), tuple(map(float, high))), dt)
    return Spec(fields, core.Discrete(tuple(int(n) for n in high - low + 1), tuple(map(int, low))), dt)


def _field(leaf: Leaf) -> Field:
    """A part of an observation. Three dimensions are an image's, whatever its numbers, and two of bytes."""
    space = leaf.space
    if isinstance(space, Box) and (len(space.shape) > 2 or (len(space.shape) == 2 and space.dtype == np.uint8)):
        raise UserError(
            f"{leaf.name!r} holds images ({space}), and no algorithm here reads images: wrap the environment so that "
            "it gives features, or make a dataset of states."
        )
    return Field(leaf.name, sum(leaf.choices) or leaf.components)


def require_same_spec(ours: Spec, theirs: Spec) -> None:
    """Raise a UserError that says what differs if a policy made for `ours` cannot act in an environment of `theirs`."""
    if ours.obs != theirs.obs:
        wanted, given = (", ".join(f"{name} ({width})" for name, width in spec.obs) for spec in (ours, theirs))
        raise UserError(f"the policy was trained on observations {wanted}, but the environment gives {given}.")
    if ours.action != theirs.action:
        raise UserError(f"the policy was trained for actions {ours.action}, but the environment takes {theirs.action}.")


def spaces_of(spec: Spec) -> tuple[gym.Space, gym.Space]:
    """Spaces of observations and actions for data without an environment, of which `spec_of` makes this Spec again.

    Only the order of the fields is the rule's then, and choices that were observed are numbers.

    Raises:
        UserError: a field's name is also the first part of another's.
    """
    tree: dict[str, Any] = {}
    for field in spec.obs:
        *parents, leaf = field.name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if not isinstance(node, dict) or leaf in node:
            raise UserError(f"the field {field.name!r} has no place beside {[f.name for f in spec.obs]}: rename it.")
        node[leaf] = Box(-np.inf, np.inf, (field.width,), np.float32)
    return (tree["observation"] if list(tree) == ["observation"] else _dict_space(tree)), _action_space(spec.action)


def _dict_space(tree: Any) -> gym.Space:
    return Dict({name: _dict_space(part) for name, part in tree.items()}) if isinstance(tree, dict) else tree


def _action_space(action: core.Box | core.Discrete) -> gym.Space:
    if isinstance(action, core.Box):
        return Box(np.array(action.low, np.float32), np.array(action.high, np.float32), dtype=np.float32)
    if len(action.n) == 1:
        return Discrete(action.n[0], start=action.start[0])
    return MultiDiscrete(np.array(action.n), start=np.array(action.start))


# To rows -------------------------------------------------------------------------------------------------------------


def flatten(space: gym.Space, obs: Any) -> np.ndarray:
    """M observations, batched as vector environments and datasets do, to float64 [M, O].

    Raises:
        ValueError: a choice that the space does not have.
    """
    return one_hot(space, components(space, obs))


def components(space: gym.Space, values: Any) -> np.ndarray:
    """The numbers of M batched values side by side, choices as whole numbers: float64 [M, C]. Actions are kept so."""
    columns = [np.asarray(part_at(values, leaf.path), dtype=np.float64) for leaf in leaves(space)]
    return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)


def one_hot(space: gym.Space, numbers: np.ndarray) -> np.ndarray:
    """The `components` [M, C] of observations to rows [M, O], every choice one-hot.

    Raises:
        ValueError: a choice that the space does not have; the part is named.
    """
    parts, column = list(leaves(space)), 0
    if not any(part.choices for part in parts):
        return numbers
    rows = []
    for part in parts:
        own = numbers[:, column : column + part.components]
        column += part.components
        if not part.choices:
            rows.append(own)
            continue
        for n, start, value in zip(part.choices, part.low, own.T, strict=True):
            hot = value[:, None] == start + np.arange(n)
            if not hot.any(axis=1).all():
                bad = value[~hot.any(axis=1)][0]
                raise ValueError(f"{part.name!r} holds {bad:g}, not a whole number from {start} to {start + n - 1}")
            rows.append(hot)
    return np.concatenate(rows, axis=1, dtype=np.float64)


def part_at(values: Any, path: tuple[str | int, ...]) -> Any:
    """The part of nested values that a `Leaf.path` leads to."""
    for key in path:
        values = values[key]
    return values


# And back ------------------------------------------------------------------------------------------------------------


def unflatten(space: gym.Space, rows: np.ndarray) -> Any:
    """Rows [M, O] back to what the space holds, batched: arrays with leading length M in dicts and tuples."""
    parts, numbers, column = list(leaves(space)), [], 0
    for part in parts:
        for n, start in zip(part.choices, part.low, strict=False):
            numbers.append(rows[:, column : column + n].argmax(axis=1, keepdims=True) + start)
            column += n
        if not part.choices:
            numbers.append(rows[:, column : column + part.components])
            column += part.components
    return unflatten_action(space, np.concatenate(numbers, axis=1))


def unflatten_action(space: gym.Space, numbers: np.ndarray) -> Any:
    """The inverse of `components`: [M, C] to what the space holds, batched; what a vector environment steps with."""
    arrays, column = {}, 0
    for leaf in leaves(space):
        part = numbers[:, column : column + leaf.components]
        column += leaf.components
        arrays[leaf.path] = part.reshape(len(part), *leaf.space.shape).astype(leaf.space.dtype)  # type: ignore[misc]
    return _nest(space, arrays, ())


def _nest(space: gym.Space, arrays: Mapping[tuple[str | int, ...], np.ndarray], path: tuple[str | int, ...]) -> Any:
    if isinstance(space, Dict):
        return {key: _nest(part, arrays, (*path, key)) for key, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_nest(part, arrays, (*path, number)) for number, part in enumerate(space.spaces))
    return arrays[path]
