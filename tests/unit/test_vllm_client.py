"""What a trainer says to a vLLM server over HTTP, and what it makes of the answers. The server here is a stand-in."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time

import pytest

from wsync.errors import ConfigError, ConnectError, DeadlineError, TransportError
from wsync.integrations.vllm import HTTPServer, InProcessServer
from wsync.integrations.vllm.client import PausableClient, WeightSyncClient


class StandIn(http.server.ThreadingHTTPServer):
    """Answers every route with what a test put into ``answers``, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = []
        self.answers = {}
        self.connections = set()
        self.delay_s = 0.0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body))
        self.server.connections.add(self.client_address)
        time.sleep(self.server.delay_s)
        status, content = self.server.answers.get(self.path.split("?")[0], (200, {}))
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have gone
            self.wfile.write(raw)

    do_GET = do_POST = _answer

    def log_message(self, *args):
        pass


@pytest.fixture
def stand_in():
    server = StandIn()
    yield server
    server.shutdown()
    server.server_close()


def test_each_call_asks_the_route_and_sends_the_body_that_vllm_has_for_it(stand_in):
    server = HTTPServer(stand_in.url + "/")
    server.init_weight_transfer_engine({"store": "tcp://127.0.0.1:1"})
    server.start_weight_update()
    server.pause("keep", clear_cache=False)
    server.update_weights({"version": 3})
    server.finish_weight_update("3")
    server.finish_weight_update()
    server.resume()
    assert stand_in.asked == [
        ("POST", "/init_weight_transfer_engine", {"init_info": {"store": "tcp://127.0.0.1:1"}}),
        ("POST", "/start_weight_update", None),
        ("POST", "/pause?mode=keep&clear_cache=false", None),
        ("POST", "/update_weights", {"update_info": {"version": 3}}),
        ("POST", "/finish_weight_update", {"weight_version": "3"}),
        ("POST", "/finish_weight_update", None),
        ("POST", "/resume", None),
    ]


def test_answers_are_read(stand_in):
    stand_in.answers = {
        "/is_paused": (200, {"is_paused": True}),
        "/weight_info": (200, {"weight_version": "7"}),
        "/get_world_size": (200, {"world_size": 4}),
        "/reset_prefix_cache": (200, {"success": False}),
        "/metrics": (200, "vllm:x 1.0\n"),
    }
    server = HTTPServer(stand_in.url)
    assert server.is_paused() is True
    assert server.weight_info() == {"weight_version": "7"}
    assert server.world_size(include_dp=False) == 4
    assert server.reset_prefix_cache() is False
    assert server.metrics() == "vllm:x 1.0\n"
    assert ("GET", "/get_world_size?include_dp=false", None) in stand_in.asked


def test_calls_in_a_row_share_one_connection(stand_in):
    server = HTTPServer(stand_in.url)
    for _ in range(5):
        server.resume()
    assert len(stand_in.connections) == 1


def test_a_connection_is_given_up_after_an_error_which_vllms_server_ends_it_with(stand_in):
    server = HTTPServer(stand_in.url)
    stand_in.answers["/start_weight_update"] = (500, {"error": "no"})
    with pytest.raises(TransportError):
        server.start_weight_update()
    server.resume()
    assert len(stand_in.connections) == 2


def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again(stand_in, monkeypatch):
    server = HTTPServer(stand_in.url)
    server.resume()
    monkeypatch.setattr(_Handler, "timeout", 0.05)  # for connections to come
    server.close()
    server.resume()
    time.sleep(0.3)  # the stand-in has closed it by now
    server.resume()
    assert len(stand_in.asked) == 3


def test_a_refusal_has_url_route_status_and_what_the_server_wrote(stand_in):
    stand_in.answers["/update_weights"] = (500, {"error": {"message": "CommitError: engine-0 is poisoned"}})
    with pytest.raises(TransportError) as caught:
        HTTPServer(stand_in.url).update_weights({"version": 1})
    for part in (stand_in.url, "/update_weights", "500", "engine-0 is poisoned"):
        assert part in caught.value.message


@pytest.mark.parametrize("content", [{"detail": "it broke"}, {"error": "it broke"}, "it broke"])
def test_every_form_of_an_error_is_shown(stand_in, content):
    stand_in.answers["/resume"] = (400, content)
    with pytest.raises(TransportError, match="it broke"):
        HTTPServer(stand_in.url).resume()


def test_a_missing_route_hints_at_the_mode_that_opens_it(stand_in):
    stand_in.answers["/start_weight_update"] = (404, {"detail": "Not Found"})
    with pytest.raises(TransportError) as caught:
        HTTPServer(stand_in.url).start_weight_update()
    assert "VLLM_SERVER_DEV_MODE=1" in caught.value.hint


def test_nobody_listening_is_a_connect_error():
    with pytest.raises(ConnectError, match=r"http://127\.0\.0\.1:9/resume"):
        HTTPServer("http://127.0.0.1:9").resume()


def test_a_server_that_does_not_answer_is_a_deadline_error(stand_in):
    stand_in.delay_s = 2.0
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"/resume did not answer within 0\.2 s"):
        HTTPServer(stand_in.url, timeout_s=0.2).resume()
    assert time.monotonic() - began < 1.5


def test_a_limit_covers_all_calls_of_its_block(stand_in):
    stand_in.delay_s = 0.15
    server = HTTPServer(stand_in.url)
    with server.limited(0.2):
        server.resume()
        with pytest.raises(DeadlineError):
            server.resume()
    stand_in.delay_s = 0.0
    server.resume()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", ""])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="base_url"):
        HTTPServer(url)


class FakeCore:
    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


class FakeLLM:
    """The methods of ``vllm.LLM`` that are used, with their own signatures."""

    def __init__(self, client) -> None:
        self.calls = []
        self.llm_engine = type("Engine", (), {"engine_core": client})()

    def update_weights(self, request):
        self.calls.append(request["update_info"])

    def finish_weight_update(self, weight_version=None):
        self.calls.append(weight_version)


def test_an_llm_of_this_process_is_driven_like_a_server():
    core = FakeCore()
    llm = FakeLLM(type("InprocClient", (), {"engine_core": core})())
    server = InProcessServer(llm)
    server.pause("keep", clear_cache=True)
    server.update_weights({"version": 2})
    server.finish_weight_update("2")
    server.resume()
    assert core.calls == [("pause_scheduler", "keep", True), ("resume_scheduler",)]
    assert llm.calls == [{"version": 2}, "2"]


def test_an_llm_whose_core_is_a_process_of_its_own_is_reached_through_its_client():
    class MPClient:
        def call_utility(self, *args):
            self.called = args

    client = MPClient()
    InProcessServer(FakeLLM(client)).pause("abort", clear_cache=False)
    assert client.called == ("pause_scheduler", "abort", False)


def test_an_llm_of_this_process_cannot_wait_for_itself():
    with pytest.raises(ConfigError, match="'wait'"):
        InProcessServer(FakeLLM(FakeCore())).pause("wait")


def test_only_clients_that_can_pause_count_as_such(stand_in):
    class FourMethods:
        def init_weight_transfer_engine(self, init_info): ...

        def start_weight_update(self): ...

        def update_weights(self, update_info): ...

        def finish_weight_update(self, weight_version=None): ...

    assert isinstance(FourMethods(), WeightSyncClient)
    assert not isinstance(FourMethods(), PausableClient)
    assert isinstance(HTTPServer(stand_in.url), PausableClient)
    assert isinstance(InProcessServer(FakeLLM(FakeCore())), PausableClient)
