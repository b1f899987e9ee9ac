"""Versions go to a server that generates all the time: no request fails, and no token is of two versions.

What a server answers for one prompt with one token is a fingerprint of the weights: five tokens and their
log-probabilities, from one forward pass over the whole prompt, or over what the prefix cache has left of it.
"""

from __future__ import annotations

import collections
import http.client
import itertools
import json
import statistics
import sys
import threading
import uuid

import pytest

from vllm_cpu import models
from vllm_cpu.fleets import DEADLINE_S, Trainer, servers
from vllm_cpu.server import MODEL_NAME
from wsync.integrations.vllm import Fleet

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(900)]

FAMILY = "llama"
NUM_CLIENTS = 32
NUM_LONG = 8
"""Clients whose requests are long enough to be frozen by a pause."""
NUM_TOKENS = 16
NUM_PUBLISHES = 20
BLOCK = 32
PROMPT = [5 + 7 * i % 400 for i in range(2 * BLOCK + 6)]
"""Two blocks of it are in the prefix cache: keys and values of an old version would show."""
OPTIONS = ("--enable-scale-out", "--block-size", str(BLOCK), "--max-num-seqs", str(NUM_CLIENTS))

TOLERANCE = 0.05
"""In log-probability: what the batch that a request is computed in may change (bf16)."""
APART = 3 * TOLERANCE
"""Versions, and mixtures of two of them, differ by more."""
REQUEST_S = 120.0


