"""Install: staged buckets go to live engine memory, checked as written and, once per epoch, as they lie there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wsync import kernels
from wsync.errors import DigestError
from wsync.plan.program import SinkProgram
from wsync.transport import SinkEnd, Staged


class Installer:
    """Replays one epoch's install program.

    Args:
        program: of this rank.
        end: whose staging is read.
        num_threads: of the unpack kernel.
        name: of this rank, for messages.
        first_install: called once, when live memory is written for the first time in this epoch.
    """

    def __init__(
        self, program: SinkProgram, end: SinkEnd, num_threads: int, name: str, first_install: Callable[[], None]
    ) -> None:
        self._program = program
        self._end = end
        self._num_threads = num_threads
        self._name = name
        self._read_back = True
        self._first_install = first_install

    def install(self, staged: Mapping[int, Staged], seq: int) -> None:
        """Write every bucket into live memory, in place, on the calling thread.

        Args:
            staged: by position in the slice's buckets; all of them.
            seq: the round that they were received in.

        Raises:
            DigestError: staging was overwritten, or what was written is not what was published. Live memory is of no
                known version then.
        """
        program = self._program
        self._check_valid(seq)
        for pos, descs in enumerate(program.buckets):
            got = kernels.unpack(descs, staged[pos].address, self._num_threads)
            self._compare(staged[pos], got, program.padding_digests[pos], "unpacked")
        self._check_valid(seq)
        if self._read_back:
            self._first_install()
            # Layout mistakes are the same at every version: reading all live bytes back once per epoch finds them.
            self._check_live(staged)
            self._read_back = False

    def _check_live(self, staged: Mapping[int, Staged]) -> None:
        for pos, descs in enumerate(self._program.buckets):
            got = kernels.installed_digest(descs, self._num_threads)
            self._compare(staged[pos], got, self._program.padding_digests[pos], "installed")
            second = kernels.mismatched_duplicate(self._program, pos, self._num_threads)
            if second is not None:
                storage = self._program.duplicates[pos].storages[second]
                raise DigestError(f"{self._name}: bucket at position {pos}: the second copy in {storage!r} differs")

    def _compare(self, staged: Staged, got: int, padding: int, what: str) -> None:
        total = (got + padding) % 2**64
        if total != staged.digest:
            raise DigestError(
                f"{self._name}: bucket at position {staged.bucket_pos}: published {staged.digest:016x}, "
                f"{what} {total:016x}"
            )

    def _check_valid(self, seq: int) -> None:
        if not self._end.still_valid(seq):
            raise DigestError(f"{self._name}: staging of publish {seq} was overwritten before it was installed")
