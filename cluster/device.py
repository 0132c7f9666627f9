"""Decides between CPU and CUDA, in one place, and says why."""

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cpu", "cuda"]
Preference = Literal["auto", "cpu", "cuda"]


class DeviceError(RuntimeError):
    """CUDA was asked for and can't be had."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where array and table work runs.

    Attributes:
        kind: `cpu` or `cuda`.
        reason: Why, in words, for the log and the report.
    """

    kind: Kind
    reason: str


def choose(preference: Preference = "auto", *, rapids: bool = True) -> Device:
    """Choose the device of this process.

    Args:
        preference: `auto` takes CUDA where a device and RAPIDS are there; `cpu` and `cuda` insist.
        rapids: Whether the work needs RAPIDS, not a device alone.

    Raises:
        ValueError: The preference is none of the three.
        DeviceError: `cuda` was asked for, and a device or RAPIDS is missing.
    """
    if preference not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {preference!r}: allowed are 'auto', 'cpu' and 'cuda'")
    if preference == "cpu":
        return Device(kind="cpu", reason="cpu was asked for")
    missing = _missing_for_cuda(rapids)
    if missing is None:
        found = f"{_cuda_device_count()} CUDA device(s){' and RAPIDS' if rapids else ''} found"
        return Device(kind="cuda", reason=found)
    if preference == "cuda":
        raise DeviceError(f"device 'cuda' was asked for: {missing}. Use 'auto' or 'cpu' here")
    return Device(kind="cpu", reason=missing)


def _missing_for_cuda(rapids: bool) -> str | None:
    if _cuda_device_count() == 0:
        return "no CUDA device was found"
    if rapids and importlib.util.find_spec("cudf_polars") is None:
        return "RAPIDS is not installed (pip install -r requirements/gpu.lock)"
    return None


def _cuda_device_count() -> int:
    # The driver itself is asked: importing a CUDA library only to look costs seconds.
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
