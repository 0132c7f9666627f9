"""A client of what is served: rows, tables, customers and texts in, typed answers out.

    with Client("http://127.0.0.1:8000", key=key) as client:
        client.score("lapse_30d", [{"visits": 3, "spend": None}]).scores

What fails:

    ClientError
    ├── Refused      the service answered that it won't, and why
    ├── TimedOut     there was no answer in time
    └── Unreachable  there was no answer at all

Knows nothing of how anything is served but the addresses and forms of `docs/serving.md`.
"""

import json
import random
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import httpx
import numpy as np
import polars as pl
import pyarrow as pa
from polars import selectors

from serving.client_answers import (
    Customer,
    CustomerScore,
    Explained,
    Explanation,
    Labelled,
    Labels,
    Model,
    ModelScore,
    Scores,
)

# The variable with the key of a service that asks for one.
API_KEY = "LIFTYARD_API_KEY"

ARROW = "application/vnd.apache.arrow.stream"

# Not worked on, says the service; by the same request it may be a moment later.
_AGAIN = (429, 503)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0

# So that many clients that were refused at once don't come back at once.
_jitter = random.SystemRandom()


class ClientError(OSError):
    """There is no answer; the message says why."""


class Refused(ClientError):
    """The service won't answer.

    Attributes:
        status: The HTTP status.
        detail: The reason, as the service has it: words, or a list of problems.
        request_id: By which its log has the request.
    """

    def __init__(self, message: str, *, status: int, detail: Any, request_id: str | None) -> None:
        super().__init__(message)
        self.status, self.detail, self.request_id = status, detail, request_id


class TimedOut(ClientError):
    """There was no answer in the time that the client has."""


class Unreachable(ClientError):
    """Nothing answers at the address."""


