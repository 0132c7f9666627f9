"""What every request passes: who asks, whether they may, and what is kept of it."""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from serving import traces
from serving.access import Access, Denied, UnknownSigner
from serving.audit import Audit, AuditError
from serving.fleet import Fleet
from serving.metrics import Metrics
from serving.rates import Rates, RatesError
from serving.settings import Settings
from serving.traces import Traces

log = logging.getLogger("ray.serve")

# The digest of a larger body is taken in a thread.
LARGE_BYTES = 2**18

T = TypeVar("T")

# What a client may call its request, in full; anything else is given a new id.
REQUEST_ID = "[A-Za-z0-9._-]{1,64}"
_ID = re.compile(REQUEST_ID.encode())


@dataclass(kw_only=True, slots=True)
class Asked:
    """One request as the gate sees it.

    Attributes:
        id: The client's `X-Request-ID`, or a new one.
        action: One of `policy.ACTIONS`, or None for what is open to all.
        model: The name asked for.
        who: The key's name or the token's subject, where one was shown and known.
        role: Of who was let in.
        trace: The trace's id, where traces are on.
        way: How it came: "json", "arrow", "grpc" or "graphql".
        body: What came with it, once that is read; the audit log keeps its digest.
        began: `time.perf_counter` on arrival.
    """

    id: str
    action: str | None
    model: str | None
    who: str | None = None
    role: str | None = None
    trace: str | None = None
    way: str = "json"
    body: bytes | None = None
    began: float = field(default_factory=time.perf_counter)


