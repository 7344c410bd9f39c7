"""What on-policy algorithms do with a rollout: its single steps, minibatches of them, statistics of all processes.

A rollout is a batch of pieces of episodes, B windows of H steps, of which those past the end of a piece are not valid.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Batch, Spec

Sum = Callable[[Tensor], Tensor]
"""Over processes: `Step.sum`."""


def unit_actions(spec: Spec, batch: Batch) -> Tensor:
    """The actions [B, H, U] in unit space; where a step is not valid, that of the window's first."""
    action = batch.action[:, :, 0]
    return spec.to_unit(torch.where(batch.valid[..., None], action, action[:, :1]))


def single_steps(batch: Batch, returns: Tensor) -> Batch:
    """The n valid steps as windows of one step, with keys of their own; their `returns` are those given [B, H]."""
    pairs = torch.stack([batch.obs[:, :-1], batch.obs[:, 1:]], 2)
    keys = seeding.split(batch.key, batch.valid.shape[1])
    rows = (batch.action, batch.reward, batch.terminal, batch.valid, returns, batch.log_prob)
    columns = (None if x is None else x[batch.valid][:, None] for x in rows)
    return Batch(pairs[batch.valid], *columns, keys[batch.valid])  # type: ignore[arg-type,call-arg]


def minibatches(steps: Batch, count: int, epoch: int, add_up: Sum) -> Iterator[Batch]:
    """`count` parts of single steps [n], without those that are empty in all processes.

    The part of a step is a hash of its key, so that any number of processes makes the same parts; their sizes vary.
    """
    part = seeding.integers(steps.key, count, stream=epoch)
    for i, size in enumerate(add_up(torch.bincount(part, minlength=count)).tolist()):
        if size:
            yield Batch(*(None if x is None else x[part == i] for x in steps))  # type: ignore[arg-type]


def standardised(x: Tensor, valid: Tensor, add_up: Sum) -> Tensor:
    """x [B, H] shifted and scaled to mean 0 and variance 1 over the valid steps of all processes."""
    x = x - mean(x, valid, add_up)
    return x / mean(x.square(), valid, add_up).sqrt().clamp(min=1e-8)


def mean(x: Tensor, valid: Tensor, add_up: Sum) -> Tensor:
    """The mean of x [B, H] over the valid steps of all processes."""
    total, count = add_up(torch.stack([x[valid].sum(), valid.sum().to(x)]))
    return total / count
