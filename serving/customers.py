"""Customers by their id: their latest features, and with new events. Knows nothing of HTTP."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from serving.online import Customer, Stores, moment
from serving.replica import Served
from serving.schema import Problem, RequestError

# The body as the OpenAPI page shows it.
BODY: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "at": {"type": "string", "format": "date-time"},
                        "events": {
                            "type": "object",
                            "additionalProperties": {"type": "array", "items": {"type": "object"}},
                        },
                    },
                }
            }
        },
    }
}

Events = Mapping[str, Sequence[Mapping[str, Any]]]


def parse(body: bytes) -> tuple[Events, datetime | None]:
    """The new events, by group, and the moment that they lead up to; of an empty body neither.

    Raises:
        RequestError: With status 400 the body isn't JSON; with 422 it isn't of this form.
    """
    if not body.strip():
        return {}, None
    try:
        said = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        reason = f"the body is not JSON: {error}; send an object with 'at' and 'events', or none"
        raise RequestError([Problem(reason=reason)], status=400) from error
    if not isinstance(said, dict) or said.keys() - {"at", "events"}:
        raise RequestError([Problem(reason="send an object with 'at' and 'events', or no body")])
    events = said.get("events", {})
    if not isinstance(events, dict) or not all(isinstance(each, list) for each in events.values()):
        reason = "give lists of events by their group of features"
        raise RequestError([Problem(field="events", reason=reason)])
    if "at" not in said:
        if events:
            reason = "missing; give the moment that the events lead up to"
            raise RequestError([Problem(field="at", reason=reason)])
        return {}, None
    try:
        return events, moment(said["at"])
    except ValueError as error:
        raise RequestError([Problem(field="at", reason=str(error))]) from error


def known(stores: Stores | None, said: str, events: Events, at: datetime | None) -> Customer:
    """The customer's features: the latest, or with new events as of a moment.

    Raises:
        RequestError: With status 404 there is no such customer, or no store; with 422 the events
            don't fit.
    """
    if stores is None:
        reason = "no online features are served here; name a `store` in serve.yaml"
        raise RequestError([Problem(reason=reason)], status=404)
    store = stores.now
    found = store.customer(said) if at is None else store.folded(said, events, at)
    if found is None:
        reason = f"no customer {said!r}; new ones are scored with their events, or published next"
        raise RequestError([Problem(field="customer", reason=reason)], status=404)
    return found


def missing(served: Served, customer: Customer) -> list[str]:
    """The model's features that the customer's don't have."""
    names = served.scorer.encoder.feature_names
    return [name for name in names if name not in customer.features]


def row(served: Served, customer: Customer) -> dict[str, Any]:
    """The customer's features that the model takes.

    Raises:
        RequestError: It takes others too.
    """
    if absent := missing(served, customer):
        reason = f"the model takes {absent}, which the online features don't have; publish them"
        raise RequestError([Problem(reason=reason)])
    return {name: customer.features[name] for name in served.scorer.encoder.feature_names}
