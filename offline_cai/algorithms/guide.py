"""What a noised trajectory will earn: the learned returns that guide a Diffuser.

Two kinds, trained on the same noised windows with the same known states as the denoiser:

- value: V(x_k, k) ~ E[R | x_k] by regression, R the discounted return-to-go of the window (Janner et al. 2022, section
  3.2 and appendix C). V / temperature is no log-evidence: by Jensen's inequality it is too small.
- evidence: f(x_k, k, temperature) ~ log E[exp(R / temperature) | x_k], the number whose gradient makes the posterior
  exact. It minimises E[exp(u) - u - 1], u = R / temperature - f (Gumbel regression, Garg et al. 2023, equation 11).

The Diffuser is that of a run (`denoiser`), which stays as it is, or is trained beside the guide (`diffuser`). Either
way it travels with the guide, whose policy plans with both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.algorithms.diffuser import Diffuser, DiffuserConfig
from offline_cai.core import Algorithm, Batch, Chunks, Known, Loss, Needs, Spec, Step
from offline_cai.data.codec import Normaliser
from offline_cai.diffusion.evidence import Learned
from offline_cai.errors import UserError
from offline_cai.networks.temporal_mlp import ValueMLP
from offline_cai.networks.temporal_value import TemporalValue
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.planner import Planner
from offline_cai.spaces import require_same_spec

STEEPEST = 6.0
"""The loss grows linearly beyond exp(STEEPEST): a window that counts e^6-fold is rarer than one in 400."""


@dataclass(frozen=True)
class GuideConfig:
    """A learned return, and the Diffuser that it guides."""

    kind: Literal["evidence", "value"] = "evidence"
    """evidence (log E[exp(R / temperature) | x_k]) or value (E[R | x_k], the paper's)."""
    denoiser: str | None = None
    """A trained run of the diffuser, or its export, taken over as it is; null: one is trained beside the guide."""
    diffuser: DiffuserConfig | None = None
    """The Diffuser to train beside the guide; with `denoiser` leave it out: the run's own is filled in."""
    planner: PlannerConfig | None = None
    """How plans are sampled and executed; null: as the Diffuser's config says."""
    temperatures: tuple[float, float] = (0.2, 5.0)
    """Lowest and highest temperature that the evidence is learned for, in standard deviations of the data's returns."""
    network: Literal["unet", "mlp"] = "unet"
    """The temporal U-Net's way down, or a residual perceptron over all rows at once."""
    hidden: int = 512
    """Units of the perceptron's layers."""
    blocks: int = 4
    """Residual blocks of the perceptron."""
    channels: int = 32
    """Channels of the U-Net's first level, a multiple of 8."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level of the U-Net, as multiples of the first (1, 2, 4, 8 in the paper's locomotion)."""

    def __post_init__(self) -> None:
        if not 0 < self.temperatures[0] < self.temperatures[1] < math.inf:
            raise UserError(
                f"temperatures are {list(self.temperatures)}; give two positive numbers, the lower one first."
            )
        if min(self.hidden, self.blocks) < 1:
            raise UserError(f"hidden is {self.hidden} and blocks {self.blocks}; each is at least 1.")
        if self.channels < 1 or self.channels % 8 or not self.multipliers or min(self.multipliers) < 1:
            raise UserError(
                f"channels is {self.channels} and multipliers {list(self.multipliers)}; take a multiple of 8, and one "
                "level or more, each at least 1."
            )


class Guide(Algorithm):
    Config = GuideConfig
    config: GuideConfig

    def __init__(self, spec: Spec, config: GuideConfig) -> None:
        diffuser = _diffuser(spec, config)
        if diffuser.config.segments:
            raise UserError(
                "a Diffuser of segments has no returns to learn: train the guide with model.diffuser.segments: false."
            )
        super().__init__(spec, replace(config, diffuser=diffuser.config))
        self._complete = config.denoiser is None or config.diffuser is None
        self.diffuser = diffuser.requires_grad_(config.denoiser is None)
        self.return_norm = Normaliser(1, "gaussian")
        told, size = int(config.kind == "evidence"), (diffuser.codec.width, diffuser.config.rows)
        self.network: TemporalValue | ValueMLP
        if config.network == "mlp":
            self.network = ValueMLP(*size, config.hidden, config.blocks, condition=told)
        else:
            self.network = TemporalValue(*size, config.channels, config.multipliers, condition=told)

    @property
    def needs(self) -> Needs:
        """The Diffuser's; without a run of its own it has its phases here."""
        theirs, groups = self.diffuser.needs, {}
        if self.config.denoiser is None:
            groups = {phase: tuple(f"diffuser.{part}" for part in parts) for phase, parts in theirs.groups.items()}
        return replace(theirs, groups={**groups, "guide": ("network.",)})

    def fit(self, chunks: Chunks) -> None:
        if not self._complete:
            raise UserError("model.denoiser brings its own config: leave model.diffuser out, or train both without it.")
        if self.config.denoiser is None:
            self.diffuser.fit(chunks)
        self.return_norm.fit(chunk.returns[:, None] for chunk in chunks(self.needs.discount))

    # Losses ----------------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        if self.config.denoiser is not None:
            return step(batch, "guide")
        return self.diffuser.update(batch, step) | step(batch, "guide")

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        if phase != "guide":
            return self.diffuser(batch, phase)
        x = self.diffuser.codec.encode(batch)
        k = seeding.integers(batch.key, self.diffuser.config.levels, stream=10)
        noise = seeding.normal(batch.key, tuple(x.shape[1:]), stream=11)
        noisy = Known(x, self.diffuser.mask(x)).impose(self.diffuser.schedule.add_noise(x, noise, k))
        wanted = self.return_norm.encode(batch.returns[:, :1])[:, 0]
        if self.config.kind == "value":
            error = (self.network(noisy, k) - wanted) ** 2
        else:
            cold, hot = self.config.temperatures
            u = seeding.uniform(batch.key, stream=12).to(x)
            sharpness = torch.exp(-math.log(hot) + u * math.log(hot / cold))
            excess = sharpness * (wanted - self.network(noisy, k, sharpness.log()[:, None]))
            error = gumbel_loss(excess) / sharpness**2  # half the squared error where it is hot
        return Loss({"guide_loss": error.sum()}, len(x))

    # Evidence --------------------------------------------------------------------------------------------------------

    @property
    def temperatures(self) -> tuple[float, float] | None:
        """The lowest and highest that the evidence is learned for, in units of return; a value has no bounds."""
        if self.config.kind == "value":
            return None
        cold, hot = (bound * float(self.return_norm.scale) for bound in self.config.temperatures)
        return cold, hot

    def log_evidence(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        """Nats [N] for rows [N, R, D] noised to levels [N], at a temperature in units of return.

        The network says f · temperature, in standardised returns: a number that stays finite as the temperature grows.

        Raises:
            UserError: a temperature that the evidence was not learned for.
        """
        mean, deviation, told = float(self.return_norm.shift), float(self.return_norm.scale), None
        if self.temperatures is not None:
            cold, hot = self.temperatures
            if not cold * (1 - 1e-6) <= temperature <= hot * (1 + 1e-6):
                raise UserError(
                    f"the temperature is {temperature:.4g}, but this guide learned the evidence for {cold:.4g} to "
                    f"{hot:.4g} (model.temperatures, in standard deviations of the data's returns): train one for it."
                )
            told = x.new_full((len(x), 1), math.log(deviation / temperature))
        return (mean + deviation * self.network(x, k.clamp(min=0), told)) / temperature

    def guided(self) -> Diffuser:
        """Its Diffuser, for whose plans this return is evidence."""
        self.diffuser.steer_by(Learned(self.log_evidence, self.diffuser.fingerprint), self.temperatures)
        return self.diffuser

    def finish(self, draw: Callable[[int], Batch]) -> None:
        if self.config.denoiser is None:
            self.diffuser.finish(draw)

    def policy(self, seed: int = 0, **options: Any) -> Planner:
        return self.guided().policy(seed, **options)


def gumbel_loss(excess: Tensor) -> Tensor:
    """exp(u) - u - 1, with exp continued by its tangent beyond STEEPEST. E[..] is least where E[exp(u)] = 1."""
    capped = excess.clamp(max=STEEPEST)
    return torch.expm1(capped) + capped.exp() * (excess - capped) - excess


def _diffuser(spec: Spec, config: GuideConfig) -> Diffuser:
    """The Diffuser to guide: that of a run, or one to be trained (or filled with weights) here."""
    if config.denoiser is None or config.diffuser is not None:
        model = config.diffuser or DiffuserConfig()
        return Diffuser(spec, replace(model, planner=config.planner or model.planner))
    theirs = Diffuser.from_pretrained(config.denoiser)
    require_same_spec(theirs.spec, spec)
    own = Diffuser(spec, replace(theirs.config, planner=config.planner or theirs.config.planner))
    own.load_state_dict(theirs.state_dict())
    return own
