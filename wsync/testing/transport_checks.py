"""Assertions of the contract suite."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.testing.transport_actors import CANCELLED, Answer


def check(condition: bool, *found: object) -> None:
    """An assertion that python -O keeps."""
    if not condition:
        raise AssertionError(" ".join(str(item) for item in found))


def check_fine(answers: Sequence[Answer]) -> None:
    """No answer is an error."""
    for answer in answers:
        check(not answer.error, answer.error, answer.message)


def check_raised(answer: Answer, errors: Sequence[str], *words: str) -> None:
    """One of ``errors`` was raised and its message has all ``words``."""
    check(answer.error in errors, "wanted", errors, "got", answer.error or "no error", answer.message)
    for word in words:
        check(word in answer.message, f"no {word!r} in:", answer.message)


def check_stopped(answer: Answer) -> None:
    """The end gave its version up: it was told to, or heard first that the peer it relays from was."""
    check_raised(answer, ("CommitError", "TransportError"), CANCELLED if answer.error == "CommitError" else "gave up")
