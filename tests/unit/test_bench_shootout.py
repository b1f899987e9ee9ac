"""The record of the shoot-out and its tables."""

from __future__ import annotations

import msgspec

from wsync.bench.markdown import table_in
from wsync.bench.shootout_result import (
    WSYNC,
    PeerRow,
    PolicyRow,
    PresetResult,
    ShootoutResult,
    shootout_table_of,
)


def result_of(other_s=2.0, verdict="ok"):
    rows = (PolicyRow(WSYNC, 1.0, 1.0, 1.0, 1.0, 0.1), PolicyRow("ring", other_s, other_s, 3.0, 2.0, 0.2))
    preset = PresetResult("small", 2, 4, 1.0, "ingress of node e0", 0.5, rows)
    peers = (
        PeerRow(WSYNC, "1", (), 1.0, 1.0, 1.0, 1.0, 0.01, 5),
        PeerRow("other", "0.9", (), 4.0, 4.0, 1.0, 2.0, 0.5, 7),
        PeerRow("absent", None, ("absent_module",)),
    )
    return ShootoutResult((preset,), "2 ranks to 4", peers, {"cpu": "a cpu"}, {}, verdict)


def test_the_table_has_scores_bytes_and_planners():
    table = shootout_table_of(result_of())
    assert "| small | **1.000** | 2.00 | never |" in table
    assert "| bytes into domains over need, mean | 1.00 | 2.00 | |" in table
    assert "| other 0.9 | 4.00 | 2.00 | 500 ms |" in table
    assert "| absent | not installed: absent_module | | |" in table


def test_a_policy_that_is_faster_is_named():
    assert "| small | **1.000** | 0.900 | ring |" in shootout_table_of(result_of(0.9, "beaten"))
    assert "WSYNC IS BEATEN" in shootout_table_of(result_of(0.9, "beaten"))


def test_times_within_a_thousandth_are_equal():
    assert result_of(0.9995).presets[0].beaten_by == ()
    assert result_of(0.998).presets[0].beaten_by == ("ring",)


def test_a_record_is_read_as_what_it_is(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(msgspec.json.encode(result_of()))
    assert table_in(path) == ("shootout", shootout_table_of(result_of()))
