"""What is told of the replicas, by whichever of them is asked: cards, health and figures of all."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from serving.answers import Answer
from serving.fleet import Report
from serving.gate import Gate
from serving.metrics import MEDIA_TYPE, exposition
from serving.replica import Models, Served


async def cards(models: Models, gate: Gate) -> Answer:
    """The cards of what is served, what was refused and why, and which replicas there are."""
    reports = await _reports(models, gate)
    told = dict(report(models, gate).cards)
    for model in models.elsewhere:
        # Its replicas may be a moment apart; the first speaks for it.
        alone = next((each for each in reports if each.alone == model), None)
        if alone is not None:
            for part, found in alone.cards.items():
                told[part] = told[part] + found if isinstance(found, list) else told[part] | found
    return Answer(value={**told, "replicas": [each.where() for each in reports]})


async def metrics(models: Models, gate: Gate) -> Answer:
    """The figures of all replicas."""
    reports = await _reports(models, gate)
    found = {each.replica: each.figures for each in reports}
    return Answer(value=exposition(found), media_type=MEDIA_TYPE)


async def health(models: Models, gate: Gate) -> dict[str, Any]:
    """Whether every replica is ready; this one's health, with that of models held elsewhere."""
    told = models.health()
    reports = await _reports(models, gate)
    absent = [*told["not_loaded"], *(models.elsewhere - {each.alone for each in reports})]
    for each in reports:
        if each.alone is not None:
            for part in ("models", "challengers", "refused", "refused_challengers"):
                told[part] |= each.health[part]
    ready = not absent and all(each.health["status"] == "ready" for each in reports)
    return {
        **told,
        "status": "ready" if ready else "not ready",
        "not_loaded": absent,
        "replicas": [{**each.where(), **each.health} for each in reports],
    }


async def _reports(models: Models, gate: Gate) -> list[Report]:
    """Of all replicas, this one first."""
    mine = report(models, gate)
    if not gate.fleet.several:
        return [mine]
    others = await gate.fleet.reports(models.settings.alone)
    return [mine, *(each for each in others if each.replica != mine.replica)]


def report(models: Models, gate: Gate) -> Report:
    """What a replica tells of itself."""
    return Report(
        replica=gate.fleet.replica,
        node=gate.fleet.node,
        alone=models.alone,
        device=f"{models.device.kind}: {models.device.reason}",
        health=models.health(),
        cards={
            "models": [_card(each) for each in models.served.values()],
            "challengers": [_card(each) for each in models.challengers.values()],
            "refused": _refusals(models.refused),
            "refused_challengers": _refusals(models.refused_challengers),
        },
        figures=gate.metrics.figures(models),
    )


def _card(served: Served) -> dict[str, Any]:
    return {**asdict(served.card), "device": asdict(served.device)}


def _refusals(by_model: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    return {name: {"version": v, "reason": reason} for name, (v, reason) in by_model.items()}
