"""Which device a stage computes on."""

from typing import TYPE_CHECKING

from tcsae.shared.base.errors import ConfigError, unknown

if TYPE_CHECKING:
    import torch


DEVICES = ("auto", "cuda", "mps", "cpu")


def available_devices() -> list[str]:
    """Kinds of device that this machine has, fastest first."""
    import torch

    found = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)]
    return [name for name, there in found if there]


def choose_device(asked: str) -> "torch.device":
    """The device of that name; "auto" is the first of cuda, mps and cpu that is there.

    Raises ConfigError if the name is unknown, or this machine has no such device.
    """
    import torch

    if asked not in DEVICES:
        raise ConfigError(unknown("device", asked, DEVICES))
    here = available_devices()
    if asked != "auto" and asked not in here:
        raise ConfigError(
            f"The device {asked} is not here; there is: {', '.join(here)}. Give one of these (--device NAME)."
        )
    return torch.device(here[0] if asked == "auto" else asked)


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensor; whether that was possible (glibc alone takes it).

    By default glibc maps and unmaps every large tensor: some 50 ms of page faults for 64 MB, a fifth of a step.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def sum_dtype(device: "torch.device") -> "torch.dtype":
    """What sums are kept in: float64, but float32 on Apple's GPUs, which have nothing wider."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64
