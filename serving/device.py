"""Where a replica's models score: on the GPU that Ray gave it a share of, or on the CPU."""

import dataclasses

import numpy as np

from cluster.device import Device, choose
from models.on_gpu import on_gpu
from models.scoring import Scorer
from serving.schema import smoke_rows

CPU = Device(kind="cpu", reason="no `gpus` are asked for")

# Between a row's scores on the two devices.
APART = 1e-5


def given() -> Device:
    """The device of this replica: CUDA where Ray gave it a GPU, and the driver has one."""
    import ray

    gpus = ray.get_gpu_ids()
    return choose("auto", rapids=False) if gpus else CPU


def placed(scorer: Scorer, device: Device) -> tuple[Scorer, Device]:
    """The model where it scores, and which device that is.

    Args:
        scorer: As the registry gave it.
        device: The replica's.

    Raises:
        ValueError: On the GPU it gives other scores.
    """
    if device.kind == "cpu":
        return scorer, device
    x = scorer.encoder.transform_rows(smoke_rows(scorer.encoder))
    expected_n = scorer.predict(x)
    moved = on_gpu(scorer.predict)
    if moved is None:
        reason = "models of this kind score on the CPU; boosting takes the GPU"
        return scorer, Device(kind="cpu", reason=reason)
    scores_n = moved(x)
    if np.abs(scores_n - expected_n).max() > APART:
        raise ValueError(f"on the GPU two rows score {scores_n}, and {expected_n} on the CPU")
    return dataclasses.replace(scorer, predict=moved), device
