"""Control as probabilistic inference, solved exactly, and the shared mathematics that approximations call.

    p(tau | O) ∝ p(tau) · exp( Σ_t r(s_t, a_t) / temperature )          prior · evidence

Import the module you need; nothing heavy is loaded before that:

- `tabular`: a finite MDP, by log-space messages (NumPy only)
- `lottery`: why the exact posterior is too optimistic, and the variational cure (NumPy only)
- `gaussian`: linear dynamics, Gaussian behaviour, quadratic reward, by messages over the horizon (torch)
- `soft`: soft values, posterior weights, KLs, temperature duals, multi-step returns (torch)
- `svgd`: the Stein direction (torch)
- `smc`: effective sample size, resampling, adaptive tempering (torch)
"""

__all__ = ["gaussian", "lottery", "smc", "soft", "svgd", "tabular"]
