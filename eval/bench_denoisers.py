"""Does the temporal U-Net denoise as well as an MLP? `make bench-denoisers`.

Each network predicts v on the problem of `bench_guidance.py`, first state given, for the same CPU time. Printed: KL of
the unguided sampler's law to the prior, and of corrected guidance to the posterior, 5 nats from it, less their bias;
with 512 samples their standard error is about .05. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from bench_guidance import WIDTH, Mlp, drawn, from_velocity, process, quadratic, train
from torch import nn

from offline_cai import seeding
from offline_cai.diffusion.residual import measure
from offline_cai.diffusion.sampler import unguided
from offline_cai.networks.temporal_unet import TemporalUNet


def without_norm(network: nn.Module) -> nn.Module:
    """The same with each GroupNorm left out."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {  # with batch and rate
    "MLP, 256 wide": (Mlp, 256, 2e-3),
    "U-Net, 32 channels": (lambda: TemporalUNet(WIDTH), 64, 1e-3),
    "U-Net, 32, no GroupNorm": (lambda: without_norm(TemporalUNet(WIDTH)), 64, 1e-3),
    "U-Net, 64, no GroupNorm": (lambda: without_norm(TemporalUNet(WIDTH, 64)), 64, 1e-3),
}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="CPU seconds of training for each network")
    arguments = parser.parse_args()
    task, found = quadratic(last=False), {}
    print(f"{'':<26}{'parameters':>12}{'steps':>8}{'CPU s':>8}{'unguided':>10}{'corrected':>11}")
    for name, (make, batch, rate) in NETWORKS.items():
        torch.manual_seed(0)
        network, mask = make(), task.exact.mask
        one = (train(network, mask, 30, batch) - train(network, mask, 10, batch)) / 20
        torch.manual_seed(0)
        network = make()
        steps = int(arguments.seconds / one)
        seconds = train(network, mask, steps, batch, rate)
        denoise, n = from_velocity(network.requires_grad_(False)), 2048
        data = process().sample(n, torch.Generator().manual_seed(9)).float()
        residual = measure(denoise, task.exact.schedule, data, mask, seeding.keys(5, 0, torch.arange(n)))
        began = time.process_time()
        prior = drawn(task.prior, denoise, unguided, residual, 512, torch.float32)
        guided = drawn(task, denoise, task.guide("corrected"), residual, 512, torch.float32)
        parameters = sum(weight.numel() for weight in network.parameters())
        found[name] = {"parameters": parameters, "steps": steps, "cpu_seconds": seconds, "unguided_kl": prior.kl}
        found[name] |= {"corrected_kl": guided.kl, "sampling_cpu_seconds": time.process_time() - began}
        print(f"{name:<26}{parameters:>12}{steps:>8}{seconds:>8.0f}{prior.kl:>10.4f}{guided.kl:>11.4f}", flush=True)
    print(json.dumps({"seconds": arguments.seconds, "networks": found}))


if __name__ == "__main__":
    main()
