"""What every request passes: who asks, whether they may, and what is kept of it."""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.access import Access
from serving.audit import Audit, AuditError
from serving.metrics import Metrics
from serving.settings import Settings

log = logging.getLogger("ray.serve")

# The digest of a larger body is taken in a thread.
LARGE_BYTES = 2**18

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


@dataclass(kw_only=True)
class Asked:
    """One request as the gate sees it.

    Attributes:
        id: The client's `X-Request-ID`, or a new one.
        action: One of `access.ACTIONS`, or None for what is open to all.
        model: The name asked for.
        who: The key's name, where one was shown and known.
        began: `time.perf_counter` on arrival.
    """

    id: str
    action: str | None
    model: str | None
    who: str | None = None
    began: float = field(default_factory=time.perf_counter)


class Gate:
    """Access, audit, metrics and the log lines of a replica."""

    def __init__(self, settings: Settings) -> None:
        """Opens what the settings name.

        Raises:
            AccessError: The keys or the policy can't be used.
            AuditError: The audit log goes on from no whole line.
            OSError: One of the files can't be read or written.
        """
        self.settings = settings
        self._access, self._audit = self.opened(settings)
        self.metrics = Metrics()
        self._start = secrets.token_hex(6)
        self._count = 0

    @staticmethod
    def opened(settings: Settings) -> tuple[Access | None, Audit | None]:
        """What the settings name, ready to be used.

        Raises:
            AccessError, AuditError, OSError: As the constructor.
        """
        files = settings.access
        if files is None:
            return None, None
        return Access(files), None if files.audit is None else Audit(Path(files.audit))

    def adapt(self, settings: Settings, access: Access | None, audit: Audit | None) -> None:
        """Goes by other settings from now on.

        Args:
            settings: They.
            access: With `audit`, what `opened` made of them.
            audit: See `access`.
        """
        if settings.access != self.settings.access:
            self._access, self._audit = access, audit
        self.settings = settings

    async def keep_fresh(self) -> None:
        """Follows the keys and the policy for as long as the replica lives."""
        said = ""
        while True:
            await asyncio.sleep(self.settings.refresh_s)
            try:
                if self._access is not None:
                    self._access.reload()
                said = ""
            except (OSError, ValueError) as error:
                # What was read before holds; once is enough to say so.
                if str(error) != said:
                    log.error(f"keys and policy stay as they are: {error}")
                said = str(error)

    def asked(self, action: str | None, model: str | None, sent_id: bytes | None) -> Asked:
        """A request that has arrived."""
        if sent_id is not None and _ID.fullmatch(sent_id):
            return Asked(id=sent_id.decode(), action=action, model=model)
        self._count += 1
        return Asked(id=f"{self._start}-{self._count}", action=action, model=model)

    def admit(self, asked: Asked, authorization: str | None) -> None:
        """Lets the request in.

        Raises:
            Denied: It isn't allowed.
        """
        if self._access is not None and asked.action is not None:
            asked.who = self._access.allow(authorization, asked.action, asked.model)

    def may(self, asked: Asked, action: str, model: str) -> bool:
        """Whether who was let in may also do this."""
        if self._access is None:
            return True
        return asked.who is not None and self._access.may(asked.who, action, model)

    async def keep(
        self, asked: Asked, status: int, told: Mapping[str, Any], body: bytes | None
    ) -> None:
        """Puts the request on record; to be awaited before its answer is sent.

        Args:
            asked: The request.
            status: HTTP status of its answer.
            told: What else the audit log keeps, such as the version.
            body: The request's, of which the audit log keeps the digest; None where it wasn't read.

        Raises:
            AuditError, OSError: The audit log can't be written; then the answer isn't to be sent.
        """
        if self._audit is not None and asked.action is not None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            digest = None
            if body and len(body) > LARGE_BYTES:
                digest = await asyncio.to_thread(_digest, body)
            elif body:
                digest = _digest(body)
            try:
                await self._audit.written(
                    {
                        "time": now,
                        "request": asked.id,
                        "who": asked.who,
                        "action": asked.action,
                        "model": asked.model,
                        "status": status,
                        "body_sha256": digest,
                        **told,
                    }
                )
            except (AuditError, OSError) as error:
                log.error(f"no answer without its line in the audit log: {error}")
                raise

    def done(self, asked: Asked, status: int, served: Mapping[str, Any]) -> None:
        """Counts the request, and logs one that failed."""
        seconds = time.perf_counter() - asked.began
        # Any other name is the client's invention, and would grow the metrics without end.
        model = asked.model if asked.model in served else None
        self.metrics.seen(asked.action or "other", model or "", status, seconds)
        if status >= 400:
            line = {
                "event": "refused" if status < 500 else "failed",
                "request": asked.id,
                "who": asked.who,
                "action": asked.action,
                "model": asked.model,
                "status": status,
                "seconds": round(seconds, 6),
            }
            log.warning(json.dumps(line))


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
