"""Which processes train together, through Accelerate on torch.distributed."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from offline_cai.core import Algorithm
from offline_cai.errors import UserError
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.launch import LOST


def join(training: TrainingConfig, asked: int | None = None) -> Accelerator:
    """This process's part of the training: it meets the others that the launcher started, if any.

    Raises:
        UserError: not as many came up as were asked for, or there are not enough devices for them.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if training.device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, but PyTorch finds no GPU here: set it to auto or cpu.")
    cpu = training.device == "cpu" or not torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and here > torch.cuda.device_count():
        raise UserError(f"{here} processes were asked for, but there are {torch.cuda.device_count()} GPUs here.")
    if started > training.batch_size:
        raise UserError(f"{started} processes cannot share a batch of {training.batch_size}: ask for fewer processes.")
    torch.set_float32_matmul_precision("high" if training.tf32 else "highest")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=_precision(training, cpu),
        log_with=list(training.trackers) or None,
        project_dir=".",  # the run's folder takes its place when the first process has chosen one
    )
    if accelerator.num_processes != (asked or started):
        raise UserError(
            f"{asked or started} processes were asked for, but {accelerator.num_processes} came up: start them with "
            "offline-cai train CONFIG --processes N, or with torchrun."
        )
    return accelerator


def require_able(algorithm: Algorithm, name: str, accelerator: Accelerator) -> None:
    """Refuse several processes for an algorithm that cannot share its work."""
    if algorithm.needs.one_process and accelerator.num_processes > 1:
        raise UserError(f"{name} trains in one process only, and {accelerator.num_processes} were started.")


def _precision(training: TrainingConfig, cpu: bool) -> str:
    """The precision that was asked for, where the device has it."""
    if training.mixed_precision == "bf16":
        has = torch.cpu._is_avx512_bf16_supported() if cpu else torch.cuda.is_bf16_supported()
    else:
        has = not cpu
    return training.mixed_precision if has else "no"


@contextmanager
def together() -> Iterator[None]:
    """What all processes do together.

    Raises:
        UserError: one of them is gone, which torch.distributed reports as a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{LOST} ({reason}). Go on with: offline-cai train --resume RUN.") from error


def describe(training: TrainingConfig, accelerator: Accelerator) -> str:
    """Who trains, in a line; all processes have to call this."""
    devices = gather_object([f"{accelerator.device} of {socket.gethostname()}"])
    n, wanted, used = accelerator.num_processes, training.mixed_precision, accelerator.mixed_precision
    backend = f", {accelerator.state.backend}" if n > 1 else ""
    threads = torch.get_num_threads()
    each = f"{threads} thread{'' if threads == 1 else 's'}{'' if n == 1 else ' each'}"
    text = f"{n} {'process' if n == 1 else 'processes'}{backend}, {each}: {', '.join(devices)}"
    return text if wanted == used else f"{text}; no {wanted} there, so in float32"
