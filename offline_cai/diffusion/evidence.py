"""Evidence: how much a trajectory is worth, in nats. The guides own its gradients (`guidance.py`).

A reward counts in the environment's units and is divided by the temperature; goals and constraints (`constraints.py`)
are statements of their own, in nats already. `together` adds evidence; `InUnits` lets it look at raw observations
instead of a model's rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from offline_cai.data.codec import Codec
from offline_cai.errors import UserError
from offline_cai.inference.temperatures import temperature_for_kl


def require_temperature(temperature: float) -> None:
    """
    Raises:
        UserError: it is not a positive finite number.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}; take a positive number: units of reward per nat.")


def require_finite(what: str, *numbers: float) -> None:
    """
    Raises:
        UserError: one of them is infinite or not a number.
    """
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{what} is {', '.join(map(str, numbers))}; give finite numbers.")


class Evidence(Protocol):
    """Log-evidence in nats of each of N trajectories: of a trajectory it is a function of its own rows alone."""

    @property
    def noisy(self) -> bool:
        """Whether it was learned for x_k and reads k; if not, it is about x_0."""
        ...

    @property
    def quadratic(self) -> bool:
        """Whether its second derivative is the same everywhere, so that one linear solve weighs it."""
        ...

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor: ...  # [N, R, D], [N] int64 -> [N]


@dataclass(frozen=True)
class Return:
    """What a differentiable function says a trajectory earns: a return, an analytic reward, anything of the user's."""

    function: Callable[[Tensor], Tensor]
    """Rows [N, R, D] to [N], in units of reward. `inference.gaussian.QuadraticReward` is one."""
    quadratic: bool = False
    noisy: ClassVar[bool] = False

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        """
        Raises:
            UserError: the function gives other than one number for each trajectory, or what is not a number.
        """
        value = self.function(x)
        if value.shape != x.shape[:1]:
            raise UserError(
                f"the reward gives a tensor of shape {list(value.shape)} for {len(x)} trajectories: give one number "
                "for each, summed over its rows."
            )
        if value.isnan().any():
            raise UserError("the reward is not a number (NaN) for a trajectory that the model proposes: mend it there.")
        return value / temperature


@dataclass(frozen=True)
class Learned:
    """A network's evidence for noised rows: log E[exp(return / temperature) | x_k], or what stands in for it.

    A value network, regressed on returns as Diffuser's, gives E[return | x_k] / temperature: too small (Jensen).
    """

    function: Callable[[Tensor, Tensor, float], Tensor]
    """Rows [N, R, D], levels [N] and the temperature to nats [N]."""
    made_for: str
    """`fingerprint` of what it was trained beside: schedule, codec, known rows."""
    noisy: ClassVar[bool] = True
    quadratic: ClassVar[bool] = False

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return self.function(x, k, temperature)

    def check(self, made_for: str) -> None:
        """
        Raises:
            UserError: it was trained beside another schedule, codec or other known rows than `made_for` tells.
        """
        if self.made_for != made_for:
            raise UserError(
                f"this learned evidence belongs to a model of fingerprint {self.made_for[:8]}, and the denoiser's is "
                f"{made_for[:8]}: their weights, noise schedule, codec or known rows differ. Train it again beside it."
            )


def fingerprint(**parts: Tensor | nn.Module) -> str:
    """A hash of tensors and of modules' buffers and weights: equal for models whose noised rows mean the same."""
    found = hashlib.sha256()
    for name, part in sorted(parts.items()):
        tensors = {"": part} if isinstance(part, Tensor) else part.state_dict()
        for key, tensor in sorted(tensors.items()):
            found.update(f"{name}.{key} {list(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Goal:
    """A row's columns are near a target: -½ |x - target|² / width², nats; with `row` None, in the mean over rows.

    A goal that has to be met exactly is no evidence but a known number (`core.Known`).
    """

    target: tuple[float, ...]
    """In the rows' units, one number for each column."""
    columns: tuple[int, ...]
    width: float
    """The distance that costs half a nat, in the rows' units."""
    row: int | None = -1
    """None: reaching it in any row counts, log of the mean over rows of exp."""
    noisy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.width < math.inf:
            raise UserError(f"the goal's width is {self.width}; take a positive distance (a known number is exact).")
        require_finite("the goal's target", *self.target)
        if len(self.target) != len(self.columns):
            raise UserError(f"the goal gives {len(self.target)} numbers for {len(self.columns)} columns: one for each.")

    @property
    def quadratic(self) -> bool:
        return self.row is not None

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        rows = x if self.row is None else x[:, self.row, None]
        away = (rows[..., list(self.columns)] - x.new_tensor(self.target)) / self.width
        nats = -0.5 * away.square().sum(-1)
        return torch.logsumexp(nats, -1) - math.log(nats.shape[-1])


@dataclass(frozen=True)
class Together:
    """Independent pieces of evidence: their nats add."""

    parts: tuple[Evidence, ...]

    @property
    def noisy(self) -> bool:
        return self.parts[0].noisy

    @property
    def quadratic(self) -> bool:
        return all(part.quadratic for part in self.parts)

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return torch.stack([part(x, k, temperature) for part in self.parts]).sum(0)


def together(*parts: Evidence) -> Together:
    """The sum of pieces of evidence.

    Raises:
        UserError: none is given, or some are about x_0 and others were learned for noised rows.
    """
    if not parts:
        raise UserError("no evidence is given: name at least one piece, or sample without a guide.")
    if len({part.noisy for part in parts}) > 1:
        raise UserError(
            "some evidence is about x_0 and some was learned for noised rows, which no guide reads at once: keep one "
            "kind, and use the other to choose among samples (guidance.best_of)."
        )
    return Together(parts)


@dataclass(frozen=True)
class InUnits:
    """Evidence about the selected observation in raw units [N, R, O'], for a model's normalised rows."""

    codec: Codec
    evidence: Evidence
    noisy: ClassVar[bool] = False

    @property
    def quadratic(self) -> bool:
        return self.evidence.quadratic and self.codec.obs_norm.kind != "quantile"

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return self.evidence(self.codec.decode(x)[0], k, temperature)


@dataclass(frozen=True)
class ReturnInUnits:
    """What a differentiable function of a plan in raw units earns, such as an analytic reward summed over its rows."""

    codec: Codec
    function: Callable[[Tensor, Tensor | None], Tensor]
    """Selected observations [N, R, O'] and actions [N, R, k, A] (None where rows hold none) to [N], units of reward."""
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return Return(lambda rows: self.function(*self.codec.decode(rows)))(x, k, temperature)


def temperature_for(evidence: Evidence, x: Tensor, kl_budget: float) -> float:
    """The temperature at which the reward moves plans `kl_budget` nats from the prior, given what is known.

    x [N, n, R, D]: n unguided samples of each of N plans; the mean over plans of the KL meets the budget. What goals
    and constraints say does not depend on the temperature, and is not counted.

    Raises:
        UserError: a budget that n samples cannot express (at most log n), or that is not positive; a reward that is
            constant or not finite.
    """
    flat = x.flatten(0, 1)
    k = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
    with torch.no_grad():
        reward = evidence(flat, k, 1.0) - evidence(flat, k, math.inf)
    try:
        return float(temperature_for_kl(reward.view(x.shape[:2]), kl_budget))
    except ValueError as error:
        raise UserError(f"kl_budget cannot be spent: {error}.") from None
