"""Jobs that a team's package names; one is run in `test_environment_commands.py`."""

import sys
from pathlib import Path

import pytest

from jobs.package import PackageError, registered

TABLE = """\
[tool.liftyard]
packages = ["retention", "wheels/tiny-1-py3-none-any.whl"]
requirements = ["lifelines==0.30"]

[tool.liftyard.jobs.win-back]
module = "retention.win_back"
cpus = 2
timeout_s = 60

[tool.liftyard.jobs.report]
module = "retention.report"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "team"
    (folder / "retention" / "deep" / "__pycache__").mkdir(parents=True)
    (folder / "retention" / "__init__.py").write_text("A = 1")
    (folder / "retention" / "deep" / "rules.json").write_text("{}")
    (folder / "retention" / "deep" / "__pycache__" / "x.pyc").touch()
    (folder / "wheels").mkdir()
    (folder / "wheels" / "tiny-1-py3-none-any.whl").write_bytes(b"PK")
    (folder / "pyproject.toml").write_text(TABLE)
    return folder


def test_packages_are_copied_by_their_content(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    found = registered(folder, "win-back", copies=copies)
    assert registered(folder, "win-back", copies=copies) == found
    assert (found.cpus, found.gpus, found.timeout_s, found.retries) == (2, 0, 60, None)
    # Where pip adds something, the job's Python is Ray's own for it.
    assert found.command == ("python", "-P", "-m", "retention.win_back")
    package, wheel = map(Path, found.packages)
    assert (package.name, wheel.name) == ("retention", "tiny-1-py3-none-any.whl")
    files = {p.relative_to(package) for p in package.rglob("*") if p.is_file()}
    assert files == {Path("__init__.py"), Path("deep/rules.json")}
    assert len(list(copies.iterdir())) == 2

    # An edited package is another, and the copy stays as it was.
    (folder / "retention" / "__init__.py").write_text("A = 2")
    edited = registered(folder, "win-back", copies=copies)
    assert edited.packages[0] != found.packages[0] and edited.packages[1] == found.packages[1]
    assert (package / "__init__.py").read_text() == "A = 1"


def test_without_requirements_the_python_is_this_one(folder: Path, tmp_path: Path) -> None:
    (folder / "pyproject.toml").write_text(TABLE.replace('"lifelines==0.30"', ""))
    assert registered(folder, "report", copies=tmp_path / "copies").command[0] == sys.executable


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("retention.win_back", "retention/win_back", r"jobs\.win-back\.module: .*pattern"),
        ("cpus = 2", "cpu = 2", r"jobs\.win-back\.cpu: Extra inputs"),
        ("cpus = 2", "cpus = ", "not TOML"),
        ('"retention",', '"retentoin",', "retentoin' is neither a folder with an __init__.py nor"),
        ("[tool.liftyard]", "[tool.yard]", r"has no table \[tool\.liftyard\]"),
        ("win-back", "winback", "no job 'win-back': there are winback, report; did you mean 'winb"),
        ('"retention",', '"jobs",', "package 'jobs' has a name of liftyard's own: rename it"),
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
