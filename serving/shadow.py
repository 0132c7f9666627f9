"""The challenger's scores beside the champion's: computed and logged, never answered.

They are computed after the answer, in one thread of the lowest priority; what that doesn't keep up
with is left out and counted. Knows nothing of HTTP.
"""

import json
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

# Requests that wait for their shadow scores; more are left out.
WAITING = 64

# Scores of a request that the log has each of; of more it has the differences only.
LOGGED_ROWS = 100

log = logging.getLogger("ray.serve")


class Shadow:
    """Scores in the shadow of those that are answered.

    `counts` has how many requests were "scored", "dropped" and "failed", by model.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "shadow", initializer=_step_back)
        self._waiting = 0
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, str]] = Counter()

    def score(
        self,
        file: Path,
        request: str,
        model: str,
        versions: tuple[int, int],
        answered_n: np.ndarray,
        challenger: Callable[[], np.ndarray],
    ) -> None:
        """Has the challenger score what was answered; returns at once.

        Args:
            file: The shadow log; a line a request is appended.
            request: Its id.
            model: The model.
            versions: The champion's and the challenger's.
            answered_n: (n,) float64, the champion's scores.
            challenger: Gives the challenger's, (n,) float64.
        """
        with self._lock:
            full = self._waiting >= WAITING
            self.counts[model, "dropped"] += full
            self._waiting += not full
        if not full:
            self._thread.submit(self._score, file, request, model, versions, answered_n, challenger)

    def _score(
        self,
        file: Path,
        request: str,
        model: str,
        versions: tuple[int, int],
        answered_n: np.ndarray,
        challenger: Callable[[], np.ndarray],
    ) -> None:
        try:
            scores_n = challenger()
            apart_n = np.abs(scores_n - answered_n)
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request": request,
                "model": model,
                "champion": versions[0],
                "challenger": versions[1],
                "rows": len(scores_n),
                "mean_difference": float(np.mean(scores_n - answered_n)),
                "largest_difference": float(apart_n.max()),
            }
            if len(scores_n) <= LOGGED_ROWS:
                line["scores"] = {
                    "champion": answered_n.tolist(),
                    "challenger": scores_n.tolist(),
                }
            file.parent.mkdir(parents=True, exist_ok=True)
            # Opened each time, so that the file may be moved away; written at once, so that another
            # replica's line doesn't come between.
            with file.open("ab", buffering=0) as lines:
                lines.write(json.dumps(line).encode() + b"\n")
            done = "scored"
        except Exception as error:
            # Whatever a model raises, the answer has gone out.
            log.error(f"shadow of model {model!r} for request {request} failed: {error!r}")
            done = "failed"
        with self._lock:
            self.counts[model, done] += 1
            self._waiting -= 1


def _step_back() -> None:
    """The thread gets what CPU the others leave; only Linux has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
