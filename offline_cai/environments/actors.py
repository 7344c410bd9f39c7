"""Actors from plain .npz files as policies, such as the ones in datasets/actors/, whose README.md tells the format."""

import zipfile
import zlib
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from offline_cai.core import Spec
from offline_cai.environments.behaviour import SlotNoise
from offline_cai.errors import UserError, did_you_mean

Mode = Literal["stochastic", "deterministic"]
_SCALARS = ("relu", "squash")
_OPTIONAL = ("log_std", "log_std_W", "log_std_b", "obs_mean", "obs_std", "obs_clip")
_FORMAT = "datasets/actors/README.md tells what an actor's file holds; export it again."


class Actor:
    """A feed-forward Gaussian actor: relu or tanh layers, squashed by tanh or clipped to [-1, 1].

    Its noise is a function of (seed, environment, number of acts since `reset(None)`), and each row is computed alone,
    so what it does in one environment does not depend on the others, bit for bit.

    The log-probability is that of the stochastic mode, in [-1, 1] space. Where a clipped actor's component sits on a
    bound, it is the log of the probability of being clipped there (a mass, not a density). In deterministic mode it is
    None: an action has no density there.

    Args:
        path: the .npz file.
        spec: of the environment it acts in; widths have to agree.
        seed: of its noise.
        mode: stochastic, or deterministic (the Gaussian's mean).

    Raises:
        UserError: no such file, a damaged one, an array that is missing, unknown, not finite or of another width.
    """

    def __init__(self, path: Path, spec: Spec, seed: int, mode: Mode = "stochastic") -> None:
        if mode not in get_args(Mode):
            raise UserError(f"there is no mode {mode!r} of an actor; {did_you_mean(mode, get_args(Mode))}")
        self._spec, self._arrays = spec, read(path)
        self._depth = _check(path, self._arrays, spec, mode)
        self._noise = SlotNoise(seed, spec.action_width, "normal") if mode == "stochastic" else None

    def reset(self, done: np.ndarray | None = None) -> None:
        if done is None and self._noise is not None:
            self._noise.restart()

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Raw actions [N, A] for observations [N, O], and their log-probabilities [N] in stochastic mode."""
        hidden, mean = self._forward(np.asarray(obs, dtype=np.float32))
        squash, log_prob = bool(self._arrays["squash"]), None
        before = mean
        if self._noise is not None:
            log_std = self._log_std(hidden)
            before = mean + np.exp(log_std) * self._noise(len(obs)).astype(np.float32)
            density = _log_density_squashed if squash else _log_density_clipped
            log_prob = density(*(x.astype(np.float64) for x in (before, mean, log_std))).sum(-1)
        unit = np.tanh(before) if squash else np.clip(before, -1.0, 1.0)
        return self._spec.to_raw(torch.from_numpy(unit.astype(np.float64))).numpy(), log_prob

    def _forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last hidden layer [N, hidden] and the mean [N, A] before squashing."""
        a = self._arrays
        if "obs_mean" in a:
            x = np.clip((x - a["obs_mean"]) / a["obs_std"], -a["obs_clip"], a["obs_clip"])
        for i in range(self._depth - 1):
            x = _rows(x, a[f"W{i}"], a[f"b{i}"])
            x = np.maximum(x, 0) if a["relu"] else np.tanh(x)
        return x, _rows(x, a[f"W{self._depth - 1}"], a[f"b{self._depth - 1}"])

    def _log_std(self, hidden: np.ndarray) -> np.ndarray:
        a = self._arrays
        if "log_std" in a:
            return np.broadcast_to(a["log_std"], (len(hidden), len(a["log_std"])))
        return np.clip(_rows(hidden, a["log_std_W"], a["log_std_b"]), -20, 2)


