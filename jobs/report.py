"""A run's folder in, one HTML page of it out, that needs no network and no other file.

Reads what the steps wrote and trains, scores and measures nothing. A run that stopped early has a
page of what it got to.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cluster.files import replace_text
from jobs.sweep_board import LATENCY
from models import metrics

# Metric to its title, whether more is better, and its name in summary.json's targets.
METRICS: dict[str, tuple[str, bool, str]] = {
    name: (metric.title, metric.more, name if name == "top_decile_lift" else f"test_{name}")
    for name, metric in metrics.METRICS.items()
}
ABSENT = "\u2013"
TOP_FEATURES = 20
# Shares of rows that the table beside the gain curve shows.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)


class ReportError(ValueError):
    """A folder that isn't a run's, or a file in it that can't be read; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much of a family's validation AUC goes with one of its settings.

    Attributes:
        name: The setting.
        groups: Values, or groups of neighbouring values, that were compared.
        share: Share of the variance explained, 0 to 1; None where it can't be told.
    """

    name: str
    groups: int
    share: float | None


def write(folder: Path) -> Path:
    """Write `report.html` beside the run's summary.json, from the files in the folder.

    Args:
        folder: A run's folder, as `jobs.runs` makes it. `sweep-TARGET.jsonl` and
            `evaluation-TARGET.json` are shown where they are there.

    Returns:
        The page's path. The page that was there before is replaced as a whole.

    Raises:
        ReportError: There is no summary.json, or a file isn't what the steps write.
        OSError: The folder can't be written.
    """
    import jinja2

    from jobs import charts

    summary = _summary(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "measure": _measure, "value": _value}
    try:
        steps = {step["name"]: step for step in summary["steps"]}
        page = environment.get_template("report.html.jinja").render(
            run=summary,
            started=_started(summary["run_id"]),
            longest=max((step["seconds"] for step in summary["steps"]), default=0) or 1,
            tables=_tables(steps),
            features=steps["features"]["detail"] if "features" in steps else {},
            sentiment=_sentiment(folder / "sentiment.json"),
            scored=steps["sentiment"]["detail"]["scored"] if "sentiment" in steps else {},
            training=steps["training"]["detail"] if "training" in steps else {},
            targets=[_target(folder, name, summary) for name in _target_names(folder, summary)],
            roles=charts.ROLES,
            metrics=METRICS,
        )
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise ReportError(
            f"{folder}: its files aren't what this version's steps write "
            f"({type(error).__name__}: {error}). Run the pipeline again, or make the report with "
            "the version that ran it"
        ) from error
    replace_text(folder / "report.html", page)
    return folder / "report.html"


def explained(name: str, values: Sequence[Any], scores: Sequence[float]) -> Setting:
    """One-way epsilon squared (Kelley, 1935): the variance of scores between a setting's values.

    epsilon² = (SS_between - (k - 1) MS_within) / SS_total, at least 0: the share of the variance
    that k groups explain, less what k groups of noise would. Other settings aren't held still.

    Args:
        name: The setting's name.
        values: Its value in each variant. More than five numbers are grouped by fifths of rank.
        scores: Validation score of each variant.
    """
    from jobs import charts

    keys: list[Any] = [json.dumps(value) for value in values]
    if len(set(keys)) > 5 and all(charts.is_number(value) for value in values):
        keys = charts.fifths(np.asarray(values, dtype=np.float64)).tolist()
    y = np.asarray(scores, dtype=np.float64)
    groups = [y[np.array([key == group for key in keys])] for group in dict.fromkeys(keys)]
    free = len(y) - len(groups)
    total = float(((y - y.mean()) ** 2).sum())
    if len(groups) < 2 or free < 1 or total == 0:
        return Setting(name=name, groups=len(groups), share=None)
    within = float(sum(((group - group.mean()) ** 2).sum() for group in groups))
    share = (total - within - (len(groups) - 1) * within / free) / total
    return Setting(name=name, groups=len(groups), share=max(share, 0.0))


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    if not file.is_file():
        there = sorted(path.parent.name for path in folder.glob("*/summary.json"))
        help = f" Runs in it: {', '.join(there)}." if there else ""
        raise ReportError(
            f"no summary.json in {folder}.{help} Give a run's own folder, such as "
            "runs/20260131T120000-a1b2c3; `liftyard run PIPELINE` makes one"
        )
    content = _json(file)
    for key in ("run_id", "pipeline", "status", "seed", "git_revision", "steps"):
        if not isinstance(content, dict) or key not in content:
            raise ReportError(
                f"{file}: no {key!r} in it, so it isn't a run's summary. Run the pipeline again"
            )
    return {"serve_url": None, **content, "targets": content.get("targets") or {}}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(
            f"{file}: not JSON: {error}. Resume the run, so that it is written again"
        ) from error


def _started(run_id: str) -> str:
    """The start in UTC, which `jobs.runs` puts in the run's id."""
    try:
        moment = datetime.strptime(run_id[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return "not in the run's id"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _tables(steps: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By table, what ingest and validate told of it; None for a step that didn't get there."""
    told = {name: steps[name]["detail"] if name in steps else {} for name in ("ingest", "validate")}
    names = dict.fromkeys([*told["ingest"], *told["validate"]])
    return {name: {step: told[step].get(name) for step in told} for name in names}


def _sentiment(file: Path) -> dict[str, Any] | None:
    """What the sentiment step left, its metrics by slice."""
    if not file.is_file():
        return None
    told = dict(_json(file))
    slices: dict[str, dict[str, float]] = {}
    for name, value in told["metrics"].items():
        metric, _, part = name.partition(".")
        slices.setdefault(part.replace("_", " ") or "all", {})[metric] = value
    return {**told, "slices": slices}


def _target_names(folder: Path, summary: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(summary["targets"])
    for pattern in ("sweep-*.jsonl", "evaluation-*.json"):
        # A sweep that was interrupted isn't in the summary yet.
        names |= dict.fromkeys(file.stem.partition("-")[2] for file in sorted(folder.glob(pattern)))
    return list(names)


def _target(folder: Path, name: str, summary: dict[str, Any]) -> dict[str, Any]:
    from jobs import charts

    place = _target_names(folder, summary).index(name)
    told = summary["targets"].get(name)
    figures: dict[str, str] = {}
    title = _score_title(name, summary)

    def draw(key: str, figure: Any, alt: str) -> None:
        figures[key] = charts.svg(figure, ident=f"t{place}-{key}", alt=f"{name}: {alt}")

    evaluation = _evaluation(folder / f"evaluation-{name}.json")
    lift: list[dict[str, Any]] = []
    if evaluation is not None:
        curves = evaluation["curves"]
        gains = {model: curve["lift"] for model, curve in curves.items()}
        lift = _lift_table(gains)
        draw("gain", charts.gain(gains), _gain_alt(lift))
        bins = {model: curve["calibration"] for model, curve in curves.items()}
        alt = "observed against predicted rates of " + " and ".join(
            f"the {model} in {len(each['count'])} bins" for model, each in bins.items()
        )
        draw("calibration", charts.calibration(bins), f"{alt}; the numbers are in the table")

    outcomes = _outcomes(folder / f"sweep-{name}.jsonl")
    families: dict[str, dict[str, Any]] = {}
    if outcomes:
        scores = [outcome["score"] for outcome in outcomes]
        finished = [score for score in scores if score is not None]
        alt = f"{len(finished)} of {len(scores)} variants finished"
        alt += f", the best with a {title} of {max(finished):.4f}" if finished else ""
        kinds = [outcome["variant"]["family"] for outcome in outcomes]
        draw("progress", charts.sweep_progress(kinds, scores, title), alt)
        for number, family in enumerate(dict.fromkeys(kinds)):
            mine = [outcome for outcome in outcomes if outcome["variant"]["family"] == family]
            families[family] = shown = _family(mine)
            if len(shown["finished"]) >= 2 and shown["columns"]:
                alt = (
                    f"{len(shown['finished'])} variants of {family} across "
                    f"{', '.join(shown['columns'])}; the best has {shown['best']}"
                )
                figure = charts.parallel_coordinates(shown["columns"], shown["scores"], title)
                draw(f"parallel-{number}", figure, alt)
                shown["figure"] = figures[f"parallel-{number}"]
    timed = [each for each in outcomes if each["score"] is not None and LATENCY in each["metrics"]]
    quickest: list[dict[str, Any]] = []
    if timed:
        costs = [each["metrics"][LATENCY] for each in timed]
        reached = [each["score"] for each in timed]
        quickest = [timed[at] | {"cost": costs[at]} for at in charts.front(costs, reached)]
        kinds = [each["variant"]["family"] for each in timed]
        alt = f"{title} over the microseconds that a row takes; {len(quickest)} are on the front"
        draw("pareto", charts.pareto(kinds, costs, reached, title), alt)
    return {
        "name": name,
        "ident": f"target-{place}",
        "told": told,
        "metrics": _metrics(told) if told is not None else [],
        "evaluation": evaluation,
        "lift": lift,
        "importance": (evaluation or {}).get("importance", [])[:TOP_FEATURES],
        "outcomes": outcomes,
        "failed": [outcome for outcome in outcomes if outcome["score"] is None],
        "families": families,
        "front": quickest,
        "score_title": title,
        "score_heading": title[0].upper() + title[1:],
        "figures": figures,
    }


def _score_title(name: str, summary: dict[str, Any]) -> str:
    """What the target's variants were compared by; a sweep that didn't end hasn't said."""
    detail: dict[str, Any] = next(
        (step["detail"] for step in summary["steps"] if step["name"] == "sweep"), {}
    )
    if name not in detail:
        return "validation score"
    return f"validation {metrics.METRICS[detail[name]['metric']].score_title}"


def _metrics(told: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for metric, (title, more, key) in METRICS.items():
        champion, baseline = told.get(key), (told.get("baseline") or {}).get(metric)
        better = None
        if champion is not None and baseline is not None and champion != baseline:
            better = "champion" if (champion > baseline) == more else "baseline"
        rows.append({"title": title, "more": more, "champion": champion, "baseline": baseline,
                     "better": better})  # fmt: skip
    return rows


def _evaluation(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content = _json(file)
    for model, curve in content["curves"].items():
        for part, keys in (
            ("lift", ("share", "gain")),
            ("calibration", ("predicted", "observed", "count")),
        ):
            sizes = {len(curve[part][key]) for key in keys}
            if len(sizes) != 1 or 0 in sizes:
                raise ReportError(
                    f"{file}: curves.{model}.{part} has lists of {sorted(sizes)} values; "
                    f"{', '.join(keys)} must be of one length, 1 or more. Resume the run from "
                    "its register step"
                )
    return dict(content)


def _lift_table(gains: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of {"share", model: gain}, at the curves' own points nearest to SHARES."""
    rows = []
    for wanted in SHARES:
        row: dict[str, Any] = {"wanted": wanted}
        for model, curve in gains.items():
            at = int(np.abs(np.asarray(curve["share"]) - wanted).argmin())
            row[model] = {"share": curve["share"][at], "gain": curve["gain"][at]}
        rows.append(row)
    return rows


def _gain_alt(lift: list[dict[str, Any]]) -> str:
    models = [
        f"the {model} finds {at['gain']:.4f} of the positives in {at['share']:.4f} of the rows"
        for model, at in lift[1].items()
        if model != "wanted"
    ]
    return f"cumulative gain and lift; {', '.join(models)}"


def _outcomes(file: Path) -> list[dict[str, Any]]:
    """The journal's lines, with their number in `order`; a failed one has a score of None."""
    from jobs import charts

    if not file.is_file():
        return []
    outcomes: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # Half a line of a driver that was killed; a resumed sweep trains it again.
        try:
            outcome = json.loads(line)
        except ValueError as error:
            raise ReportError(
                f"{file}, line {len(outcomes) + 1}: not JSON: {error}. Remove the line and "
                "resume the run, which trains that variant again"
            ) from error
        if not charts.is_number(outcome["score"]):
            said = outcome["error"] or f"its validation score is {outcome['score']}"
            outcome |= {"score": None, "error": said}
        outcome.setdefault("metrics", {})
        outcomes.append(outcome | {"order": len(outcomes) + 1})
    return outcomes


def _family(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows of one family's variants."""
    finished = [outcome for outcome in outcomes if outcome["score"] is not None]
    scores = [outcome["score"] for outcome in finished]
    names = dict.fromkeys(
        name for outcome in outcomes for name in outcome["variant"] if name != "family"
    )
    settings = {
        name: [_plottable(outcome["variant"].get(name, "default")) for outcome in finished]
        for name in names
    }
    columns = {name: values for name, values in settings.items() if len(set(values)) > 1}
    best = max(finished, key=lambda outcome: outcome["score"], default=None)
    weighed = [explained(name, values, scores) for name, values in columns.items()]
    return {
        "settings": list(names),
        "columns": columns,
        "finished": sorted(finished, key=lambda outcome: -outcome["score"]),
        "failed": len(outcomes) - len(finished),
        "seconds": sum(outcome["seconds"] for outcome in outcomes),
        "scores": scores,
        "best_score": best["score"] if best else None,
        "best": ", ".join(f"{name} {_value(best['variant'].get(name))}" for name in columns)
        if best
        else "",
        "explained": sorted(weighed, key=lambda each: -(each.share or 0)),
        "figure": None,
    }


def _plottable(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _count(value: Any) -> str:
    return ABSENT if value is None else f"{value:,}"


def _measure(value: Any) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    """A setting as it is read: 0.1, not 0.10000000000000001."""
    if value is None:
        return "default"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
