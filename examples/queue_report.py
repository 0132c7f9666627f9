"""Queues a report that waits for its features, and does both again every weekday at 02:30.

    python examples/queue_report.py --home .liftyard --env local

Run it twice: the second time it queues nothing new. `python -m jobs.dispatch` runs what is queued.
"""

import argparse
import sys
from pathlib import Path

from jobs.queue import Queue, Spec, file_of


def main() -> None:
    """Queues, and prints the ids."""
    parser = argparse.ArgumentParser(description="Queue a report.")
    parser.add_argument("--home", type=Path, default=Path(".liftyard"))
    parser.add_argument("--env", default="local")
    given = parser.parse_args()
    queue = Queue(file_of(given.env, given.home))
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

    features = queue.submit(step("open('features.txt', 'w').write('42')"))
    report = step("print('customers:', open('features.txt').read())", features)
    queue.set_team("crm", quota_cpus=2)
    queue.set_schedule("report", "30 2 * * 1-5", report, zone="Europe/Berlin")
    print(features, queue.submit(report))


if __name__ == "__main__":
    main()
