"""HAProxy killed under a client's hands, on a real Ray Serve."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx

from cluster import ports, session
from serving import app
from serving.protocol.liftyard_pb2 import Row, ScoreRequest, Value
from serving.protocol.liftyard_pb2_grpc import LiftyardStub
from serving.settings import Limits, Listener, Settings
from tests.serving import lapse
from tests.serving.test_app import haproxies

# By itself gRPC waits up to two minutes before it connects anew.
CHANNEL = [(f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")]


def test_until_a_killed_haproxy_is_replaced_no_answer_is_wrong(tmp_path: Path) -> None:
    settings = Settings(
        registry=lapse.champion(tmp_path).uri, models=None, limits=Limits(), refresh_s=60
    )
    port, rpc = ports.free(2)
    # The first port of Serve's replicas, which gRPC shares; it knows no call.
    stranger = grpc.server(ThreadPoolExecutor(1))
    stranger.add_insecure_port("[::]:40000")
    stranger.start()
    request = ScoreRequest(model="lapse", rows=[Row(fields={"spend": Value(number=2.0)})])
    with (
        session.connect(cpus=2),
        grpc.insecure_channel(f"127.0.0.1:{rpc}", options=CHANNEL) as channel,
    ):
        url = app.apply(settings, Listener(port=port, grpc_port=rpc)).url

        def asked() -> tuple[str, str]:
            """How a row is answered over HTTP and by gRPC."""
            try:
                body = {"rows": [{"spend": 2.0}]}
                over = str(httpx.post(f"{url}/v1/models/lapse/score", json=body).status_code)
            except httpx.TransportError:
                over = "unreachable"
            try:
                LiftyardStub(channel).Score(request, timeout=30)
                by = "OK"
            except grpc.RpcError as error:
                by = error.code().name
            return over, by

        assert asked() == ("200", "OK")
        killed = haproxies()
        for process in killed:
            process.kill()
        assert killed
        seen = []
        deadline = time.monotonic() + 120
        while not seen or seen[-1] != ("200", "OK"):
            assert time.monotonic() < deadline, seen[-1]
            time.sleep(0.02)
            seen.append(asked())
        # Whoever asks again is answered: the model isn't said to be missing meanwhile.
        assert {over for over, _ in seen} <= {"unreachable", "503", "200"}
        assert {by for _, by in seen} <= {"UNAVAILABLE", "OK"}
        app.stop()
    stranger.stop(None)
