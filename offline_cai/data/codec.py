"""Normalisers and the codec: the only place that knows units, selected fields, stride and the order of a row.

Both keep their numbers as buffers, so they travel with the weights and an exported model acts without its dataset.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from offline_cai.core import Batch, Spec

NormaliserKind = Literal["limits", "gaussian"]


class Normaliser(nn.Module):
    """x -> (x - shift) / scale, per column. `limits` maps the data's range to [-1, 1], `gaussian` gives unit variance.

    A column that does not vary gets scale 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int, kind: NormaliserKind = "limits") -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, data: np.ndarray) -> None:
        """Set the statistics from data [M, width]."""
        data = np.asarray(data, dtype=np.float64)
        if self.kind == "limits":
            low, high = data.min(0), data.max(0)
            shift, scale = (low + high) / 2, (high - low) / 2
        else:
            shift, scale = data.mean(0), data.std(0)
        scale = np.where(scale > 1e-6 * np.maximum(1, np.abs(shift)), scale, 1.0)
        self.shift.copy_(torch.from_numpy(shift))
        self.scale.copy_(torch.from_numpy(scale))

    def encode(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale

    def decode(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Codec(nn.Module):
    """Windows in raw units <-> rows [B, R, D] that a trajectory model sees.

    Row j is [the k actions of block j, the selected observation at time t + j*k]; the actions come first, as in
    Diffuser (Janner et al. 2022), and may be left out. R is the horizon: the state after the last block belongs to the
    next window.
    """

    def __init__(
        self,
        spec: Spec,
        rows: int,
        stride: int = 1,
        fields: Sequence[str] = (),
        actions: bool = True,
        normaliser: NormaliserKind = "limits",
    ) -> None:
        super().__init__()
        self.rows, self.stride = rows, stride
        self.columns = spec.columns(*(fields or [field.name for field in spec.obs]))
        self.action_width = spec.action_width
        self.actions = stride * spec.action_width if actions else 0
        self.width = self.actions + len(self.columns)
        self.obs_norm = Normaliser(len(self.columns), normaliser)
        self.action_norm = Normaliser(spec.action_width, normaliser)

    def fit(self, obs: np.ndarray, action: np.ndarray) -> None:
        """Set the normalisers from rows obs [M, O] and actions [M', A]."""
        self.obs_norm.fit(obs[:, self.columns])
        self.action_norm.fit(action)

    def encode(self, batch: Batch) -> Tensor:
        x = self.encode_obs(batch.obs[:, : self.rows])
        if not self.actions:
            return x
        return torch.cat([rearrange(self.action_norm.encode(batch.action), "b h k a -> b h (k a)"), x], dim=-1)

    def encode_obs(self, obs: Tensor) -> Tensor:
        """Observations [..., O] to their part of a row [..., D - k*A]."""
        return self.obs_norm.encode(obs[..., self.columns])

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [N, R, D] to selected observations [N, R, O'] and actions [N, R, k, A], None if rows hold none."""
        obs = self.obs_norm.decode(x[..., self.actions :])
        if not self.actions:
            return obs, None
        action = rearrange(x[..., : self.actions], "n r (k a) -> n r k a", a=self.action_width)
        return obs, self.action_norm.decode(action)
