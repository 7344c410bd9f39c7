"""Multi-step returns over windows of one episode each (torch).

reward, terminal and valid are `[B, H]`, value is `[B, H+1]`: the state after every row is always there. Only a true end
(`terminal`) stops bootstrapping; a window that merely stops (time-out, end of the window, padding after `valid`)
bootstraps from the value of the state it stopped in. Rows that are not valid come back as zero. `discount` is per row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor, value: Tensor, terminal: Tensor, discount: float, trace: float, valid: Tensor | None = None
) -> Tensor:
    """Generalised advantages Σ_k (discount · trace)^k delta_{t+k}, `[B, H]` (Schulman et al. 2016, equation 16).

    delta_t = r_t + discount · (1 - terminal_t) · V_{t+1} - V_t.

    Raises:
        ValueError: a shape that does not fit; the message names the argument.
    """
    _check(reward, value, {"terminal": terminal, "valid": valid})
    live = discount * (~terminal.bool()).to(reward.dtype)
    delta = reward + discount * _ahead(value, terminal) - value[:, :-1]
    return _accumulate(delta, trace * live, valid)


def td_lambda(
    reward: Tensor, value: Tensor, terminal: Tensor, discount: float, trace: float, valid: Tensor | None = None
) -> Tensor:
    """TD(lambda) returns, `[B, H]`: the (1 - trace) trace^(n-1) mixture of n-step returns, `gae` + V.

    trace = 0 is the one-step target; trace = 1 the discounted sum up to the end, bootstrapped if the end is not true.

    Raises:
        ValueError: a shape that does not fit; the message names the argument.
    """
    advantage = gae(reward, value, terminal, discount, trace, valid)
    return _masked(advantage + value[:, :-1], valid)


def retrace(
    reward: Tensor,
    q: Tensor,
    value: Tensor,
    terminal: Tensor,
    log_ratio: Tensor,
    discount: float,
    trace: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Retrace targets for Q(s_t, a_t), `[B, H]` (Munos et al. 2016), unbiased for any behaviour when Q is right.

    q `[B, H]` is Q(s_t, a_t) and value `[B, H+1]` is E_policy Q(s_t, ·) (plus its entropy, for soft values).
    log_ratio `[B, H]` is log policy(a_t | s_t) - log behaviour(a_t | s_t), cut at 0: c_t = trace · min(1, ratio_t).

    Raises:
        ValueError: a shape that does not fit; the message names the argument.
    """
    _check(reward, value, {"q": q, "terminal": terminal, "log_ratio": log_ratio, "valid": valid})
    live = discount * (~terminal.bool()).to(reward.dtype)
    delta = reward + discount * _ahead(value, terminal) - q
    cut = _masked(trace * log_ratio.clamp(max=0).exp(), valid)
    onward = live * torch.cat([cut[:, 1:], torch.zeros_like(cut[:, :1])], 1)
    return _masked(q + _accumulate(delta, onward, valid), valid)


def _ahead(value: Tensor, terminal: Tensor) -> Tensor:
    """The value after each row, zero after a true end, whatever stands there."""
    return torch.where(terminal.bool(), torch.zeros_like(value[:, 1:]), value[:, 1:])


def _accumulate(delta: Tensor, onward: Tensor, valid: Tensor | None) -> Tensor:
    """x_t = delta_t + onward_t · x_{t+1}, zero where not valid."""
    delta, onward = _masked(delta, valid), _masked(onward, valid)
    x, columns = torch.zeros_like(delta[:, 0]), []
    for t in reversed(range(delta.shape[1])):
        x = delta[:, t] + onward[:, t] * x
        columns.append(x)
    return torch.stack(columns[::-1], 1)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else torch.where(valid.bool(), x, torch.zeros_like(x))


def _check(reward: Tensor, value: Tensor, rows: dict[str, Tensor | None]) -> None:
    """ValueError unless reward is `[B, H]`, value `[B, H+1]` and each of the rows is missing or `[B, H]`."""
    if reward.ndim != 2 or reward.shape[1] == 0:
        raise ValueError(f"reward: expected [B, H] with H of at least 1, got {list(reward.shape)}")
    batch, horizon = reward.shape
    if tuple(value.shape) != (batch, horizon + 1):
        wanted = f"[B, H+1] = [{batch}, {horizon + 1}]"
        raise ValueError(f"value: expected {wanted}, with the value after the last row, got {list(value.shape)}")
    for name, row in rows.items():
        if row is not None and row.shape != reward.shape:
            raise ValueError(f"{name}: expected [B, H] = {list(reward.shape)}, got {list(row.shape)}")
