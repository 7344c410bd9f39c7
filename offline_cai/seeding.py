"""Random draws that are pure functions of a key.

A draw that depends on a generator's state depends on everything drawn before it: on the number of processes, on a
resume, on the order of two lines of code. Here each sample carries a 64-bit key made of (seed, step, global position),
and noise is a hash of that key. So one process and many draw the same noise, and a resumed run is the same run.
"""

import math
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_Words = TypeVar("_Words", Tensor, np.ndarray)
"""64-bit words, whose products wrap: uint64 in NumPy, int64 of the same bits in torch, which multiplies no uint64."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_CONSTANTS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SIGNED, _UNSIGNED = tuple(map(_signed, _CONSTANTS)), tuple(np.array(c, dtype=np.uint64) for c in _CONSTANTS)


def _constants(x: Tensor | np.ndarray) -> tuple[Any, ...]:
    return _SIGNED if isinstance(x, Tensor) else _UNSIGNED


def _down(x: _Words, bits: int) -> _Words:
    """x moved right, zeros coming in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1) if isinstance(x, Tensor) else x >> bits


def _mix(x: _Words) -> _Words:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    _, one, two = _constants(x)
    x = x ^ _down(x, 30)
    x *= one
    x ^= _down(x, 27)
    x *= two
    x ^= _down(x, 31)
    return x


def key(seed: int, *parts: int) -> int:
    """One signed 64-bit key from a seed and any integers, for example (seed, step)."""
    return _signed(int(_sequence(seed, *parts).generate_state(1, np.uint64)[0]))


@lru_cache(maxsize=1)  # a batch asks for a generator, and for keys
def _sequence(*parts: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(_words(*parts))


def _words(*parts: int) -> np.ndarray:
    """Two 32-bit words for each part, and their number: NumPy joins the words, so other cuts of them would collide."""
    words = [word for part in map(int, parts) for word in ((part & _MASK) >> 32, part & 0xFFFFFFFF)]
    return np.array([len(parts), *words], dtype=np.uint32)


def seed_of(seed: int, *parts: int) -> int:
    """A seed in [0, 2^31) for libraries that take one, such as Gymnasium's reset."""
    return key(seed, *parts) & 0x7FFFFFFF


def keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """The keys [B] of the samples at `positions` [B], on the CPU, of the global batch of `step`."""
    words = positions.numpy().astype(np.uint64) * _UNSIGNED[0] + (key(seed, step) & _MASK)
    return torch.from_numpy(_mix(words).view(np.int64))


def split(keys: Tensor, count: int) -> Tensor:
    """`count` new keys for each of B keys: int64 [B, count], the first keys the same whatever the count."""
    return _mix(_mix(keys)[:, None] + torch.arange(1, count + 1, device=keys.device) * _SIGNED[0])


def rng(seed: int, *parts: int) -> np.random.Generator:
    """A NumPy generator for (seed, *parts): draws that are not per sample, such as which rows make a batch."""
    return np.random.default_rng(_sequence(seed, *parts))


@cache
def _of_stream(stream: int) -> int:
    return key(stream) & _MASK


def _hash(keys: _Words, counter: _Words, stream: int) -> _Words:
    """53 random bits [B, count]."""
    golden, *_ = _constants(keys)
    own = _of_stream(stream)
    return _down(_mix(_mix(keys + (_signed(own) if isinstance(keys, Tensor) else own))[:, None] + counter * golden), 11)


def _by_numpy(keys: Tensor) -> bool:
    """On the CPU, where its small operations cost less than torch's; a compiler has to see those."""
    return keys.device.type == "cpu" and not torch.compiler.is_compiling()


def uniform(keys: Tensor, shape: tuple[int, ...] = (), stream: int = 0) -> Tensor:
    """Uniform draws in (0, 1): float64 [B, *shape], one row per key; equal arguments give equal draws."""
    count = math.prod(shape)
    if _by_numpy(keys):
        u = torch.from_numpy(_uniform(keys.numpy(), count, stream))
    else:
        counter = torch.arange(1, count + 1, device=keys.device)
        u = _hash(keys, counter, stream).double().add_(0.5).mul_(2.0**-53)
    return u.view(len(keys), *shape)


def _uniform(keys: np.ndarray, count: int, stream: int) -> np.ndarray:
    """float64 [B, count]."""
    u = _hash(keys.view(np.uint64), np.arange(1, count + 1, dtype=np.uint64), stream).astype(np.float64)
    u += 0.5
    u *= 2.0**-53
    return u


def normal(keys: Tensor, shape: tuple[int, ...] = (), stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws [B, *shape], one row per key, by the Box-Muller transform. Streams are independent."""
    if _by_numpy(keys):
        count = math.prod(shape)
        one, two = _uniform(keys.numpy(), 2 * count, stream).reshape(len(keys), 2, count).swapaxes(0, 1)
        z = np.log(one)
        z *= -2
        np.sqrt(z, out=z)
        z *= np.cos(2 * math.pi * two)
        return torch.from_numpy(z).to(dtype).view(len(keys), *shape)
    u = uniform(keys, (2, *shape), stream)
    return (torch.sqrt(-2 * torch.log(u[:, 0])) * torch.cos(2 * math.pi * u[:, 1])).to(dtype)


def integers(keys: Tensor, high: int, shape: tuple[int, ...] = (), stream: int = 0) -> Tensor:
    """Uniform integers in [0, high): int64 [B, *shape], one row per key."""
    return (uniform(keys, shape, stream) * high).long().clamp_(max=high - 1)
