"""One 32-byte secret per job, and the CURVE keys that both sides derive from it. The secret is never sent.

Source: CurveZMQ (RFC 26) and ZAP (RFC 27) of ZeroMQ; the derivation is BLAKE2b keyed with the secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
import warnings
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from wsync.errors import ConfigError

KEY_BYTES = 32
ENVIRONMENT_VARIABLE = "WSYNC_KEY"
_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


class CurveKeys(msgspec.Struct, frozen=True):
    """The two key pairs of a job, Z85 text as ZeroMQ takes it."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    def __repr__(self) -> str:
        return "CurveKeys(...)"


def derive_keys(secret: bytes) -> CurveKeys:
    """The job's CURVE key pairs.

    Raises:
        ConfigError: the secret has not KEY_BYTES bytes.
    """
    if len(secret) != KEY_BYTES:
        raise ConfigError(f"a wsync key has {KEY_BYTES} bytes, this one has {len(secret)}")

    def pair(person: bytes) -> tuple[bytes, bytes]:
        private = z85.encode(hashlib.blake2b(b"", key=secret, person=person, digest_size=32).digest())
        return zmq.curve_public(private), private

    server_public, server_secret = pair(b"wsync-server")
    client_public, client_secret = pair(b"wsync-client")
    return CurveKeys(server_public, server_secret, client_public, client_secret)


def new_key_file(path: str | os.PathLike[str]) -> Path:
    """Write a fresh secret to ``path`` (mode 0600, hexadecimal, one line). An existing file is not replaced.

    Raises:
        ConfigError: the file exists.
    """
    target = Path(path)
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"key file {target} exists already", hint="use it, or remove it first") from None
    except OSError as e:
        raise ConfigError(f"key file {target} cannot be written: {e.strerror}") from e
    with os.fdopen(descriptor, "w") as f:
        f.write(secrets.token_hex(KEY_BYTES) + "\n")
    return target


def _parse(text: str, origin: str) -> bytes:
    text = text.strip()
    for decode in (bytes.fromhex, lambda t: base64.b64decode(t, validate=True)):
        try:
            secret = decode(text)
        except (ValueError, binascii.Error):
            continue
        if len(secret) == KEY_BYTES:
            return secret
    raise ConfigError(
        f"{origin} holds {len(text)} characters, but a wsync key is {KEY_BYTES} bytes "
        f"as {2 * KEY_BYTES} hexadecimal digits or as base64",
        hint="make one with: wsync keygen wsync.key",
    )


def load_secret(key_file: str | os.PathLike[str] | None) -> bytes:
    """The job's secret, from ``key_file`` or from the environment variable WSYNC_KEY.

    Warns of a file that group or others can read.

    Raises:
        ConfigError: there is none, or it is malformed. The message never holds the secret.
    """
    if key_file is not None:
        try:
            text = Path(key_file).read_text()
            mode = stat.S_IMODE(Path(key_file).stat().st_mode)
        except OSError as e:
            raise ConfigError(
                f"key file {key_file} cannot be read: {e.strerror}", hint="make one with: wsync keygen wsync.key"
            ) from e
        except UnicodeDecodeError:
            raise ConfigError(
                f"key file {key_file} is not text", hint="make one with: wsync keygen wsync.key"
            ) from None
        secret = _parse(text, f"key file {key_file}")
        if mode & _OTHERS_READ:
            warnings.warn(
                f"key file {key_file} has mode {mode:04o}: others than its owner can read the job's secret "
                f"(chmod 600 {key_file})",
                stacklevel=3,
            )
        return secret
    if ENVIRONMENT_VARIABLE in os.environ:
        return _parse(os.environ[ENVIRONMENT_VARIABLE], f"environment variable {ENVIRONMENT_VARIABLE}")
    raise ConfigError(
        f"no key: neither key_file nor {ENVIRONMENT_VARIABLE} is given",
        hint="make one with: wsync keygen wsync.key, and give every rank the same file",
    )