class Connection:
    """A keep-alive connection to a server."""

    def __init__(self, server):
        self._http = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_S)

    def ask(self, num_tokens, prompt=PROMPT, **further):
        """The first choice: tokens, fingerprints and the versions that they come from.

        Raises:
            AssertionError: the server did not answer 200.
        """
        sampling = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 5}
        body = json.dumps({"model": MODEL_NAME, "token_ids": prompt, "sampling_params": sampling} | further)
        self._http.request("POST", "/inference/v1/generate", body, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        raw = response.read()
        assert response.status == 200, raw
        choice = json.loads(raw)["choices"][0]
        assert choice["finish_reason"] == "length", choice
        assert len(choice["token_ids"]) == num_tokens, choice
        return Answer(choice)

    def close(self):
        self._http.close()


class Answer:
    """What a server generated.

    Attributes:
        tokens: ids.
        fingerprints: for each token, the five likeliest with their log-probabilities.
        spans: ``(version, begin, end)`` over the tokens.
    """

    def __init__(self, choice):
        self.tokens = choice["token_ids"]
        self.fingerprints = [
            {top["token_id"]: top["logprob"] for top in token["top_logprobs"][:5]}
            for token in choice["logprobs"]["content"]
        ]
        self.spans = [(int(s["version"]), s["start"], s["end"]) for s in choice["weight_versions"]]


def distance(a, b):
    """The largest difference of a log-probability; a token that one of them lacks counts as its fifth."""
    return max(abs(a.get(t, min(a.values())) - b.get(t, min(b.values()))) for t in a.keys() | b.keys())


class Client(threading.Thread):
    """Asks again and again until it is told to stop."""

    def __init__(self, server, num_tokens, stop):
        super().__init__(daemon=True)
        self._connection = Connection(server)
        self._num_tokens = num_tokens
        self._stop_event = stop
        self.answers = []
        self.error = None

    def run(self):
        try:
            while not self._stop_event.is_set():
                self.answers.append(self._connection.ask(self._num_tokens))
        except BaseException as e:
            self.error = e
        finally:
            self._connection.close()


class Lane:
    """The server, its trainer, and what each version says when nothing else runs.

    Attributes:
        references: fingerprint of the weights 1, 2, ...
    """

    def __init__(self, server, trainer, fleet):
        self.server, self.trainer, self.fleet = server, trainer, fleet
        self.version = 0
        self.references = {}

    def publish(self, weights):
        """Publish weights as the next version; returns the report."""
        self.trainer.write(weights)
        self.version += 1
        report = self.fleet.publish(self.version, deadline_s=DEADLINE_S).wait_committed()
        assert report.serving == ("engine-0",), report.servers
        return report

    def fingerprint(self, prompt=PROMPT):
        """Of what the server holds now, computed without the prefix cache: the salt is new."""
        connection = Connection(self.server)
        try:
            answer = connection.ask(1, prompt, cache_salt=uuid.uuid4().hex)
        finally:
            connection.close()
        assert answer.spans == [(self.version, 0, 1)]
        return answer.fingerprints[0]


@pytest.fixture(scope="module")
def lane(lab, tmp_path_factory):
    """A quiet server whose every version is known."""
    with (
        servers({"model_dir": lab.model(FAMILY, 0), "options": OPTIONS}) as (server,),
        Trainer(FAMILY, tmp_path_factory.mktemp("trainer"), bucket_bytes=256 << 10) as trainer,
        Fleet(trainer.source, [server.url], key_file=trainer.key_file, pause="keep", caches="recompute") as fleet,
    ):
        lane = Lane(server, trainer, fleet)
        for weights in range(1, NUM_PUBLISHES + 1):
            lane.publish(models.tensors(FAMILY, weights))
            lane.references[weights] = lane.fingerprint()
        yield lane


def mixtures(old, new):
    """Weights that a forward pass over a half-written model would see: the first layers new, or one matrix alone."""
    yield {name: new[name] if "layers.0." in name or "embed" in name else t for name, t in old.items()}
    yield {name: new[name] if name == "model.layers.1.self_attn.o_proj.weight" else t for name, t in old.items()}


def test_one_token_tells_versions_and_mixtures_of_them_apart(lane):
    """What the test under load rests on."""
    for a, b in itertools.combinations(lane.references.values(), 2):
        assert distance(a, b) > APART
    for weights in range(1, NUM_PUBLISHES):
        for mixed in mixtures(models.tensors(FAMILY, weights), models.tensors(FAMILY, weights + 1)):
            lane.publish(mixed)
            found = lane.fingerprint()
            assert min(distance(found, reference) for reference in lane.references.values()) > APART


def test_no_request_fails_and_none_mixes_weights_while_versions_are_published(lane, capsys):
    stop = threading.Event()
    clients = [Client(lane.server, NUM_TOKENS if i < NUM_LONG else 1, stop) for i in range(NUM_CLIENTS)]
    lane.publish(models.tensors(FAMILY, NUM_PUBLISHES))
    weights_of = {lane.version: NUM_PUBLISHES}
    reports = []
    for client in clients:
        client.start()
    try:
        for weights in range(1, NUM_PUBLISHES + 1):
            wait_for_answers(clients, 2 * NUM_CLIENTS)
            reports.append(lane.publish(models.tensors(FAMILY, weights)))
            weights_of[lane.version] = weights
        wait_for_answers(clients, 2 * NUM_CLIENTS)
    finally:
        stop.set()
        for client in clients:
            client.join(REQUEST_S)
    assert [client.error for client in clients if client.error] == []
    answers = [answer for client in clients for answer in client.answers]
    worst = max(check_first_token(lane, weights_of, answer) for answer in answers)
    num_by_version = collections.Counter(version for answer in answers for version, _, _ in answer.spans)
    assert num_by_version.keys() == weights_of.keys()
    spanning = [answer for answer in answers if len(answer.spans) > 1]
    assert len({answer.spans[0][0] for answer in spanning}) >= NUM_PUBLISHES // 2
    num_replayed = check_frozen_requests(lane, spanning)
    with capsys.disabled():
        sys.stderr.write(figures(reports, len(answers), len(spanning), num_replayed, worst))


def wait_for_answers(clients, num):
    """Until there are ``num`` more answers, or a client failed."""
    goal = sum(len(client.answers) for client in clients) + num
    pause = threading.Event()
    while sum(len(client.answers) for client in clients) < goal and not any(client.error for client in clients):
        assert any(client.is_alive() for client in clients)
        pause.wait(0.005)


def check_first_token(lane, weights_of, answer):
    """The first token comes from one pass: of the version that the answer names. Returns how far it is from it."""
    version = answer.spans[0][0]
    far = {weights: distance(answer.fingerprints[0], found) for weights, found in lane.references.items()}
    assert far[weights_of[version]] < TOLERANCE, (version, far)
    return far[weights_of[version]]


def check_frozen_requests(lane, spanning):
    """What a request that a pause froze says next is what a new request says for all that it has: its keys and values
    are computed again. For those that the last version, which still serves, went on with."""
    num = 0
    for answer in spanning:
        version, begin, _ = answer.spans[-1]
        if version == lane.version:
            assert distance(lane.fingerprint(PROMPT + answer.tokens[:begin]), answer.fingerprints[begin]) < TOLERANCE
            num += 1
    return num


def figures(reports, num_answers, num_spanning, num_replayed, worst):
    """The pauses, as text."""
    lines = [
        f"\n{len(reports)} publishes under {NUM_CLIENTS} clients: {num_answers} answers, {num_spanning} of them frozen "
        f"by a pause ({num_replayed} replayed); largest distance from their version {worst:.3f}"
    ]
    pauses = {
        "server, from asking for the pause until it steps": [r.servers["engine-0"].pause_s for r in reports],
        "update_weights, as the trainer sees it": [r.servers["engine-0"].commit_s for r in reports],
        "engine, decide to finish": [r.publish.seconds["pause"] for r in reports],
        "publish to last commit": [r.publish.seconds["total"] for r in reports],
    }
    for name, seconds in pauses.items():
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        lines.append(f"  {name}: p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms")
    return "\n".join(lines) + "\n"
