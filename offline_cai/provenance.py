"""What a result was made with."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from offline_cai import __version__

_PACKAGES = (
    "torch", "diffusers", "accelerate", "minari", "gymnasium", "gymnasium-robotics", "mujoco", "numpy", "scipy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what decides numbers, and the kind of machine."""
    found = {"offline_cai": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "machine": f"{sys.platform} {platform.machine()}, {os.cpu_count()} CPU cores"}
