"""Prints runs, models and jobs as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.runs import Run


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


def _targets(targets: dict[str, Any]) -> Table:
    table = Table(
        "best on validation", "version", "family", "test AUC", "baseline", "avg. prec.", "lift 10 %"
    )
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
