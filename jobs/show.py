"""Prints runs, environments, models and jobs as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.environment import Environment, Prices
from cluster.local import Status
from jobs.queue import Queued
from jobs.runs import Run
from models.registry_versions import Card


def run(done: Run, console: Console) -> None:
    """Steps, champions, scored rows and the addresses of the results."""
    steps = Table("step", "seconds", "rows in", "rows out", "engine", "device")
    for step in done.steps:
        steps.add_row(
            step.name,
            f"{step.seconds:.1f}",
            f"{step.rows_in:,}",
            f"{step.rows_out:,}",
            step.engine,
            step.device,
        )
    console.print(steps)
    details = {step.name: step.detail for step in done.steps}
    if "sentiment" in details:
        told = details["sentiment"]
        console.print(
            f"{told['name']} version {told['version']}: macro-F1 "
            f"{told['metrics']['macro_f1']:.4f} on texts held out "
            f"(TF-IDF: {told['tfidf_macro_f1']:.4f})"
        )
        for table, scored in told["scored"].items():
            for alarm in scored["alarms"]:
                console.print(
                    f"alarm: {table}, {alarm['by']} {alarm['value']}: {alarm['reason']}",
                    style="yellow",
                    markup=False,
                )
    if "register" in details:
        targets = details["register"]["targets"]
        console.print(_targets(targets))
        for name, target in targets.items():
            done_so = "promoted" if target["promoted"] else "not promoted, stays challenger"
            console.print(
                f"{name} version {target['model_version']}: {done_so}: {target['reason']}"
            )
    for name, rows in details.get("serve", {}).get("scored", {}).items():
        console.print(_scored(name, rows))
        if why := details["serve"].get("explained", {}).get(name):
            console.print(_explained(name, why), markup=False, soft_wrap=True)
    if "serve" in details:
        console.print(f"scored over HTTP at {details['serve']['serve_url']}", soft_wrap=True)
    console.print(f"summary: {done.folder / 'summary.json'}", soft_wrap=True)
    console.print(f"report:  {done.folder / 'report.html'}", soft_wrap=True)


def environment(where: Environment, console: Console) -> None:
    """An environment's addresses."""
    table = Table("environment", where.name)
    for name, value in asdict(where).items():
        if name not in ("name", "prices") and value is not None:
            table.add_row(name, value)
    console.print(table)


def status(found: Status, queued: Sequence[Queued], prices: Prices, console: Console) -> None:
    """What an environment has and does, and what it costs."""
    nodes = Table("node", "CPUs", "GPUs", "memory GiB")
    for node in found.nodes:
        name = f"{node.address} (head)" if node.head else node.address
        nodes.add_row(name, f"{node.cpus:g}", f"{node.gpus:g}", f"{node.memory_bytes / 2**30:.1f}")
    console.print(nodes)
    dask = "none" if found.dask_workers is None else str(found.dask_workers)
    states = Counter(job.state for job in queued)
    jobs = ", ".join(f"{count} {name}" for name, count in sorted(states.items())) or "none"
    console.print(f"actors: {found.actors}   Dask workers: {dask}   jobs: {jobs}")
    held = {"cpus": found.cpus, "gpus": found.gpus}
    console.print(
        f"cost per hour: {prices.cost(**held):.2f}   CO2 per hour: {prices.carbon_g(**held):.0f} g",
        soft_wrap=True,
    )
    spent = sum(job.cost for job in queued), sum(job.carbon_g for job in queued)
    console.print(f"all jobs so far: cost {spent[0]:.4f}, CO2 {spent[1]:.1f} g", soft_wrap=True)


def jobs(found: Sequence[Queued], console: Console) -> None:
    """Jobs, oldest first."""
    table = Table()
    for name in ("job", "what", "state", "attempt", "team", "priority", "waited s", "ran s", "cost",
                 "CO2 g"):  # fmt: skip
        table.add_column(name, no_wrap=name in ("job", "state"))
    for job in found:
        table.add_row(
            job.id,
            _what(job.spec.command),
            job.state,
            str(job.attempt),
            job.spec.team,
            str(job.spec.priority),
            f"{job.waited_s:.0f}",
            f"{job.seconds:.0f}",
            f"{job.cost:.4f}",
            f"{job.carbon_g:.1f}",
        )
    console.print(table)
    for job in found:
        if job.message:
            console.print(f"{job.id}: {job.message}", soft_wrap=True, markup=False)


def _what(command: Sequence[str]) -> str:
    """The pipeline's file or the module that a command runs, else its program."""
    files = [Path(word).name for word in command if word.endswith((".yaml", ".yml"))]
    module = [command[n + 1] for n, word in enumerate(command[:-1]) if word == "-m"]
    return (files or module or [Path(command[0]).name])[0]


def teams(found: Mapping[str, tuple[float | None, float | None, float]], console: Console) -> None:
    """Teams, their quotas and shares."""
    table = Table("team", "quota of CPUs", "quota of GPUs", "share")
    for name, (cpus, gpus, share) in found.items():
        quotas = ("none" if quota is None else f"{quota:g}" for quota in (cpus, gpus))
        table.add_row(name, *quotas, f"{share:g}")
    console.print(table)


def schedules(found: Mapping[str, tuple[str, str, datetime]], console: Console) -> None:
    """Schedules, and when they are due next."""
    table = Table("schedule", "cron", "zone", "due next (UTC)")
    for name, (cron, zone, due) in found.items():
        table.add_row(name, cron, zone, f"{due:%Y-%m-%d %H:%M}")
    console.print(table)


def models(cards: Sequence[Card], console: Console) -> None:
    """Every version of every model."""
    table = Table("model", "version", "alias", "family", "AUC", "lift 10 %", "data")
    for card in cards:
        table.add_row(
            card.name,
            str(card.version),
            ", ".join(card.aliases),
            card.family,
            f"{card.metrics['auc']:.4f}",
            f"{card.metrics['top_decile_lift']:.2f}",
            card.data_version,
        )
    console.print(table)


def _targets(targets: dict[str, Any]) -> Table:
    table = Table(
        "target", "version", "family", "AUC", "baseline", "AP", "lift 10 %",
        title="champions and challengers on the test rows",
    )  # fmt: skip
    for name, target in targets.items():
        baseline = target["baseline"]
        table.add_row(
            name,
            str(target["model_version"]),
            target["family"],
            f"{target['test_auc']:.4f}",
            "" if baseline is None else f"{baseline['auc']:.4f}",
            f"{target['test_average_precision']:.4f}",
            f"{target['top_decile_lift']:.2f}",
        )
    return table


def _explained(name: str, why: dict[str, Any]) -> str:
    who = ", ".join(f"{key} {why[key]}" for key in why if key not in ("score", "reasons"))
    lines = [f"{name} of {who} is {why['score']:.4f}, mainly for:"]
    return "\n".join([*lines, *(f"  {reason}" for reason in why["reasons"])])


def _scored(name: str, rows: list[dict[str, Any]]) -> Table:
    keys = [key for key in rows[0] if key != "score"] if rows else []
    table = Table(*keys, f"{name} score")
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys), f"{row['score']:.4f}")
    return table
