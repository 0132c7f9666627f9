"""A run's folder: what was done so far, written so that a killed driver loses no finished step."""

import json
import secrets
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.files import replace_text

STEPS = ("ingest", "validate", "sentiment", "features", "training", "sweep", "register", "serve")
# Keys of a step's detail that the summary repeats at its top.
SUMMARY = ("targets", "serve_url")


class RunError(ValueError):
    """A run was named that isn't there, or isn't this pipeline's."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a finished step did.

    Attributes:
        name: The step.
        seconds: Wall time.
        rows_in: Rows read.
        rows_out: Rows left behind.
        engine: What ran it, such as `polars-streaming`.
        device: `cpu` or `cuda`.
        detail: What else the report shows, as JSON values.
    """

    name: str
    seconds: float
    rows_in: int
    rows_out: int
    engine: str
    device: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run and the steps that it finished. Changes go through `do` and `end`.

    Attributes:
        folder: Its folder.
        run_id: Its name.
        pipeline: The pipeline's name.
        seed: The pipeline's seed.
        git_revision: The code's, `-dirty` where files differ from it.
        job: The queued job that it is of, as `LIFTYARD_JOB` names it; None if it is of none.
        attempt: 1, and one more each time that finished steps were done again (`again_from`).
        status: `running`, `finished`, `failed` or `interrupted`.
        steps: What it finished.
    """

    folder: Path
    run_id: str
    pipeline: str
    seed: int
    git_revision: str
    job: str | None = None
    attempt: int = 1
    status: str = "running"
    steps: tuple[Step, ...] = ()

    def step(self, name: str) -> Step:
        """A finished step.

        Raises:
            KeyError: The run hasn't finished it.
        """
        return {step.name: step for step in self.steps}[name]

    def do(self, name: str, work: Callable[[], Step]) -> "Run":
        """Do a step, unless this run finished it before, and write that down.

        Args:
            name: The step's name.
            work: Does it; called at most once.

        Returns:
            The run with the step in it.
        """
        if any(step.name == name for step in self.steps):
            return self
        return self._save(steps=(*self.steps, work()))

    def end(self, status: str) -> "Run":
        """Write the run's outcome: `finished`, `failed` or `interrupted`."""
        return self._save(status=status)

    def _save(self, **changes: Any) -> "Run":
        run = replace(self, **changes)
        content = asdict(run)
        del content["folder"]
        for step in run.steps:
            # What whole-run readers look for, out of the steps that make it.
            content.update({key: step.detail[key] for key in SUMMARY if key in step.detail})
        text = json.dumps(content, indent=2, default=str) + "\n"
        replace_text(self.folder / "summary.json", text)
        return run


def start(root: Path, *, pipeline: str, seed: int, job: str | None = None) -> Run:
    """Make a new run's folder below `root`.

    Args:
        root: Folder of the runs.
        pipeline: The pipeline's name.
        seed: Its seed.
        job: The queued job that the run is of.

    Raises:
        OSError: The folder can't be written.
    """
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    folder = root / run_id
    folder.mkdir(parents=True)
    run = Run(
        folder=folder,
        run_id=run_id,
        pipeline=pipeline,
        seed=seed,
        git_revision=_git_revision(),
        job=job,
    )
    return run._save()


def folder(root: Path, run_id: str | None = None) -> Path:
    """A run's folder; the newest run's, where none is named.

    Raises:
        RunError: There is no such run.
    """
    there = sorted(path.parent for path in root.glob("*/summary.json"))
    found = [path for path in there if run_id in (None, path.name)]
    if not found:
        names = ", ".join(path.name for path in there) or "none"
        raise RunError(f"no run {run_id or ''!r} in {root}. There are: {names}")
    return found[-1]


def latest(root: Path, pipeline: str) -> str:
    """The id of the pipeline's newest run.

    Raises:
        RunError: It has none.
    """
    found = _newest(root, "pipeline", pipeline)
    if found is None:
        raise RunError(f"pipeline {pipeline!r} has no run in {root}; run it without --from first")
    return found


def begun(root: Path, job: str) -> str | None:
    """The id of the run that an earlier attempt of a queued job began or took up; None if none."""
    return _newest(root, "job", job)


def _newest(root: Path, key: str, value: str) -> str | None:
    found = [
        path.parent.name
        for path in root.glob("*/summary.json")
        if json.loads(path.read_text(encoding="utf-8")).get(key) == value
    ]
    return max(found, default=None)


def resume(
    root: Path,
    run_id: str,
    *,
    pipeline: str,
    seed: int,
    again_from: str | None = None,
    job: str | None = None,
) -> Run:
    """Take up a run where it stopped.

    Args:
        root: Folder of the runs.
        run_id: The run.
        pipeline: The pipeline's name.
        seed: Its seed.
        again_from: Forget this step and those after it, and what they had begun.
        job: The queued job that takes it up.

    Raises:
        RunError: There is no such run, it is another pipeline's or seed's, or there is no step
            `again_from`.
    """
    file = folder(root, run_id) / "summary.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name, wanted in (("pipeline", pipeline), ("seed", seed)):
        if content[name] != wanted:
            raise RunError(
                f"run {run_id!r} has {name} {content[name]!r}, and {wanted!r} was asked for: "
                "resume it with its own, or start a new run"
            )
    steps = tuple(Step(**step) for step in content.pop("steps"))
    if again_from is not None:
        if again_from not in STEPS:
            raise RunError(f"no step {again_from!r}; the steps are {', '.join(STEPS)}")
        kept = STEPS[: STEPS.index(again_from)]
        steps = tuple(step for step in steps if step.name in kept)
        if "sweep" not in kept:
            for journal in file.parent.glob("sweep-*.jsonl"):
                journal.unlink()
        if "sentiment" not in kept:
            (file.parent / "sentiment.json").unlink(missing_ok=True)
        content["attempt"] += 1
    for key in SUMMARY:
        content.pop(key, None)
    content |= {"status": "running", "job": job}
    return Run(folder=file.parent, steps=steps, **content)._save()


def _git_revision() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
