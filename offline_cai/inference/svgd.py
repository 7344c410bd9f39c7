"""Stein variational gradient: move particles toward a density known by its score alone (Liu & Wang 2016; torch).

Kernel, particles and score must live in one space. In u = atanh(action) the score is that of
Q(tanh u) / temperature + Σ log(1 - tanh² u); in action space it is that of Q / temperature, without the Jacobian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 1e-3  # of the bandwidth: particles that coincide would make it zero


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|² for x `[..., K, D]` and y `[..., M, D]`, `[..., K, M]`."""
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


def median_bandwidth(x: Tensor, y: Tensor | None = None) -> Tensor:
    """h = median(d²) / log K, at least 1e-3, `[...]`, over the K particles x `[..., K, D]`.

    The (lower) median is over pairs of different particles, or over all pairs with y `[..., M, D]` when given.
    With this h the kernel values of a particle's neighbours sum to about one.

    Raises:
        ValueError: fewer than two particles.
    """
    count = x.shape[-2]
    if count < 2:
        raise ValueError(f"particles: the median heuristic needs at least two, got {count}; give a bandwidth instead")
    distance = squared_distances(x, x if y is None else y)
    if y is None:
        row, column = torch.triu_indices(count, count, 1)
        distance = distance[..., row, column]
    return (distance.flatten(x.ndim - 2).median(-1).values / math.log(count)).clamp(min=FLOOR)


def stein_direction(
    particles: Tensor, score: Tensor, at: Tensor | None = None, bandwidth: Tensor | float | None = None
) -> Tensor:
    """phi(y_j) = 1/K Σ_i [ k(x_i, y_j) score_i + ∇_{x_i} k(x_i, y_j) ] with k(x, y) = exp(-|x - y|² / h).

    The direction of steepest descent of KL(particles ‖ density) among unit-norm fields of the kernel's space.

    Args:
        particles: x, `[..., K, D]`, where the score is known.
        score: ∇ log p(x_i), `[..., K, D]`; up to no constant, so log p need not be normalised.
        at: y, `[..., M, D]`, where the direction is wanted; None is the particles themselves. (Soft Q-learning draws
            fixed particles x and updates others.)
        bandwidth: h, a number or `[...]`; None is the median heuristic, taken as a constant.

    Returns:
        `[..., M, D]`; no gradient flows through the kernel.

    Raises:
        ValueError: score of another shape than the particles, a bandwidth that is not positive (a number; a tensor is
            taken as it is), or fewer than two particles for the median heuristic.
    """
    if score.shape != particles.shape:
        raise ValueError(f"score: expected the particles' shape {list(particles.shape)}, got {list(score.shape)}")
    if not (bandwidth is None or isinstance(bandwidth, Tensor) or 0 < bandwidth < math.inf):
        raise ValueError(f"bandwidth: expected a positive finite number, got {bandwidth}")
    x, y = particles.detach(), (particles if at is None else at).detach()
    h = median_bandwidth(x, None if at is None else y) if bandwidth is None else bandwidth
    h = torch.as_tensor(h, dtype=x.dtype, device=x.device)[..., None, None]
    kernel = (-squared_distances(x, y) / h).exp()
    attract = kernel.mT @ score
    repel = 2 / h * (kernel.sum(-2)[..., None] * y - kernel.mT @ x)
    return (attract + repel) / x.shape[-2]
