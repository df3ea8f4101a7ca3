"""Which device a stage computes on, and how numbers get there and back without either side waiting for the other."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from tcsae.shared.base.errors import ConfigError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy import ndarray

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("auto", "cuda", "mps", "cpu")
READS = {
    "guard": "a training step's loss and gradient norm, read while the next step runs",
    "log": "figures of a step, at the log interval",
    "max_norm": "which segments hold an outlier, with data.max_norm",
    "capture": "activations of a batch, read while the next ones run",
    "evaluation": "sums of an evaluation pass, at its end",
    "measures": "codes of a batch, for registered measures, which are worked out on the CPU",
}
"""What a stage reads from a device, and so may wait for: nothing else does."""


def available_devices() -> list[str]:
    """Kinds of device that this machine has, fastest first."""
    import torch

    devices = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)]
    return [name for name, there in devices if there]


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


PRECISIONS = {
    "float32": "every product in float32",
    "tf32": "float32 rounded to 10 bits inside products, on NVIDIA GPUs",
    "bf16": "the encoder's and the decoder's products in bfloat16, others in tf32; codes, losses and Adam in float32",
}
"""What matrix products are computed in; sums, norms, losses and weights are float32 in each."""
_precision = ["float32"]


def precision() -> str:
    """The one that this process computes in."""
    return _precision[-1]


def set_precision(name: str, device: "torch.device") -> None:
    """Choose what matrix products are computed in, for the whole process.

    Raises ConfigError if the name is unknown, or for a device on which it would be no faster.
    """
    import torch

    if name not in PRECISIONS:
        raise ConfigError(unknown("precision", name, PRECISIONS))
    if name != "float32" and device.type != "cuda":
        slow = (name, device.type) == ("bf16", "cpu")
        why = "products in bfloat16 take about 100 times as long there" if slow else "it is for NVIDIA GPUs"
        raise ConfigError(f"--precision {name} on {device.type}: {why}. Leave it at float32, or give --device cuda.")
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    _precision[-1] = name


def matmuls(device: "torch.device") -> "AbstractContextManager[object]":
    """In here the encoder's and the decoder's products are computed as `set_precision` says; cast what comes out."""
    if precision() != "bf16":
        return nullcontext()
    import torch

    return torch.autocast(device.type, torch.bfloat16)


_backend = [""]


def set_compile(device: "torch.device") -> None:
    """Have `compiled` compile, for the whole process.

    Raises ConfigError for a device whose kernels no compiler reads, and without Triton.
    """
    from importlib.util import find_spec

    if device.type != "cuda":
        raise ConfigError(
            f"--compile on {device.type}: shapes there follow from values, in kernels that torch.compile cannot read. "
            "Leave it away, or give --device cuda."
        )
    if find_spec("triton") is None:
        raise ConfigError("--compile takes Triton, which is not installed. Leave it away, or: pip install triton")
    import torch

    torch._dynamo.config.recompile_limit = 1024  # a graph for each run of a pass and each kind of batch
    torch._dynamo.config.accumulated_recompile_limit = 4096
    _backend[-1] = "inductor"


def compiled(function: "Callable[P, R]") -> "Callable[P, R]":
    """The function, as one graph where `set_compile` asked for it: what would break it into several is an error."""
    if not _backend[-1]:
        return function
    import torch

    return torch.compile(function, fullgraph=True, backend=_backend[-1])


def sums_on(device: "torch.device") -> "torch.device":
    """Where float64 sums of what is on a device are kept: there, but on the CPU for Apple's GPUs."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def static_shapes(tensor: "torch.Tensor") -> bool:
    """Whether no shape may depend on values: a GPU would have to be waited for. A CPU is faster with fewer entries."""
    return tensor.device.type != "cpu"


def to_device(values: "ndarray | torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Numbers of the host on a device. To a GPU from pinned memory, which torch keeps until the copy is done, so that
    the host does not wait.
    """
    import torch

    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    # On mps the source would have to outlive the copy.
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))


class Readout:
    """A device's numbers on their way to the host: copied when they are done, waited for when `values` is asked for."""

    def __init__(self, tensor: "torch.Tensor", what: str) -> None:
        """`what` is a key of READS."""
        import torch

        assert what in READS, what
        self.what = what
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> "torch.Tensor":
        """The numbers on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()
