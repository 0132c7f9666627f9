"""Named environments and their files."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.environment import Environment, EnvironmentFileError, Prices, load

WHOLE: dict[str, Any] = {
    "ray_address": "10.0.0.5:6379",
    "dask_address": "tls://10.0.0.5:8786",
    "dashboard_url": "http://10.0.0.5:8265",
    "tracking_uri": "http://10.0.0.6:5000",
    "storage_root": "s3://tables/liftyard",
    "serve_url": "https://scores.example.com",
}


def _put(home: Path, name: str, content: object) -> Path:
    file = home / "environments" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("name", [None, "embedded"])
def test_embedded_is_all_below_home(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(name, home=Path("home")) == Environment(
        name="embedded",
        ray_address=None,
        dask_address=None,
        dashboard_url=None,
        tracking_uri=f"sqlite:///{tmp_path}/home/mlflow.db",
        storage_root=f"{tmp_path}/home/tables",
        serve_url=None,
    )


def test_reads_a_file_by_name_or_by_path(tmp_path: Path) -> None:
    file = _put(tmp_path, "aws", WHOLE)
    environment = load("aws", home=tmp_path)
    assert environment == Environment(name="aws", **WHOLE)
    assert load(str(file), home=tmp_path / "elsewhere") == environment


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    needed = ("ray_address", "tracking_uri", "storage_root")
    _put(tmp_path, "small", {key: WHOLE[key] for key in needed})
    environment = load("small", home=tmp_path)
    assert environment.dask_address is None
    assert environment.dashboard_url is None
    assert environment.serve_url is None


def test_prices_are_the_files_or_the_homes_or_the_defaults(tmp_path: Path) -> None:
    _put(tmp_path, "plain", WHOLE)
    _put(tmp_path, "own", WHOLE | {"prices": {"cpu_hour": 2}})
    assert load("plain", home=tmp_path).prices == Prices()
    (tmp_path / "prices.json").write_text('{"cpu_hour": 1, "gpu_hour": 3}')
    assert load("plain", home=tmp_path).prices == Prices(cpu_hour=1, gpu_hour=3)
    assert load("own", home=tmp_path).prices == Prices(cpu_hour=2)
    table = Prices(cpu_hour=1, gpu_hour=3, cpu_watts=10, gpu_watts=100, grams_per_kwh=500)
    assert table.cost(cpus=2, gpus=1, hours=0.5) == 2.5
    assert table.carbon_g(cpus=2, gpus=1, hours=0.5) == 30
    (tmp_path / "prices.json").write_text('{"cpu": 1}')
    with pytest.raises(EnvironmentFileError, match=r"prices\.json: unknown key 'cpu'"):
        load("plain", home=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dask_adress": "x"}, "unknown key 'dask_adress': allowed are .*mean 'dask_address'"),
        ({"ray_address": "ray://h:1"}, "key 'ray_address' is 'ray://h:1'"),
        ({"ray_address": 6379}, "key 'ray_address' is 6379: .*string"),
        ({"storage_root": "tables"}, "key 'storage_root' is 'tables'"),
        ({"tracking_uri": None}, "key 'tracking_uri' is None"),
        ({"queue": "sqlite:///here"}, "key 'queue' is 'sqlite:///here'"),
        ({"prices": {"cpu_hours": 1}}, "unknown key 'cpu_hours': allowed are .*mean 'cpu_hour'"),
        ({"prices": {"gpu_watts": -1}}, "key 'gpu_watts' is -1: .*greater than or equal to 0"),
    ],
)
def test_a_faulty_key_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = _put(tmp_path, "aws", WHOLE | change)
    with pytest.raises(EnvironmentFileError, match=f"^{file}: .*{said}"):
        load("aws", home=tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"ray_address": ,}', "line 1, column 17: not JSON"),
        ("[]", "holds list, allowed is an object"),
        ('{"ray_address": "h:1", "tracking_uri": "http://h"}', "key 'storage_root' is missing"),
    ],
)
def test_a_faulty_file_is_named(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(EnvironmentFileError, match=said) as error:
        load(str(file), home=tmp_path)
    assert str(file) in str(error.value)


def test_unknown_names_tell_those_there_are(tmp_path: Path) -> None:
    _put(tmp_path, "staging", WHOLE)
    with pytest.raises(EnvironmentFileError, match="embedded, local, staging; did you mean 'stag"):
        load("stagin", home=tmp_path)
    with pytest.raises(EnvironmentFileError, match=r"no environment file .*none\.json"):
        load("none.json", home=tmp_path)


def test_local_must_be_up(tmp_path: Path) -> None:
    _put(tmp_path, "local", WHOLE)
    with pytest.raises(EnvironmentFileError, match="isn't up: run `liftyard up`"):
        load("local", home=tmp_path)
