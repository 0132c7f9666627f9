"""Jobs that a team's package names; one is run in `test_environment_commands.py`."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs.package import PackageError, registered
from jobs.requirements import RequirementsError
from tests.jobs import wheels

TABLE = """\
[tool.liftyard]
packages = ["retention"]
requirements = ["survival_tiny==2", "wheels/tiny-1-py3-none-any.whl", "numpy"]

[tool.liftyard.jobs.win-back]
module = "retention.win_back"
cpus = 2
timeout_s = 60

[tool.liftyard.jobs.report]
module = "retention.report"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    index = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    for number in ("2", "3"):
        wheels.make(index, "survival_tiny", number, needs="curve_tiny", code="import curve_tiny")
    wheels.make(index, "curve_tiny", "1", needs="numpy", code="import numpy")
    folder = tmp_path / "team"
    (folder / "retention" / "deep" / "__pycache__").mkdir(parents=True)
    (folder / "retention" / "__init__.py").write_text("A = 1")
    (folder / "retention" / "deep" / "rules.json").write_text("{}")
    (folder / "retention" / "deep" / "__pycache__" / "x.pyc").touch()
    wheels.make(folder / "wheels", "tiny", "1")
    (folder / "pyproject.toml").write_text(TABLE)
    return folder


def test_packages_are_copied_by_their_content(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    found = registered(folder, "win-back", copies=copies)
    assert registered(folder, "win-back", copies=copies) == found
    assert (found.cpus, found.gpus, found.timeout_s, found.retries) == (2, 0, 60, None)
    assert found.command == (sys.executable, "-P", "-m", "retention.win_back")
    package = Path(found.packages[0])
    assert package.name == "retention"
    files = {p.relative_to(package) for p in package.rglob("*") if p.is_file()}
    assert files == {Path("__init__.py"), Path("deep/rules.json")}
    assert len(list(copies.iterdir())) == 2

    # An edited package is another, and the copy stays as it was.
    (folder / "retention" / "__init__.py").write_text("A = 2")
    edited = registered(folder, "win-back", copies=copies)
    assert edited.packages[0] != found.packages[0] and edited.packages[1] == found.packages[1]
    assert (package / "__init__.py").read_text() == "A = 1"


def test_what_is_required_is_one_wheel_without_what_is_here(folder: Path, tmp_path: Path) -> None:
    wheel = Path(registered(folder, "report", copies=tmp_path / "copies").packages[1])
    # As Ray installs it at a node, where it needs no index.
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, f"--target={site}", wheel], check=True)
    code = "import survival_tiny, tiny; from importlib.metadata import version as v; "
    said = subprocess.run(
        [sys.executable, "-c", f"{code} print(v('survival_tiny'), v('curve_tiny'))"],
        env={"PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == ["2", "1"]
    assert not (site / "numpy").exists()


def test_what_is_here_needs_no_wheel(folder: Path, tmp_path: Path) -> None:
    absent = '"survival_tiny==2", "wheels/tiny-1-py3-none-any.whl", '
    (folder / "pyproject.toml").write_text(TABLE.replace(absent, ""))
    assert len(registered(folder, "report", copies=tmp_path / "copies").packages) == 1


@pytest.mark.parametrize(
    ("required", "said"),
    [
        ("survival_tiny==9", r"pip says: .*survival_tiny==9"),
        ("numpy<1", f"need numpy 0.9, and the cluster has {version('numpy')}"),
        ("--target=/", "pip says: .*--target=/"),
    ],
)
def test_requirements_that_cannot_be_had_are_told(
    folder: Path, tmp_path: Path, required: str, said: str
) -> None:
    wheels.make(tmp_path / "index", "numpy", "0.9")
    (folder / "pyproject.toml").write_text(TABLE.replace("survival_tiny==2", required))
    with pytest.raises(RequirementsError, match=said):
        registered(folder, "win-back", copies=tmp_path / "copies")
    assert not list((tmp_path / "copies").glob("draft-*"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("retention.win_back", "retention/win_back", r"jobs\.win-back\.module: .*pattern"),
        ("cpus = 2", "cpu = 2", r"jobs\.win-back\.cpu: Extra inputs"),
        ("cpus = 2", "cpus = ", "not TOML"),
        ('"retention"]', '"retentoin"]', "retentoin' isn't a folder with an __init__.py; a wheel"),
        ("[tool.liftyard]", "[tool.yard]", r"has no table \[tool\.liftyard\]"),
        ("win-back", "winback", "no job 'win-back': there are winback, report; did you mean 'winb"),
        ('"retention"]', '"jobs"]', "package 'jobs' has a name of liftyard's own: rename it"),
    ],
)
def test_faults_are_told(folder: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    text = TABLE.replace(old, new)
    if old == "[tool.liftyard]":
        text = text.replace("[tool.liftyard.", "[tool.yard.")
    (folder / "pyproject.toml").write_text(text)
    with pytest.raises(PackageError, match=said):
        registered(folder, "win-back", copies=tmp_path / "copies")


def test_a_folder_without_the_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no .*pyproject\.toml: a folder of jobs has one"):
        registered(tmp_path, "win-back", copies=tmp_path / "copies")
