"""Maximum a posteriori policy optimisation: the posterior under the previous policy as prior, by weighted regression.

Abdolmaleki et al. 2018 (arXiv 1806.06920; the decoupled limits: arXiv 1812.02256). The E-step weighs actions of the
previous policy by exp(Q / temperature), the M-step fits the policy to them within limits. Critics learn from windows of
the replay: Retrace (Munos et al. 2016), or returns of n steps. Defaults of budget, limits, samples and period are
Acme's; its duals are a softplus of what is learned, and exponentials here.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.core import Batch, Discrete, Loss, Needs, Spec, Step
from offline_cai.data.codec import NormaliserKind
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies import dial, rollouts
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.distributions import Categorical, Distribution, Draw
from offline_cai.policies.networks import Actor, Critic, follow, slow

NEXT, NOW = 0, 1  # streams of noise


@dataclass(frozen=True)
class MPOConfig:
    """Actor, critic, E-step and M-step."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critic."""
    temperature: Temperature = "auto"
    """Reward per nat from the previous policy; auto: found so that the E-step spends `kl_budget`."""
    kl_budget: float | None = None
    """Nats from the previous policy that the E-step's weights may spend; null with temperature auto: 0.1."""
    mean_limit: float | None = 0.0025
    """Nats that the means of the M-step may move, for each action component; null: no limit."""
    std_limit: float | None = 1e-6
    """Nats that its standard deviations may move, for each action component; null: no limit."""
    choice_limit: float | None = 0.0025
    """Nats that it may move where actions are choices; null: no limit."""
    samples: int = 20
    """Actions of the previous policy at each state; of choices all are taken."""
    period: int = 100
    """Updates between copies to the previous policy and the target critic."""
    critic: Literal["retrace", "n_step"] = "retrace"
    """Targets of the critic. Retrace weighs by stored log-probabilities, and cuts where an action has none; returns of
    n steps take the actions as they were."""
    horizon: int = 5
    """Steps of a window: n."""
    discount: float = 0.99
    """Per step."""
    normaliser: NormaliserKind = "none"
    """Of observations, fitted to a dataset if there is one."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        for name in ("mean_limit", "std_limit", "choice_limit"):
            if (limit := getattr(self, name)) is not None and not 0 < limit < math.inf:
                raise UserError(f"{name} is {limit}; it has to be positive, or null for no limit.")
        if min(self.samples, self.period, self.horizon) < 1 or not 0 <= self.discount < 1:
            raise UserError("samples, period and horizon have to be at least 1, discount in [0, 1).")


class MPO(ActorAlgorithm):
    Config = MPOConfig
    config: MPOConfig
    updates: Tensor

    def __init__(self, spec: Spec, config: MPOConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        self.actor = Actor(spec, config.hidden)
        self.critic = Critic(spec, config.hidden, count=1)
        self.old, self.target = slow(self.actor), slow(self.critic)
        self.dial = Dial(config.temperature, config.kl_budget, 0.1)
        parts = ("choice",) if isinstance(spec.action, Discrete) else ("mean", "std")
        limits = {part: getattr(config, f"{part}_limit") for part in parts}
        self.limits = {part: limit for part, limit in limits.items() if limit is not None}
        width = 1 if isinstance(spec.action, Discrete) else spec.action_width
        starts = {part: torch.full((width,), 0.5 / math.sqrt(limit)).log() for part, limit in self.limits.items()}
        self.multiplier = nn.ParameterDict(starts)  # logarithms: of 10 and 500 at the default limits (Acme: 10, 1000)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def needs(self) -> Needs:
        c = self.config
        dual = (*(("dial.",) if self.dial.learned else ()), *(("multiplier.",) if self.limits else ()))
        groups = {"critic": ("critic.",), "actor": ("actor.",)} | ({"dual": dual} if dual else {})
        return Needs(horizon=c.horizon, discount=c.discount, source="replay", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        losses = {"critic": self._critic, "dual": self._dual}
        return losses.get(phase, self._actor)(batch)

    def _critic(self, batch: Batch) -> Loss:
        """Squared error of Q(s_t, a_t): at all steps of a window with Retrace, at its first with n steps."""
        obs, action = self.normaliser.encode(batch.obs), rollouts.unit_actions(self.spec, batch)
        targets = self._retrace if self.config.critic == "retrace" else self._n_step
        with torch.no_grad():
            wanted = targets(batch, obs, action)
        counts = batch.valid[:, : wanted.shape[1]]
        q = self.critic(obs[:, : wanted.shape[1]], action[:, : wanted.shape[1]])[0]
        error = torch.where(counts, q - wanted, 0.0)
        return Loss({"critic_loss": 0.5 * error.square().sum()}, counts.sum(), {"q": (q.detach() * counts).sum()})

    def _retrace(self, batch: Batch, obs: Tensor, action: Tensor) -> Tensor:
        """[B, H], for the previous policy."""
        count, horizon = batch.valid.shape
        keys = seeding.split(batch.key, horizon).flatten()
        after = self._expected(obs[:, 1:].flatten(0, 1), keys).view(count, horizon)
        value = torch.cat([torch.zeros_like(after[:, :1]), after], 1)
        unknown = torch.full_like(batch.reward, math.nan)
        stored = unknown if batch.log_prob is None else batch.log_prob[..., 0]
        log_ratio = (self.old(obs[:, :-1]).log_prob(action) - stored).nan_to_num(nan=-math.inf)
        q, discount = self.target(obs[:, :-1], action)[0], self.config.discount
        return soft.retrace(batch.reward, q, value, batch.terminal, log_ratio, discount, valid=batch.valid)

    def _n_step(self, batch: Batch, obs: Tensor, action: Tensor) -> Tensor:
        """[B, 1]: the rewards of the valid steps, and the value of the state after them."""
        rows, last = torch.arange(len(obs), device=obs.device), batch.valid.sum(1)
        value = torch.zeros_like(obs[..., 0])  # with trace 1 those in between cancel
        value[rows, last] = self._expected(obs[rows, last], batch.key)
        returns = soft.td_lambda(batch.reward, value, batch.terminal, self.config.discount, 1.0, batch.valid)
        return returns[:, :1]

    def _expected(self, obs: Tensor, key: Tensor) -> Tensor:
        """E Q(s, ·) [N] under the previous policy."""
        draw = self.old(obs).draw(key, self.config.samples, NEXT)
        return draw.mean(self.target(obs, draw.action)[0])

    def _actor(self, batch: Batch) -> Loss:
        """The M-step: the weighted regression, and what leaving the previous policy costs."""
        obs = self.normaliser.encode(batch.obs[:, 0])
        old, draw, weight, spent = self._e_step(obs, batch.key)
        fits, moved = _decoupled(self.actor(obs), old)
        log_prob = torch.stack([pi.log_prob(draw.action) for pi in fits])
        terms = {"actor_loss": -(weight * log_prob).sum()}
        for part in self.limits:
            terms[f"{part}_loss"] = (self.multiplier[part].detach().exp() * moved[part]).sum()
        metrics = {f"{part}_kl": kl.detach().mean(-1).sum() for part, kl in moved.items()}
        metrics |= {"kl": spent.sum(), "temperature": self.dial.temperature * len(obs)}
        return Loss(terms, len(obs), metrics)

    def _dual(self, batch: Batch) -> Loss:
        """The duals of budget and limits, in logarithms, at learning rates of their own: they rise where too much is
        spent."""
        obs, terms = self.normaliser.encode(batch.obs[:, 0]), {}
        old, _, _, spent = self._e_step(obs, batch.key)
        with torch.no_grad():
            _, moved = _decoupled(self.actor(obs), old)
        for part, limit in self.limits.items():
            terms[f"{part}_dual"] = (self.multiplier[part] * (limit - moved[part])).sum()
        if self.dial.learned:
            terms["temperature_dual"] = self.dial.loss(spent).sum()
        return Loss(terms, len(obs))

    @torch.no_grad()
    def _e_step(self, obs: Tensor, key: Tensor) -> tuple[Distribution, Draw, Tensor, Tensor]:
        """The previous policy, actions of it [n, B, U], their weights [n, B], and the nats [B] that these spend."""
        old = self.old(obs)
        draw = old.draw(key, self.config.samples, NOW)
        return old, draw, *self.posterior(draw, self.target(obs, draw.action)[0])

    def posterior(self, draw: Draw, q: Tensor) -> tuple[Tensor, Tensor]:
        """The E-step: weights [n, B] ∝ prior × exp(q / temperature), and the nats [B] that they spend."""
        log_prior = draw.weight.log().clamp(min=-80.0)
        log_weight = (log_prior + q / self.dial.temperature).log_softmax(0)
        return log_weight.exp(), (log_weight.exp() * (log_weight - log_prior)).sum(0)

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        if self.updates % self.config.period == 0:
            follow(self.old, self.actor, 1.0)
            follow(self.target, self.critic, 1.0)
        self.updates += 1
        metrics: dict[str, float] = {}
        for phase in self.needs.groups:
            metrics |= step(batch, phase)
        return metrics


def _decoupled(pi: Distribution, old: Distribution) -> tuple[list[Distribution], dict[str, Tensor]]:
    """What the M-step fits, and KL(old ‖ each) [B, width]: of a Gaussian once its mean alone, once its spread alone."""
    if isinstance(pi, Categorical):
        return [pi], {"choice": old.kl(pi)[:, None]}
    mean, std = soft.decoupled_gaussian_kl(old.mean, old.std, pi.mean, pi.std)  # type: ignore[attr-defined]
    fits = [type(pi)(pi.mean, old.std), type(pi)(old.mean, pi.std)]  # type: ignore[attr-defined,call-arg]
    return fits, {"mean": mean, "std": std}
