"""Gymnasium's spaces to a Spec, and their observations to flat rows and back.

The rule: the leaves of nested Dict spaces in the sorted order of their names, nested names joined by "/", each leaf
flattened; a plain Box becomes one field called "observation".
"""

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from offline_cai.core import Box, Field, Spec
from offline_cai.errors import UserError


def spec_of(observation: gym.Space, action: gym.Space, dt: float | None = None) -> Spec:
    """The Spec of an environment's or a dataset's spaces.

    Raises:
        UserError: a space that this version does not train on (images, discrete actions, sequences).
    """
    if not isinstance(action, gym.spaces.Box):
        raise UserError(f"the action space is {action}, but this version trains on Box actions only.")
    fields = tuple(Field(name, int(np.prod(space.shape))) for name, space in _leaves(observation))
    if not fields:
        raise UserError(f"the observation space {observation} is empty: there is nothing to train on.")
    low, high = (tuple(float(x) for x in np.ravel(bound)) for bound in (action.low, action.high))
    return Spec(fields, Box(low, high), dt)


def _leaves(space: gym.Space, path: tuple[str, ...] = ()) -> Iterator[tuple[str, gym.spaces.Box]]:
    name = "/".join(path) or "observation"
    if isinstance(space, gym.spaces.Dict):
        for key in sorted(space.spaces):
            if not isinstance(key, str) or "/" in key:
                raise UserError(f"the observation has a field {key!r}; names have to be words without '/'.")
            yield from _leaves(space[key], (*path, key))
    elif isinstance(space, gym.spaces.Box) and space.dtype != np.uint8:
        yield name, space
    else:
        raise UserError(f"the observation {name!r} is {space}, but this version trains on Box and Dict of Box only.")


def require_same_spec(ours: Spec, theirs: Spec) -> None:
    """Raise a UserError that says what differs if a policy made for `ours` cannot act in an environment of `theirs`."""
    if ours.obs != theirs.obs:
        wanted, given = (", ".join(f"{name} ({width})" for name, width in spec.obs) for spec in (ours, theirs))
        raise UserError(f"the policy was trained on observations {wanted}, but the environment gives {given}.")
    if ours.action != theirs.action:
        raise UserError(f"the policy was trained for actions {ours.action}, but the environment takes {theirs.action}.")


def flatten(spec: Spec, obs: Any) -> np.ndarray:
    """Observations of an environment or a dataset, with any leading shape M, to float64 [M, O]."""
    return np.concatenate([_rows(_lookup(obs, field.name), field) for field in spec.obs], axis=-1)


def _lookup(obs: Any, name: str) -> np.ndarray:
    for part in name.split("/"):
        obs = obs[part] if isinstance(obs, Mapping) else obs
    return np.asarray(obs, dtype=np.float64)


def _rows(array: np.ndarray, field: Field) -> np.ndarray:
    return array.reshape(len(array), -1) if array.ndim > 1 or field.width == 1 else array[None]


def unflatten(spec: Spec, space: gym.Space, obs: np.ndarray) -> Any:
    """Flat rows [M, O] back to what the space holds: an array or nested dicts of arrays with leading length M."""
    leaves = dict(_leaves(space))
    parts = np.split(obs, np.cumsum([field.width for field in spec.obs])[:-1], axis=-1)
    arrays = {
        field.name: part.reshape(len(obs), *leaves[field.name].shape).astype(leaves[field.name].dtype)
        for field, part in zip(spec.obs, parts, strict=True)
    }
    if isinstance(space, gym.spaces.Box):
        return arrays["observation"]
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return nested
