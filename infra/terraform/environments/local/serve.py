"""Keeps the registry's champions served on a Ray cluster; started by this environment's Terraform.

Waits for a first champion. A run that has just registered one serves it itself, so a young champion
is left to it for a while.
"""

import argparse
import signal
import sys
import threading
from datetime import UTC, datetime

from cluster import session
from models.registry import Registry
from serving import app

YOUNG_S = 60.0
LOOK_S = 5.0


def main() -> None:
    """Serves until TERM, or until the cluster or what it serves is gone."""
    parser = argparse.ArgumentParser(description="Keep the champions served.")
    parser.add_argument("--address", required=True, help="the Ray head, host:port")
    parser.add_argument("--tracking", required=True, help="URI of the registry")
    parser.add_argument("--port", required=True, type=int, help="port to serve on")
    given = parser.parse_args()
    ended = threading.Event()
    with session.connect(address=given.address):
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        print("serve: waits for a champion", flush=True)
        while not ended.is_set() and not _settled(given.tracking):
            ended.wait(LOOK_S)
        served = False
        while not ended.is_set():
            # Where it runs already, maybe as `liftyard serve` set it up, this only asks whether it
            # is well.
            here = app.follow(given.tracking)
            url = here.listener.url if here else app.serve(given.tracking, port=given.port)
            if not served:
                print(f"serve: serves {url}", flush=True)
                served = True
            ended.wait(LOOK_S)


def _settled(tracking: str) -> bool:
    """Whether there is a champion, and none so young that its run may be about to serve it."""
    cards = Registry(tracking).models()
    # What has no features isn't served by row.
    champions = [card for card in cards if "champion" in card.aliases and card.features]
    now = datetime.now(UTC)
    ages = [(now - datetime.fromisoformat(card.created)).total_seconds() for card in champions]
    return bool(ages) and min(ages) > YOUNG_S


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        # Its keeper starts it again.
        sys.exit(f"serve: {error}")
