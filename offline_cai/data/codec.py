"""Normalisers and the codec: the only place that knows units, selected fields, stride and the order of a row.

Both keep their numbers as buffers, so they travel with the weights and an exported model acts without its dataset.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from offline_cai.core import Batch, Chunks, Spec

NormaliserKind = Literal["limits", "gaussian", "quantile", "none"]
KNOTS = 257  # of the quantile normaliser
SHORTEST, LONGEST = 4.0, 1024.0  # steps of segments
SAMPLE = 1 << 17  # rows that its quantiles are taken from, evenly spread over the data


class Normaliser(nn.Module):
    """A monotone map per column, fitted in one pass; `decode` inverts `encode`.

    - limits: the data's range to [-1, 1]. gaussian: zero mean and unit variance. none: as it is.
    - quantile: the empirical distribution function, scaled to [-1, 1] and linear between KNOTS quantiles of SAMPLE
      rows; beyond the data it goes on with slope 1 in units of half the data's range. A value that holds much of the
      mass (a flat stretch of the quantiles) maps to the middle of its stretch, and back to itself.

    A column that does not vary is shifted to zero with scale 1.
    """

    shift: Tensor
    scale: Tensor
    knots: Tensor  # [columns, KNOTS], values; of the quantile normaliser only
    levels: Tensor  # [columns, KNOTS], where they map to

    def __init__(self, width: int, kind: NormaliserKind = "limits") -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        if kind == "quantile":
            self.register_buffer("knots", torch.linspace(-1, 1, KNOTS).repeat(width, 1))
            self.register_buffer("levels", torch.linspace(-1, 1, KNOTS).repeat(width, 1))

    def fit(self, parts: Iterable[np.ndarray]) -> None:
        """Set the statistics from the parts [m, width] of the data, one after the other."""
        if self.kind == "none":
            return
        moments, sample = Moments(), Sample()
        for part in parts:
            moments.add(part.astype(np.float64))
            if self.kind == "quantile":
                sample.add(part)
        centre, spread = moments.limits() if self.kind in ("limits", "quantile") else moments.gaussian()
        scale = np.where(spread > 1e-6 * np.maximum(1, np.abs(centre)), spread, 1.0)
        self.scale.copy_(torch.from_numpy(scale))
        if self.kind != "quantile":
            self.shift.copy_(torch.from_numpy(centre))
        else:  # in raw units: a shift would round away the small values of a heavy-tailed column
            for column, values in enumerate(sample.rows().T):
                knots, levels = _distribution(values.astype(np.float64), scale[column])
                self.knots[column].copy_(torch.from_numpy(knots))
                self.levels[column].copy_(torch.from_numpy(levels))

    def encode(self, x: Tensor) -> Tensor:
        if self.kind == "quantile":
            return _piecewise(x, self.knots, self.levels, 1 / self.scale)
        return (x - self.shift) / self.scale

    def decode(self, x: Tensor) -> Tensor:
        if self.kind == "quantile":
            return _piecewise(x, self.levels, self.knots, self.scale)
        return x * self.scale + self.shift


class Moments:
    """Count, mean, squared deviations and range of columns, part by part (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, np.zeros(1), np.zeros(1)
        self.low, self.high = np.array([np.inf]), np.array([-np.inf])

    def add(self, part: np.ndarray) -> None:
        if not len(part):
            return
        delta, total = part.mean(0) - self.mean, self.count + len(part)
        self.square = self.square + len(part) * part.var(0) + delta**2 * self.count * len(part) / total
        self.mean, self.count = self.mean + delta * len(part) / total, total
        self.low, self.high = np.minimum(self.low, part.min(0)), np.maximum(self.high, part.max(0))

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        return (self.low + self.high) / 2, (self.high - self.low) / 2

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean, np.sqrt(self.square / max(self.count, 1))


class Sample:
    """Every 2^j-th row of what is added, at most SAMPLE of them: j grows with the data."""

    def __init__(self) -> None:
        self._step, self._seen, self._kept = 1, 0, []  # type: ignore[var-annotated]

    def add(self, part: np.ndarray) -> None:
        self._kept.append(np.array(part[-self._seen % self._step :: self._step]))
        self._seen += len(part)
        while sum(len(kept) for kept in self._kept) > SAMPLE:
            self._kept, self._step = [np.concatenate(self._kept)[::2]], self._step * 2

    def rows(self) -> np.ndarray:
        return np.concatenate(self._kept)


def _distribution(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Increasing knots [KNOTS] and their levels in [-1, 1]: the quantiles, each flat stretch drawn to its middle."""
    quantiles, levels = np.quantile(values, np.linspace(0, 1, KNOTS)), np.linspace(-1, 1, KNOTS)
    knots, inverse = np.unique(quantiles, return_inverse=True)
    middle = np.bincount(inverse, weights=levels) / np.bincount(inverse)
    if len(knots) == 1:
        knots, middle = np.array([knots[0] - scale, knots[0], knots[0] + scale]), np.array([-1.0, 0.0, 1.0])
    at = np.linspace(0, len(knots) - 1, KNOTS)  # the same number of knots for each column: the rest lie between
    return np.interp(at, np.arange(len(knots)), knots), np.interp(at, np.arange(len(knots)), middle)


def _piecewise(x: Tensor, knots: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    """x [..., C] through the piecewise linear map from knots [C, K] to values [C, K], with slope [C] outside."""
    flat = x.reshape(-1, x.shape[-1]).T.contiguous()
    right = torch.searchsorted(knots, flat, right=True).clamp(1, knots.shape[1] - 1)
    x0, x1 = knots.gather(1, right - 1), knots.gather(1, right)
    y0, y1 = values.gather(1, right - 1), values.gather(1, right)
    inside = y0 + (flat - x0) * ((y1 - y0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny))
    low, high = knots[:, :1], knots[:, -1:]
    above = torch.where(flat > high, values[:, -1:] + (flat - high) * slope[:, None], inside)
    out = torch.where(flat < low, values[:, :1] + (flat - low) * slope[:, None], above)
    return out.T.reshape(x.shape)


class Codec(nn.Module):
    """Windows in raw units <-> rows [B, R, D] that a trajectory model sees.

    Row j is [the k actions of block j, the selected observation at time t + j*k]; the actions come first, as in
    Diffuser (Janner et al. 2022), and may be left out. R is the horizon: the state after the last block belongs to the
    next window. With `span` rows are those of a resampled segment, and end in the logarithm of its steps: one number
    that every row repeats, from -1 at SHORTEST to 1 at LONGEST steps.
    """

    def __init__(
        self,
        spec: Spec,
        rows: int,
        stride: int = 1,
        fields: Sequence[str] = (),
        actions: bool = True,
        normaliser: NormaliserKind = "limits",
        span: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.stride, self.span = rows, stride, span
        self.columns = spec.columns(*(fields or [field.name for field in spec.obs]))
        self.action_width = spec.action_width
        self.actions = stride * spec.action_width if actions else 0
        self.width = self.actions + len(self.columns) + span
        self.obs_norm = Normaliser(len(self.columns), normaliser)
        self.action_norm = Normaliser(spec.action_width, normaliser)

    def fit(self, chunks: Chunks) -> None:
        """Set the normalisers in one pass over the data for each."""
        self.obs_norm.fit(chunk.obs[:, self.columns] for chunk in chunks())
        if self.actions:
            self.action_norm.fit(chunk.action for chunk in chunks())

    def encode(self, batch: Batch) -> Tensor:
        x = self.encode_obs(batch.obs[:, : self.rows])
        if self.span:
            assert batch.span is not None
            x = torch.cat([x, self.encode_steps(batch.span.to(x))[:, None, None].expand(-1, self.rows, 1)], dim=-1)
        if not self.actions:
            return x
        return torch.cat([rearrange(self.action_norm.encode(batch.action), "b h k a -> b h (k a)"), x], dim=-1)

    def encode_obs(self, obs: Tensor) -> Tensor:
        """Observations [..., O] to their part of a row [..., O']."""
        return self.obs_norm.encode(obs[..., self.columns])

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [N, R, D] to selected observations [N, R, O'] and actions [N, R, k, A], None if rows hold none."""
        obs = self.obs_norm.decode(x[..., self.state])
        if not self.actions:
            return obs, None
        action = rearrange(x[..., : self.actions], "n r (k a) -> n r k a", a=self.action_width)
        return obs, self.action_norm.decode(action)

    @property
    def state(self) -> slice:
        """The columns of a row that hold the observation."""
        return slice(self.actions, self.actions + len(self.columns))

    def encode_steps(self, steps: Tensor) -> Tensor:
        """Steps of segments, one at least, to what their rows say of them, same shape."""
        return (steps.clamp(min=1) / SHORTEST).log() / math.log(LONGEST / SHORTEST) * 2 - 1

    def steps(self, x: Tensor) -> Tensor:
        """The steps of the segment that rows [..., R, D] say they make, [..., R]."""
        return SHORTEST * ((x[..., -1] + 1) / 2 * math.log(LONGEST / SHORTEST)).exp()
