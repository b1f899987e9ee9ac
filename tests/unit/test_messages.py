"""The control plane decodes strictly."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsync
from wsync.session import messages as m


def test_messages_survive_the_round_trip():
    begin = m.Begin(3, 7, 1, "abc", 12.5)
    assert m.decode_to_client(m.encode_message(begin)) == begin
    dropped = m.Progress(3, "a", "dropped", m.Fault("DigestError", "x"))
    assert m.decode_to_client(m.encode_message(dropped)) == dropped
    voted = m.Voted(3, (m.Stamp("receive", 1.0, 2.0),))
    assert m.decode_to_coordinator(m.encode_message(voted)) == voted


@pytest.mark.parametrize(
    "value",
    [
        {"type": "Begin", "seq": "3", "version": 7, "epoch": 1, "plan_digest": "a", "deadline_s": 1.0},
        {"type": "Begin", "seq": 3},
        {"type": "Nothing"},
        {"type": "Progress", "seq": 3, "replica": "a", "outcome": "lost"},
        {"type": "Pong", "more": 1},
        [1, 2],
        7,
    ],
)
def test_wrong_types_missing_and_unknown_fields_are_refused(value):
    with pytest.raises(wsync.WireError):
        m.decode_to_client(msgspec.msgpack.encode(value))


def test_a_message_for_one_side_is_refused_by_the_other():
    with pytest.raises(wsync.WireError):
        m.decode_to_client(m.encode_message(m.Ping()))


def test_an_oversized_frame_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(m, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(wsync.WireError, match="over the limit of 10"):
        m.decode_to_client(b"\x00" * 11)


@given(st.binary(max_size=200))
def test_random_bytes_never_crash_the_decoder(data):
    for decode in (m.decode_to_client, m.decode_to_coordinator):
        with contextlib.suppress(wsync.WireError):
            decode(data)


def test_errors_travel_by_name_with_their_hint():
    fault = m.Fault.of(wsync.ShapeMismatchError("a (1,) and (2,)", hint="look"))
    error = fault.to_error()
    assert type(error) is wsync.ShapeMismatchError
    assert (error.message, error.hint) == ("a (1,) and (2,)", "look")
    assert type(m.Fault("FutureError", "x").to_error()) is wsync.WsyncError
    assert "ValueError: y" in m.Fault.of(ValueError("y")).to_error().message