class Gate:
    """Access, audit, metrics, traces and the log lines of a replica."""

    def __init__(self, settings: Settings, fleet: Fleet | None = None) -> None:
        """Opens what the settings name.

        Args:
            settings: They.
            fleet: The replicas of which this is one; None for one by itself.

        Raises:
            AccessError: The keys or the policy can't be used.
            AuditError: The audit log goes on from no whole line.
            OSError: One of the files can't be read or written.
        """
        self.settings = settings
        # An issuer that is away for a while is no reason not to answer those with keys.
        self._access, self._audit = self.opened(settings, fetch=False)
        self._traces = None if settings.traces is None else Traces(settings.traces)
        self._fetching: asyncio.Task[None] | None = None
        self.metrics = Metrics()
        self.rates = Rates()
        self.fleet = fleet or Fleet()
        self._start = secrets.token_hex(6)
        self._count = 0

    @staticmethod
    def opened(settings: Settings, *, fetch: bool = True) -> tuple[Access | None, Audit | None]:
        """What the settings name, ready to be used.

        Args:
            settings: They.
            fetch: Whether an issuer of tokens has to give its keys at once.

        Raises:
            AccessError, AuditError, OSError: As the constructor; also, the issuer gives no keys.
        """
        files = settings.access
        if files is None:
            return None, None
        access = Access(files)
        if fetch and access.tokens is not None:
            access.tokens.fetch()
        return access, None if files.audit is None else Audit(Path(files.audit))

    def adapt(self, settings: Settings, access: Access | None, audit: Audit | None) -> None:
        """Goes by other settings from now on.

        Args:
            settings: They.
            access: With `audit`, what `opened` made of them.
            audit: See `access`.
        """
        if settings.access != self.settings.access:
            self._access, self._audit = access, audit
            self._fetch()
        if settings.traces != self.settings.traces:
            if self._traces is not None:
                # It waits for its endpoint.
                close = self._traces.close
                threading.Thread(target=close, name="traces end", daemon=True).start()
            self._traces = None if settings.traces is None else Traces(settings.traces)
        self.settings = settings

    def _fetch(self) -> None:
        """Has the issuer's keys fetched for as long as that issuer is asked."""
        if self._fetching is not None:
            self._fetching.cancel()
            self._fetching = None
        if self._access is not None and self._access.tokens is not None:
            self._fetching = asyncio.create_task(self._access.tokens.keep_fresh())

    async def keep_fresh(self) -> None:
        """Follows the keys and the policy for as long as the replica lives."""
        said = ""
        self._fetch()
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

    def asked(
        self,
        action: str | None,
        model: str | None,
        sent_id: bytes | None,
        traceparent: bytes | None = None,
    ) -> Asked:
        """A request that has arrived.

        Args:
            action: See `Asked`.
            model: See `Asked`.
            sent_id: The client's own id.
            traceparent: The client's W3C trace context.
        """
        if sent_id is not None and _ID.fullmatch(sent_id):
            asked = Asked(id=sent_id.decode(), action=action, model=model)
        else:
            self._count += 1
            asked = Asked(id=f"{self._start}-{self._count}", action=action, model=model)
        if self._traces is not None and action is not None:
            told = {"liftyard.request": asked.id, "liftyard.model": model or ""}
            asked.trace = self._traces.begin(action, traceparent, told)
        return asked

    async def admit(self, asked: Asked, authorization: str | None) -> None:
        """Lets the request in; waits where an issuer has to be asked for a token's key.

        Raises:
            Denied: It isn't allowed.
        """
        access = self._access
        if access is None or asked.action is None:
            return
        with traces.step("admit"):
            try:
                asker = access.allow(authorization, asked.action, asked.model)
            except UnknownSigner:
                if access.tokens is None or not await access.tokens.refresh():
                    raise
                asker = access.allow(authorization, asked.action, asked.model)
            if (rate := access.rate(asker.role)) is not None:
                await self._take(asker.who, *rate)
            asked.who, asked.role = asker

    async def _take(self, who: str, per_s: float, burst: int) -> None:
        try:
            wait_s = await self.rates.take(who, per_s, burst)
        except RatesError as error:
            reason = f"{error}; send it again"
            raise Denied(503, reason, who=who, retry_after_s=1) from error
        if wait_s:
            reason = f"over {per_s:g} requests a second; slow down"
            raise Denied(429, reason, who=who, retry_after_s=max(1, round(wait_s + 0.5)))

    def may(self, asked: Asked, action: str, model: str) -> bool:
        """Whether who was let in may also do this."""
        if self._access is None:
            return True
        return asked.role is not None and self._access.may(asked.role, action, model)

    def visible(
        self, asked: Asked, action: str, model: str | None, values: Mapping[str, T]
    ) -> dict[str, T]:
        """Of values by field, those that who was let in may be shown.

        Args:
            asked: The request.
            action: What the answer is of; for one request that asks for several, each its own.
            model: The model that it is about, or None.
            values: By the field's name.
        """
        access, role = self._access, asked.role
        if access is None:
            return dict(values)
        if role is None:
            return {}
        return {
            field: value
            for field, value in values.items()
            if access.may(role, action, model, field)
        }

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
            line = {
                "time": now,
                "request": asked.id,
                "who": asked.who,
                "action": asked.action,
                "model": asked.model,
                "status": status,
                "body_sha256": digest,
                **told,
            }
            try:
                with traces.step("audit"):
                    await self._audit.written(line)
            except (AuditError, OSError) as error:
                log.error(f"no answer without its line in the audit log: {error}")
                raise

    def done(self, asked: Asked, status: int, served: Container[Any]) -> None:
        """Counts the request, and logs one that failed."""
        seconds = time.perf_counter() - asked.began
        # Any other name is the client's invention, and would grow the metrics without end.
        model = asked.model if asked.model in served else None
        self.metrics.seen(asked.way, asked.action or "other", model or "", status, seconds)
        if self._traces is not None and asked.trace is not None:
            self._traces.end(
                {"http.response.status_code": status, "enduser.id": asked.who},
                failed=status >= 500,
            )
        if status >= 400:
            line = {
                "event": "refused" if status < 500 else "failed",
                "request": asked.id,
                "trace": asked.trace,
                "who": asked.who,
                "action": asked.action,
                "model": asked.model,
                "status": status,
                "seconds": round(seconds, 6),
            }
            log.warning(json.dumps(line))


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
