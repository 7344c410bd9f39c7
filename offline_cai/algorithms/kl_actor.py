"""The KL-regularised actor: a learned behaviour prior × exp(Q / temperature), projected in either direction.

Wu, Tucker and Nachum 2019 (BRAC, arXiv 1911.11361) has the reverse direction, with the KL in the values (value penalty)
or in the policy alone; weighing samples of the prior is Peng et al. 2019 with sampled actions (Siegel et al. 2020,
arXiv 2002.08396). Choices: all expectations are exact.

- reverse: minimise KL(pi ‖ posterior) = E_pi[log pi - log prior - Q / temperature] + const. It needs the prior's
  density, and seeks one mode.
- forward: minimise KL(posterior ‖ pi), the likelihood of the prior's samples weighed by exp(Q / temperature). It needs
  samples alone, and covers all modes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offline_cai.core import Batch, Chunks, Loss, Needs, Spec, Step
from offline_cai.data.codec import NormaliserKind
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies import dial, priors
from offline_cai.policies.acting import OfflineActorAlgorithm, check_bootstrap
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.networks import Actor, Critic, follow, slow
from offline_cai.policies.priors import DensityPrior, PriorKind

NEXT, NOW = 2, 3  # streams of noise, beside the prior's own


@dataclass(frozen=True)
class KLActorConfig:
    """Prior, evidence and projection."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of all networks."""
    prior: PriorKind = "gaussian"
    """The behaviour's law, learned beside the rest: gaussian, squashed, mixture or diffusion; of choices always a
    categorical."""
    components: int = 5
    """Of a mixture."""
    levels: int = 32
    """Noise levels of a diffusion."""
    steps: int = 10
    """Denoising steps of a diffusion's samples."""
    direction: Literal["reverse", "forward"] = "reverse"
    """Of the KL that is minimised: reverse (the actor's from the posterior) or forward."""
    critic: Literal["td", "monte_carlo"] = "td"
    """What Q is: the actor's own, by twin critics that bootstrap, or the behaviour's, by regression on its returns."""
    value_penalty: bool = False
    """Whether Q also pays for the KL at all later steps (temperature x KL), with critic td."""
    temperature: Temperature = "auto"
    """Reward per nat; auto: found so that `kl_budget` is met."""
    kl_budget: float | None = None
    """Nats from the prior in each state, on average; null with temperature auto: 0.5."""
    samples: int = 4
    """Actions by which an expectation over actions is taken, where there are no choices."""
    family: Literal["gaussian", "squashed"] = "gaussian"
    """The actor's, where actions are continuous."""
    discount: float = 0.99
    """Per step."""
    tau: float = 0.005
    """Share of the way that target critics move at each update."""
    normaliser: NormaliserKind = "gaussian"
    """Of observations."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        check_bootstrap(self.discount, self.tau)
        for name in ("components", "levels", "steps", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if self.direction == "reverse" and self.prior == "diffusion":
            raise UserError(
                "a diffusion prior has samples and no density, which the reverse KL needs: take direction forward, or "
                "another prior."
            )
        if self.value_penalty and self.critic == "monte_carlo":
            raise UserError("value_penalty is for critics that bootstrap: take critic td, or leave it out.")


class Actions(NamedTuple):
    """What the policy does in B states: n actions, their weights and values, and how far it is from the prior."""

    action: Tensor  # [n, B, U]
    weight: Tensor  # [n, B], adds up to one over n
    q: Tensor  # [n, B], in units of reward
    kl: Tensor  # [B], nats

    def mean(self, x: Tensor) -> Tensor:
        """The expectation [B] of x [n, B]."""
        return (self.weight * x).sum(0)


class KLActor(OfflineActorAlgorithm):
    Config = KLActorConfig
    config: KLActorConfig

    def __init__(self, spec: Spec, config: KLActorConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        c = config
        self.actor = Actor(spec, c.hidden, c.family)
        self.prior = priors.build(c.prior, spec, c.hidden, c.components, c.levels, c.steps)
        self.critic = Critic(spec, c.hidden, count=2)
        if c.critic == "td":
            self.target = slow(self.critic)
        self.dial = Dial(c.temperature, c.kl_budget, auto_budget=0.5)

    @property
    def needs(self) -> Needs:
        groups = {"prior": ("prior.",), "critic": ("critic.",), "actor": ("actor.",)}
        return Needs(discount=self.config.discount, groups=groups)

    def fit(self, chunks: Chunks) -> None:
        super().fit(chunks)
        self.dial.begin(self.returns.scale[0])

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return {"prior": self._prior, "critic": self._critic, "actor": self._actor}[phase](batch)

    def _prior(self, batch: Batch) -> Loss:
        obs, action = self.now(batch)
        return Loss({"prior_loss": self.prior.loss(obs, action, batch.key).sum()}, len(obs))

    def _critic(self, batch: Batch) -> Loss:
        """Squared error to the return of the data, or to the target of equation 6 (BRAC)."""
        c, step = self.config, batch.transition
        obs, action = self.now(batch)
        with torch.no_grad():
            if c.critic == "monte_carlo":
                wanted = batch.returns[:, 0]
            else:
                acts = self.acts(self.normaliser.encode(step.next_obs), batch.key, self.target, NEXT)
                after = acts.mean(acts.q) - (self.dial.temperature * acts.kl if c.value_penalty else 0.0)
                wanted = step.reward + c.discount * torch.where(step.terminal, 0.0, after)
        q = self.critic(obs, action)
        loss = 0.5 * (q - self.returns.encode(wanted)).square().sum()
        return Loss({"critic_loss": loss}, len(obs), {"q": self.returns.decode(q.detach()).mean(0).sum()})

    def _actor(self, batch: Batch) -> Loss:
        """KL between the actor and the posterior, in nats, up to a constant."""
        obs, temperature = self.now(batch)[0], self.dial.temperature
        acts = self.acts(obs, batch.key, self.critic, NOW)
        if self.config.direction == "reverse":
            loss = acts.kl - acts.mean(acts.q) / temperature
        else:
            loss = -acts.mean(self.actor(obs).log_prob(acts.action))
        metrics = {"kl": acts.kl.detach().sum(), "temperature": temperature * len(obs)}
        return Loss({"actor_loss": loss.sum()}, len(obs), metrics)

    def acts(self, obs: Tensor, key: Tensor, critic: Critic, stream: int) -> Actions:
        """What the policy does at encoded observations [B, O], with the least of the critics' values.

        reverse: the actor's own draws. forward: the prior's, weighed by exp(Q / temperature), which is the posterior
        that the actor is fitted to. Beyond the bounds an action does what it does at them.
        """
        if self.config.direction == "reverse":
            assert isinstance(self.prior, DensityPrior)  # the config demands one
            pi, prior = self.actor(obs), self.prior.at(obs)
            draw = pi.draw(key, self.config.samples, stream)
            q, alike = self._q(critic, obs, draw.action), type(pi) is type(prior)  # then no draws are needed for the KL
            kl = pi.kl(prior) if alike else draw.mean(draw.log_prob - prior.log_prob(draw.action))
            return Actions(draw.action, draw.weight, q, kl)
        draw = self.prior.draw(obs, key, self.config.samples, stream)
        with torch.no_grad():
            q = self._q(critic, obs, draw.action)
            value = soft.soft_value(q, self.dial.temperature, draw.weight.log(), dim=0)
            log_ratio = (q - value) / self.dial.temperature
        weight = draw.weight * log_ratio.exp()
        return Actions(draw.action, weight, q, (weight * log_ratio).sum(0))

    def _q(self, critic: Critic, obs: Tensor, action: Tensor) -> Tensor:
        """[n, B], in units of reward."""
        return self.returns.decode(critic(obs, action.clamp(-1, 1)).amin(0))

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        metrics = step(batch, "prior") | step(batch, "critic") | step(batch, "actor")
        if "kl" in metrics:  # an update that was skipped may have none
            self.dial.steer(metrics["kl"])
        if self.config.critic == "td":
            follow(self.target, self.critic, self.config.tau)
        return metrics
