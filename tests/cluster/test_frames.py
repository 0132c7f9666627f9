import ctypes

import polars as pl
import pytest

from cluster import device, frames


def has_cuda() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


PLAN = (
    pl.LazyFrame({"customer": [2, 1, 2, 1], "amount": [1.0, 2.0, 3.0, 5.0]})
    .group_by("customer")
    .agg(pl.col("amount").sum())
    .sort("customer")
)


def test_cpu_plan_says_what_ran_it_and_why() -> None:
    frame, ran = frames.collect(PLAN, device.choose("cpu"))
    assert frame.rows() == [(1, 7.0), (2, 4.0)]
    assert (ran.engine, ran.device, ran.reason) == ("polars-streaming", "cpu", "cpu was asked for")
    assert ran.seconds > 0


@pytest.mark.skipif(has_cuda(), reason="a CUDA driver is here")
def test_auto_without_cuda_is_cpu_with_the_reason() -> None:
    assert device.choose() == device.Device(kind="cpu", reason="no CUDA device was found")


@pytest.mark.skipif(has_cuda(), reason="a CUDA driver is here")
def test_cuda_asked_for_in_vain_is_refused() -> None:
    with pytest.raises(device.DeviceError, match="no CUDA device was found"):
        device.choose("cuda")


def test_unknown_device_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"'tpu': allowed are 'auto', 'cpu' and 'cuda'"):
        device.choose("tpu")  # type: ignore[arg-type]


def test_spread_on_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="spread 'ray' needs CUDA"):
        frames.collect(PLAN, device.choose("cpu"), spread="ray")


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="no CUDA device was found")
def test_gpu_equals_cpu() -> None:
    frame, ran = frames.collect(PLAN, device.choose("cuda"))
    assert ran.engine == "cudf-polars"
    assert frame.equals(frames.collect(PLAN, device.choose("cpu"))[0])
