"""Queues a report that waits for its features, and does both again every weekday at 02:30.

    liftyard up
    python examples/queue_report.py --home .liftyard --env local

Run it twice: the second time it queues nothing new. The dispatcher, which `liftyard up` started,
runs what is queued; `liftyard jobs` lists it.
"""

import argparse
import sys
from pathlib import Path

from cluster import environment
from jobs import queue
from jobs.queue import Spec


def main() -> None:
    """Queues, and prints the ids."""
    parser = argparse.ArgumentParser(description="Queue a report.")
    parser.add_argument("--home", type=Path, default=Path(".liftyard"))
    parser.add_argument("--env", default="local")
    given = parser.parse_args()
    there = queue.of(environment.load(given.env, home=given.home))
    folder = str(Path.cwd())

    def step(line: str, *after: str) -> Spec:
        return Spec(
            command=(sys.executable, "-c", line),
            folder=folder,
            team="crm",
            after=after,
            timeout_s=600,
            retries={"lost": 5, "failed": 1},
        )

    features = there.submit(step("open('features.txt', 'w').write('42')"))
    report = step("print('customers:', open('features.txt').read())", features)
    there.set_team("crm", quota_cpus=2)
    there.set_schedule("report", "30 2 * * 1-5", report, zone="Europe/Berlin")
    print(features, there.submit(report))


if __name__ == "__main__":
    main()
