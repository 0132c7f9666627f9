"""Prints runs, environments, models and jobs as tables."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.environment import Environment
from cluster.local import Status
from jobs.runs import Run
from jobs.submission import Job
from models.registry import Card


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
    if "serve" in details:
        console.print(f"scored over HTTP at {details['serve']['serve_url']}", soft_wrap=True)
    console.print(f"summary: {done.folder / 'summary.json'}", soft_wrap=True)
    console.print(f"report:  {done.folder / 'report.html'}", soft_wrap=True)


def environment(where: Environment, console: Console) -> None:
    """An environment's addresses."""
    table = Table("environment", where.name)
    for name, value in asdict(where).items():
        if name != "name" and value is not None:
            table.add_row(name, value)
    console.print(table)


def status(found: Status, console: Console) -> None:
    """What an environment has and does."""
    nodes = Table("node", "CPUs", "GPUs", "memory GiB")
    for node in found.nodes:
        name = f"{node.address} (head)" if node.head else node.address
        nodes.add_row(name, f"{node.cpus:g}", f"{node.gpus:g}", f"{node.memory_bytes / 2**30:.1f}")
    console.print(nodes)
    dask = "none" if found.dask_workers is None else str(found.dask_workers)
    jobs = ", ".join(f"{count} {name}" for name, count in sorted(found.jobs.items())) or "none"
    console.print(f"actors: {found.actors}   Dask workers: {dask}   jobs: {jobs}")


def jobs(found: Sequence[Job], console: Console) -> None:
    """Jobs, oldest first."""
    table = Table("job", "status", "submitted (UTC)", "seconds", "message")
    for job in found:
        took = job.ended - job.started if job.started and job.ended else None
        seconds = "" if took is None else f"{took.total_seconds():.0f}"
        started = f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else ""
        table.add_row(job.id, job.status, started, seconds, job.message)
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


def _scored(name: str, rows: list[dict[str, Any]]) -> Table:
    keys = [key for key in rows[0] if key != "score"] if rows else []
    table = Table(*keys, f"{name} score")
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys), f"{row['score']:.4f}")
    return table
