"""What a replica serves, and how much it takes."""

import hashlib
import json
from dataclasses import asdict, dataclass

from serving.access import AccessFiles


class ServingError(ValueError):
    """Serving can't start as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica takes before it says no.

    Attributes:
        rows: Rows of a request; more are answered 422.
        explained_rows: Rows of a request to explain; a row takes as long as a thousand to score.
        body_bytes: Bytes of a request's body; more are answered 413.
        ongoing: Requests worked on at a time.
        queued: Requests that wait for that; further ones are answered 429 with Retry-After.
    """

    rows: int = 10_000
    explained_rows: int = 100
    body_bytes: int = 32 * 2**20
    ongoing: int = 128
    queued: int = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica serves.

    Attributes:
        registry: URI of the registry.
        models: Names, or None for all that have a champion.
        limits: See `Limits`.
        refresh_s: Seconds between two looks for new champions, and for changed keys.
        access: Keys, policy and audit log; None lets everyone in who reaches the address.
    """

    registry: str
    models: tuple[str, ...] | None
    limits: Limits
    refresh_s: float
    access: AccessFiles | None = None

    def digest(self) -> str:
        """The same for the same settings; tells them apart without telling them."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
