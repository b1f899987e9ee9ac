"""The contract suite on the transports that ship."""

import pytest

from wsync.testing.transport_contract import TransportContract


class TestLoopback(TransportContract):
    transport = "loopback"
    in_process = True


@pytest.mark.multiproc
class TestShm(TransportContract):
    transport = "shm"


@pytest.mark.multiproc
class TestGloo(TransportContract):
    transport = "gloo"


class TestShmBetweenThreads(TransportContract):
    """Trainer and engine in one process share a mapping instead of opening the segment twice."""

    transport = "shm"
    in_process = True
