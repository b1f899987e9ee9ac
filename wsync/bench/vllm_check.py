"""The verdict: does a server compute with the weights of a version? One that started with them says what is right."""

from __future__ import annotations

import time

import msgspec

from wsync.bench.vllm_server import MODEL_NAME, VLLMServer
from wsync.errors import DeadlineError, StateError

_NUM_PROMPTS = 3
_PROMPT_TOKENS = 12
_GENERATED_TOKENS = 8
_POLL_S = 0.02
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Answer(msgspec.Struct, frozen=True):
    """What the server generates for one prompt, greedily."""

    tokens: list[int]
    log_probabilities: list[float]


class Observation(msgspec.Struct, frozen=True):
    """What a server answers with one version.

    Attributes:
        answers: to each fixed prompt.
        checksums: of ``/weight_checker``, by parameter. A packed weight is an empty parameter there: the answers tell.
    """

    answers: list[Answer]
    checksums: dict[str, str]


class _Choice(msgspec.Struct):
    token_ids: list[int]
    logprobs: _Probabilities


class _Probabilities(msgspec.Struct):
    token_logprobs: list[float]


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def observe(server: VLLMServer, vocabulary: int, deadline_s: float) -> Observation:
    """Ask the server; nobody else may.

    Requests go one after the other on an idle server: what is computed together changes the last bits of a logit.

    Raises:
        TransportError: the server does not answer.
    """
    _await_idle(server, deadline_s)
    answers = [_ask(server, prompt, _GENERATED_TOKENS) for prompt in _prompts(vocabulary)]
    return Observation(answers, server.call("/weight_checker", {"action": "checksum"})["checksums"])


def difference(seen: Observation, right: Observation) -> str:
    """The first way in which a server's answers are not right, or an empty string."""
    wrong = sorted(n for n in seen.checksums.keys() | right.checksums.keys() if _differs(seen, right, n))
    if wrong:
        return (
            f"checksums of {len(wrong)} of {len(right.checksums)} parameters differ from a fresh server's: {wrong[0]}"
        )
    for number, (mine, theirs) in enumerate(zip(seen.answers, right.answers, strict=True)):
        if found := _first_difference(mine, theirs):
            return f"prompt {number}, {found} on a fresh server"
    return ""


def _first_difference(mine: Answer, theirs: Answer) -> str:
    for i, (a, b) in enumerate(zip(mine.tokens, theirs.tokens, strict=True)):
        if a != b:
            return f"token {i} is {a}, but {b}"
    for i, (p, q) in enumerate(zip(mine.log_probabilities, theirs.log_probabilities, strict=True)):
        if p != q:
            return f"token {i} has the log-probability {p}, but {q}"
    return ""


def check_told_apart(references: list[Observation]) -> None:
    """Refuse references that would let one version pass for another.

    Raises:
        StateError: two versions give the same answers to every prompt.
    """
    first, second = references
    if first.answers == second.answers:
        raise StateError("two versions of the weights give the same answers, so that a verdict would prove nothing")


def _differs(seen: Observation, right: Observation, name: str) -> bool:
    return seen.checksums.get(name) != right.checksums.get(name)


def _prompts(vocabulary: int) -> list[list[int]]:
    return [[(97 * p + 31 * i * i + 1) % vocabulary for i in range(_PROMPT_TOKENS)] for p in range(_NUM_PROMPTS)]


def _ask(server: VLLMServer, prompt: list[int], max_tokens: int) -> Answer:
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    choice = msgspec.convert(server.call("/v1/completions", body), _Completion).choices[0]
    return Answer(choice.token_ids, choice.logprobs.token_logprobs)


def _await_idle(server: VLLMServer, deadline_s: float) -> None:
    """Clients that hung up leave their requests for a moment. The gauges are as of the last step, so make one."""
    end = time.monotonic() + deadline_s
    while True:
        _ask(server, [1], 2)
        if not sum(server.metric(name) for name in _BUSY):
            return
        if time.monotonic() > end:
            raise DeadlineError(f"the server has requests of clients that hung up {deadline_s:g} s ago")
        time.sleep(_POLL_S)
