"""Keys: one secret, derived key pairs, and messages that never hold it."""

from __future__ import annotations

import base64
import stat
import warnings

import pytest
import zmq

import wsync
from wsync.session.auth import derive_keys, load_secret


def test_a_key_file_is_private_and_is_not_replaced(tmp_path):
    path = wsync.new_key_file(tmp_path / "wsync.key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(load_secret(path)) == 32
    with pytest.raises(wsync.ConfigError, match="exists already"):
        wsync.new_key_file(path)


def test_the_environment_gives_the_key_as_hex_or_base64(monkeypatch):
    secret = bytes(range(32))
    for text in (secret.hex(), base64.b64encode(secret).decode()):
        monkeypatch.setenv("WSYNC_KEY", text)
        assert load_secret(None) == secret


def test_no_key_is_an_error_that_says_how_to_get_one(monkeypatch):
    monkeypatch.delenv("WSYNC_KEY", raising=False)
    with pytest.raises(wsync.ConfigError, match="wsync keygen"):
        load_secret(None)


@pytest.mark.parametrize("text", ["", "abc", "00" * 31, "00" * 33, "zz" * 32])
def test_a_malformed_key_is_refused_without_being_shown(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(wsync.ConfigError, match=f"{len(text)} characters") as error:
        load_secret(path)
    assert len(text) < 10 or text not in str(error.value)


def test_keys_are_derived_the_same_everywhere_and_differ_between_secrets():
    a, b = derive_keys(b"a" * 32), derive_keys(b"b" * 32)
    assert a == derive_keys(b"a" * 32)
    assert len({*a.__struct_fields__}) == 4
    assert len({a.server_public, a.client_public, b.server_public, b.client_public}) == 4
    assert zmq.curve_public(a.server_secret) == a.server_public
    assert a.server_secret.decode() not in repr(a)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_can_read_is_warned_of_and_used(tmp_path, mode):
    path = wsync.new_key_file(tmp_path / "wsync.key")
    secret = load_secret(path)
    path.chmod(mode)
    with pytest.warns(UserWarning, match=rf"mode 0{mode:o}: others .*chmod 600") as caught:
        assert load_secret(path) == secret
    assert secret.hex() not in str(caught[0].message)


def test_a_private_key_is_not_warned_of(tmp_path):
    path = wsync.new_key_file(tmp_path / "wsync.key")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_secret(path)