def _rows(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """weight @ x + bias for each row alone: one product of all rows rounds by their number."""
    return np.matmul(x[:, None], weight.T)[:, 0] + bias


def _log_density_squashed(u: np.ndarray, mean: np.ndarray, log_std: np.ndarray) -> np.ndarray:
    """Of tanh(u), by component: log N(u) - log(1 - tanh(u)^2), the latter in its stable form."""
    gaussian = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return gaussian - 2 * (np.log(2.0) - u - np.logaddexp(0.0, -2 * u))


def _log_density_clipped(u: np.ndarray, mean: np.ndarray, log_std: np.ndarray) -> np.ndarray:
    """Of clip(u, -1, 1), by component: a density inside, the mass of the tail on a bound."""
    from scipy.special import log_ndtr

    std = np.exp(log_std)
    gaussian = -0.5 * ((u - mean) / std) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    below, above = log_ndtr((-1 - mean) / std), log_ndtr((mean - 1) / std)
    return np.where(u <= -1, below, np.where(u >= 1, above, gaussian))


# Reading -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by name.

    Raises:
        UserError: there is no such file, or it is no .npz of plain arrays (nothing in it is executed).
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds a single array.")
        with loaded as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read the actor {path}: {error} It has to be an .npz file of plain arrays.") from None


def _check(path: Path, arrays: dict[str, np.ndarray], spec: Spec, mode: Mode) -> int:
    """The number of layers, after a look at every array."""
    depth = 0
    while f"W{depth}" in arrays:
        depth += 1
    layers = [f"{kind}{i}" for i in range(max(depth, 1)) for kind in "Wb"]
    needed = [*layers, *_SCALARS]
    if "obs_mean" in arrays:
        needed += ["obs_std", "obs_clip"]
    if "log_std_W" in arrays:
        needed += ["log_std_b"]
    elif mode == "stochastic":
        needed += ["log_std"]
    for name in needed:
        if name not in arrays:
            raise UserError(f"{path}: the array {name!r} is missing. {_FORMAT}")
    for name, array in arrays.items():
        if name not in (*layers, *_SCALARS, *_OPTIONAL):
            raise UserError(
                f"{path}: unknown array {name!r}; {did_you_mean(name, (*layers, *_SCALARS, *_OPTIONAL))} {_FORMAT}"
            )
        if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise UserError(f"{path}: the array {name!r} holds what is no finite number. {_FORMAT}")
    _check_widths(path, arrays, spec, depth)
    return depth


def _check_widths(path: Path, arrays: dict[str, np.ndarray], spec: Spec, depth: int) -> None:
    for i in range(depth):
        if arrays[f"W{i}"].ndim != 2:
            raise UserError(f"{path}: 'W{i}' has shape {arrays[f'W{i}'].shape}, not (out, in). {_FORMAT}")
    takes, gives = arrays["W0"].shape[1], arrays[f"W{depth - 1}"].shape[0]
    for name, width, theirs, what in (
        ("W0", takes, spec.obs_width, "an observation"),
        (f"W{depth - 1}", gives, spec.action_width, "an action"),
    ):
        if width != theirs:
            raise UserError(
                f"{path}: {name!r} is made for {what} of width {width}, but in this environment it has {theirs}: "
                "take the actor of this environment, or the environment of this actor."
            )
    hidden = arrays[f"W{depth - 1}"].shape[1]
    shapes: dict[str, tuple[int, ...]] = {"relu": (), "squash": (), "obs_clip": ()}
    shapes |= {"obs_mean": (takes,), "obs_std": (takes,), "log_std": (gives,)}
    shapes |= {"log_std_W": (gives, hidden), "log_std_b": (gives,)}
    for i in range(depth):
        into = takes if i == 0 else arrays[f"W{i - 1}"].shape[0]
        shapes |= {f"W{i}": (arrays[f"W{i}"].shape[0], into), f"b{i}": (arrays[f"W{i}"].shape[0],)}
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise UserError(f"{path}: the array {name!r} has shape {arrays[name].shape}, not {shape}. {_FORMAT}")
    if (arrays.get("obs_std", np.ones(1)) <= 0).any():
        raise UserError(f"{path}: the array 'obs_std' is not positive everywhere. {_FORMAT}")
