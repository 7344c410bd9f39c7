"""Random draws that are pure functions of a key.

A draw that depends on a generator's state depends on everything drawn before it: on the number of processes, on a
resume, on the order of two lines of code. Here each sample carries a 64-bit key made of (seed, step, global position),
and noise is a hash of that key. So one process and many draw the same noise, and a resumed run is the same run.
"""

import math
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_Int64 = TypeVar("_Int64", Tensor, np.ndarray)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: _Int64) -> _Int64:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on int64, whose products wrap as uint64's do."""
    x = x ^ ((x >> 30) & ((1 << 34) - 1))
    x *= _MIX1
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _MIX2
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def key(seed: int, *parts: int) -> int:
    """One signed 64-bit key from a seed and any integers, for example (seed, step)."""
    return _signed(int(np.random.SeedSequence(_words(seed, *parts)).generate_state(1, np.uint64)[0]))


def _words(*parts: int) -> np.ndarray:
    """Two 32-bit words for each part, and their number: NumPy joins the words, so other cuts of them would collide."""
    words = [word for part in map(int, parts) for word in ((part & _MASK) >> 32, part & 0xFFFFFFFF)]
    return np.array([len(parts), *words], dtype=np.uint32)


def seed_of(seed: int, *parts: int) -> int:
    """A seed in [0, 2^31) for libraries that take one, such as Gymnasium's reset."""
    return key(seed, *parts) & 0x7FFFFFFF


def keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """The keys [B] of the samples at `positions` [B], on the CPU, of the global batch of `step`."""
    return torch.from_numpy(_mix(positions.to(torch.int64).numpy() * _GOLDEN + key(seed, step)))


def split(keys: Tensor, count: int) -> Tensor:
    """`count` new keys for each of B keys: int64 [B, count], the first keys the same whatever the count."""
    return _mix(_mix(keys)[:, None] + torch.arange(1, count + 1, device=keys.device) * _GOLDEN)


def rng(seed: int, *parts: int) -> np.random.Generator:
    """A NumPy generator for (seed, *parts): draws that are not per sample, such as which rows make a batch."""
    return np.random.default_rng(_words(seed, *parts))


@cache
def _of_stream(stream: int) -> int:
    return _signed(key(stream) & _MASK)


def _bits(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """53 random bits as int64 [B, *shape]; hashed by NumPy on the CPU, whose small operations cost less."""
    count = math.prod(shape)
    if keys.device.type == "cpu":
        bits = torch.from_numpy(_hash(keys.numpy(), np.arange(1, count + 1), stream))
    else:
        bits = _hash(keys, torch.arange(1, count + 1, device=keys.device), stream)
    return bits.view(len(keys), *shape)


def _hash(keys: _Int64, counter: _Int64, stream: int) -> _Int64:
    bits = _mix(_mix(keys + _of_stream(stream))[:, None] + counter * _GOLDEN)
    bits >>= 11
    bits &= (1 << 53) - 1
    return bits


def uniform(keys: Tensor, shape: tuple[int, ...] = (), stream: int = 0) -> Tensor:
    """Uniform draws in (0, 1): float64 [B, *shape], one row per key; equal arguments give equal draws."""
    return _bits(keys, shape, stream).double().add_(0.5).mul_(2.0**-53)


def normal(keys: Tensor, shape: tuple[int, ...] = (), stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws [B, *shape], one row per key, by the Box-Muller transform. Streams are independent."""
    u = uniform(keys, (2, *shape), stream)
    if keys.device.type == "cpu":
        radius, angle = u.numpy()[:, 0], u.numpy()[:, 1]
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        angle *= 2 * math.pi
        np.cos(angle, out=angle)
        return torch.from_numpy(radius * angle).to(dtype)
    return (torch.sqrt(-2 * torch.log(u[:, 0])) * torch.cos(2 * math.pi * u[:, 1])).to(dtype)


def integers(keys: Tensor, high: int, shape: tuple[int, ...] = (), stream: int = 0) -> Tensor:
    """Uniform integers in [0, high): int64 [B, *shape], one row per key."""
    return (uniform(keys, shape, stream) * high).long().clamp_(max=high - 1)