class Streamed(Protocol):
    """A table of any library that hands out Arrow: pyarrow, polars, pandas, duckdb, ..."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """The table as an Arrow C stream."""


class Client:
    """Asks one service; threads may share it.

    Every question is one that may be asked again, so what fails on the way, or finds the service
    full (429) or not ready (503), is, after a wait that doubles each time, or that the service
    names (`Retry-After`).
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        deadline_s: float = 60,
        retries: int = 6,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: The service, such as `http://127.0.0.1:8000`.
            key: An API key or an OIDC token, where the service asks for one.
            deadline_s: How long a question may take, with its retries. The service is told what
                is left, so that it doesn't work for nobody.
            retries: How often a question is asked again.
            tls: Whom to believe, and a certificate of one's own where the service asks for it
                (`ssl.create_default_context`); None believes whom the system does.

        Raises:
            ValueError: `url`, `deadline_s` or `retries` isn't as it must be.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address; give one such as http://127.0.0.1:8000")
        if not 0 < deadline_s < 1e6 or retries < 0:
            raise ValueError(
                f"deadline_s is {deadline_s} and retries {retries}; give above 0 s and at least 0"
            )
        self.url = url.rstrip("/")
        self._deadline_s, self._retries = deadline_s, retries
        self._http = httpx.Client(
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            verify=True if tls is None else tls,
        )

    def __enter__(self) -> "Client":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Ends its connections."""
        self._http.close()

    def score(
        self, model: str, rows: Sequence[Mapping[str, Any]], *, routing_key: str | None = None
    ) -> Scores:
        """The scores of a few rows.

        Args:
            model: Its name, or an alias of the service's.
            rows: Each has every feature of the model; None or NaN where there is no value.
            routing_key: While a canary runs, the same key gets the same version.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        found = self._rows(f"/v1/models/{_part(model)}/score", rows, routing_key)
        return Scores(
            model=found["model"],
            version=found["version"],
            scores=np.array(found["scores"], dtype=np.float64),
        )

    def score_table(self, model: str, table: Streamed, *, routing_key: str | None = None) -> Scores:
        """The scores of a table's rows, by Arrow; many at once, as the service's limits allow.

        Args:
            model: Its name, or an alias of the service's.
            table: The features of the model and no others; null or NaN where there is no value.
            routing_key: While a canary runs, the same key gets the same version.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        path = f"/v1/models/{_part(model)}/score"
        headers = {"content-type": ARROW, **_routed(routing_key)}
        answer = self._ask("POST", path, headers, _stream(table))
        scored = pa.ipc.open_stream(answer.content).read_all()
        about = scored.schema.metadata
        return Scores(
            model=about[b"model"].decode(),
            version=int(about[b"version"]),
            scores=scored["score"].to_numpy(),
        )

    def explain(self, model: str, rows: Sequence[Mapping[str, Any]]) -> Explained:
        """Why rows have their scores: what each feature adds, and the main reasons in words.

        Args:
            model: Its name, or an alias of the service's.
            rows: As `score` takes them.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        found = self._rows(f"/v1/models/{_part(model)}/explain", rows)
        return Explained(
            model=found["model"],
            version=found["version"],
            scale=found["scale"],
            explanations=[Explanation(**_of(Explanation, each)) for each in found["explanations"]],
        )

    def customer(self, customer: int | str) -> Customer:
        """A customer's latest features and scores.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        found = self._ask("GET", f"/v1/customers/{_part(customer)}").json()
        scores = {
            name: ModelScore(**_of(ModelScore, each)) for name, each in found["scores"].items()
        }
        return Customer(**{**_of(Customer, found), "scores": scores})

    def score_customer(
        self,
        model: str,
        customer: int | str,
        *,
        events: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        at: str | None = None,
    ) -> CustomerScore:
        """A customer's score by the latest features, or by events that are new.

        Args:
            model: Its name, or an alias of the service's.
            customer: Of the service's store.
            events: Rows by their group of features; they go with `at`.
            at: The moment that is scored, ISO 8601.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        said = {name: each for name, each in (("at", at), ("events", events)) if each is not None}
        path = f"/v1/models/{_part(model)}/customers/{_part(customer)}"
        found = self._ask("POST", path, body=_json(said) if said else b"").json()
        return CustomerScore(**_of(CustomerScore, found))

    def sentiment(self, texts: Sequence[str]) -> Labels:
        """What texts say, by the champion of texts.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        found = self._ask("POST", "/v1/sentiment", body=_json({"texts": list(texts)})).json()
        results = [Labelled(**_of(Labelled, each)) for each in found["results"]]
        return Labels(model=found["model"], version=found["version"], results=results)

    def models(self) -> dict[str, Model]:
        """What is served, by name.

        Raises:
            ClientError: There is no answer; the subclass says of which kind.
        """
        found = self._ask("GET", "/v1/models").json()["models"]
        return {each["name"]: Model(**_of(Model, each)) for each in found}

    def _rows(
        self, path: str, rows: Sequence[Mapping[str, Any]], routing_key: str | None = None
    ) -> Any:
        # JSON has no NaN.
        clean = [
            {name: None if value != value else value for name, value in row.items()} for row in rows
        ]
        headers = {"content-type": "application/json", **_routed(routing_key)}
        return self._ask("POST", path, headers, _json({"rows": clean})).json()

    def _ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> httpx.Response:
        """The answer with status 200, however often it takes to ask."""
        until = time.monotonic() + self._deadline_s
        for tried in range(self._retries + 1):
            left_s = until - time.monotonic()
            failed, wait_s = self._once(method, path, headers, body, left_s)
            if isinstance(failed, httpx.Response):
                return failed
            if wait_s is None:
                raise failed
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**tried)
            wait_s = max(wait_s, _jitter.uniform(longest / 2, longest))
            if tried == self._retries or time.monotonic() + wait_s >= until:
                raise failed
            time.sleep(wait_s)
        raise AssertionError("unreachable: the last try answers or raises")

    def _once(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None,
        body: bytes | None,
        left_s: float,
    ) -> tuple[httpx.Response | ClientError, float | None]:
        """An answer, or why there is none and the seconds to wait; None where it won't help."""
        timed = {"x-deadline-ms": str(max(1, int(left_s * 1000)))}
        try:
            answer = self._http.request(
                method, self.url + path, headers={**timed, **(headers or {})}, content=body,
                timeout=max(left_s, 0.001),
            )  # fmt: skip
        except httpx.TimeoutException:
            return self._late(), None
        except httpx.TransportError as error:
            said = f"{self.url} can't be reached ({error}); is it served? see `liftyard status`"
            return Unreachable(said), 0
        if answer.status_code == 200:
            return answer, None
        if answer.status_code == 504:
            return self._late(), None
        wait_s = _retry_after_s(answer) if answer.status_code in _AGAIN else None
        return self._refused(answer), wait_s

    def _late(self) -> TimedOut:
        return TimedOut(
            f"{self.url} gave no answer in {self._deadline_s:g} s; ask for less at once, or give "
            "it longer by deadline_s"
        )

    def _refused(self, answer: httpx.Response) -> Refused:
        try:
            detail = answer.json()["detail"]
        except (json.JSONDecodeError, KeyError, TypeError):
            detail = answer.text[:2_000]
        said = f"{self.url} answered {answer.status_code}: {_said(detail)}"
        if answer.status_code == 401:
            said += f"; make a key with `liftyard keys add`, and give it in {API_KEY}"
        return Refused(
            said,
            status=answer.status_code,
            detail=detail,
            request_id=answer.headers.get("x-request-id"),
        )


def _part(name: int | str) -> str:
    """Of an address: no name leads to another route."""
    return quote(str(name), safe="")


def _of(made: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the class has a field for: a newer service may say more."""
    return {name: found[name] for name in made.__dataclass_fields__}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _routed(key: str | None) -> dict[str, str]:
    return {} if key is None else {"x-routing-key": key}


def _stream(table: Streamed) -> bytes:
    # The service takes strings as they are, without a dictionary.
    plain = pl.DataFrame(table).cast({selectors.categorical() | selectors.enum(): pl.String})
    sent = plain.to_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, sent.schema) as writer:
        writer.write_table(sent)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _retry_after_s(answer: httpx.Response) -> float:
    said = answer.headers.get("retry-after", "")
    # The other form is a date, which no service here sends.
    return float(said) if said.isascii() and said.isdigit() else 0


def _said(detail: Any) -> str:
    """The reasons in one line, the first few of them."""
    if not isinstance(detail, list):
        return str(detail)
    told = []
    for each in detail[:5]:
        row = "" if each.get("row") is None else f"row {each['row']} "
        told.append(f"{row}{each.get('field') or ''} {each.get('reason', each)}".strip())
    more = f"; and {len(detail) - 5} more" if len(detail) > 5 else ""
    return "; ".join(told) + more
