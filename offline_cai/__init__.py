"""Control as probabilistic inference: offline reinforcement learning and trajectory-diffusion planning."""

__version__ = "0.1.0"
