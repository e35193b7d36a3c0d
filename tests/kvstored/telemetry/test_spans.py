"""OpenTelemetry traces: a span a call through either door where asked for, nothing at all where not."""

import asyncio
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kvstore import Store
from kvstore.errors import ConfigError
from kvstored.access.tokens import digest, make_token
from kvstored.cli import cli
from kvstored.server import Daemon
from kvstored.settings import ServerSettings, load_settings
from kvstored.telemetry.spans import Spans, open_spans
from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.address import parse_address
from tests.conftest import START_S, environment, wait_until
from tests.kvstored.conftest import running_daemon

X = {"x": np.arange(64, dtype=np.uint8)}


@contextmanager
def daemon_here(directory, spans, **settings):
    """A daemon on a thread of this process; gives its address."""
    address = f"unix:{directory}/k.sock"
    server = ServerSettings(address=address, data_dir=str(directory), pressure_percent=0, **settings)
    up, loop = threading.Event(), asyncio.new_event_loop()

    async def serve():
        nonlocal stop
        stop = asyncio.Event()
        daemon = Daemon(store, server, spans=spans)
        await daemon.start()
        up.set()
        await stop.wait()
        await daemon.stop()

    stop = None
    with Store.open() as store:
        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
        thread.start()
        try:
            assert up.wait(START_S)
            yield address
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


def recorder():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, Spans(provider)


def finished(exporter, name):
    """The spans of a method, once there is one: a client has its answer a moment before the span ends."""
    wait_until(lambda: any(span.name == name for span in exporter.get_finished_spans()), name)
    return [span for span in exporter.get_finished_spans() if span.name == name]


def test_a_call_is_a_span_through_either_door_and_names_no_key(tmp_path):
    exporter, spans = recorder()
    with daemon_here(tmp_path, spans) as address:
        for near, service, put, get in ((False, "Cache", "Put", "Get"), (True, "Lease", "put", "get")):
            with Client(address, on_error="raise", framework="numpy", shared_memory=near, timeout_s=60) as client:
                assert client.put(b"secret key", X)
                assert client.get_many([b"secret key", b"absent"])[0] is not None
            (span,) = finished(exporter, f"kvstored.v1.{service}/{put}")
            assert span.kind == SpanKind.SERVER
            assert span.attributes["rpc.service"] == f"kvstored.v1.{service}"
            assert span.attributes["rpc.grpc.status"] == "OK"
            assert span.attributes["kvstored.caller"] == "local"
            assert span.parent is None
            (span,) = finished(exporter, f"kvstored.v1.{service}/{get}")
            assert span.start_time < span.end_time
            assert near or span.attributes["kvstored.keys"] == 2
    said = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "secret key" not in said
    assert b"secret key".hex() not in said


def test_a_span_continues_the_callers_trace(tmp_path):
    exporter, spans = recorder()
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with daemon_here(tmp_path, spans) as address, grpc.insecure_channel(parse_address(address)) as channel:
        call = channel.unary_unary("/kvstored.v1.Cache/Match")
        metadata = (("traceparent", f"00-{trace}-{parent}-01"),)
        call(pb.MatchRequest(keys=[b"a"] * 3).SerializeToString(), metadata=metadata, timeout=60)
        (span,) = finished(exporter, "kvstored.v1.Cache/Match")
    assert f"{span.context.trace_id:032x}" == trace
    assert f"{span.parent.span_id:016x}" == parent
    assert span.attributes["kvstored.keys"] == 3


def test_a_refusal_is_an_error_without_the_callers_token(tmp_path, monkeypatch):
    exporter, spans = recorder()
    token = make_token()
    (tmp_path / "tokens.toml").write_text(
        f'[[token]]\nname = "r"\nsha256 = "{digest(token)}"\ntenant = "team"\nrights = ["read"]\n'
    )
    (tmp_path / "t").write_text(token)
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "t"))
    guarded = {"tokens": str(tmp_path / "tokens.toml"), "token_on_unix": True}
    with daemon_here(tmp_path, spans, **guarded) as address, Client(address, timeout_s=60) as client:
        with pytest.raises(Exception, match="needs write"):
            client.put(b"k", X)
        (span,) = finished(exporter, "kvstored.v1.Cache/Put")
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes["rpc.grpc.status"] == "PERMISSION_DENIED"
    assert span.attributes["kvstored.tenant"] == "team"
    assert token not in span.to_json()


class Collector(BaseHTTPRequestHandler):
    """Takes what an exporter sends."""

    def do_POST(self):
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_daemon_sends_its_spans_to_a_collector_and_all_of_them_before_it_ends():
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        server.bodies = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        with running_daemon(f'traces_endpoint = "{endpoint}"') as daemon:
            daemon.start()
            assert daemon.client(framework="numpy", shared_memory=False).put(b"k", X)
            assert daemon.stop() == 0
            assert "Traceback" not in daemon.log
        server.shutdown()
    assert {path for path, _ in server.bodies} == {"/v1/traces"}
    sent = b"".join(body for _, body in server.bodies)
    assert b"kvstored.v1.Cache/Put" in sent
    assert b"service.name" in sent


def test_a_collector_that_is_not_there_holds_up_no_call_and_no_stop():
    with running_daemon('traces_endpoint = "http://127.0.0.1:9/v1/traces"') as daemon:
        daemon.start()
        client = daemon.client(framework="numpy")
        for i in range(20):
            assert client.put(b"%d" % i, X)
        assert daemon.stop() == 0


def test_nothing_of_opentelemetry_is_imported_where_traces_are_off(tmp_path):
    code = (
        "import sys, kvstored.server, kvstored.cli, kvstored.telemetry.spans as s\n"
        "spans = s.open_spans('', '1'); spans.record('Cache/Get', 'OK', 0.1, (), {}); spans.close()\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_what_is_missing_or_wrong_is_said(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"must be a URL such as http://127\.0\.0\.1:4318/v1/traces"):
        load_settings(environ={"KVSTORED_SERVER__TRACES_ENDPOINT": "localhost:4317"})
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstored\[otel\]'"):
        open_spans("http://127.0.0.1:4318/v1/traces", "1")
    file = tmp_path / "k.toml"
    file.write_text('[server]\ntraces_endpoint = "http://127.0.0.1:4318/v1/traces"\n')
    done = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert (done.exit_code, "kvstored[otel]" in done.output) == (2, True), done.output
