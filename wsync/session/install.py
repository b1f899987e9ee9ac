"""From staged buckets to the engine: verify what arrived, fill scratch memory and repack, install into live memory.

Every word is digested where it is read: in a staged bucket, and again where it is unpacked. The digests of a bucket's
runs add up to the published one, so what goes into scratch memory is checked by itself, before the rank votes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from wsync import kernels
from wsync.errors import CommitError, DigestError, StateError, WsyncError
from wsync.plan.program import Fill, SinkProgram
from wsync.session.laststep import LastSteps, Repack
from wsync.transport import SinkEnd, Staged
from wsync.transport.base import Cancelled

WriteConstants = Callable[[frozenset[int] | None], None]
"""Writes what the loader itself sets (zeros in padding) into the storages of these indices; None means all."""


class Installer:
    """Replays one epoch's install program, version after version: `verify` each bucket, `stage`, `install`, `finish`.

    Args:
        program: of this rank.
        end: whose staging is read.
        steps: of this engine, in the order of the program's scratch fills.
        num_threads: of the digest and unpack kernels.
        name: of this rank, for messages.
        write_constants: called for the scratch memory of a repack each time that it was filled, and for live memory
            when it is written for the first time in this epoch.
    """

    def __init__(
        self,
        program: SinkProgram,
        end: SinkEnd,
        steps: LastSteps,
        *,
        num_threads: int,
        name: str,
        write_constants: WriteConstants,
    ) -> None:
        self._program = program
        self._end = end
        self._steps = steps
        self._num_threads = num_threads
        self._name = name
        self._write_constants = write_constants
        self._live_storages = program.live_storages if steps.repacks else None
        self._expected = [0] * program.num_slots
        self._staged: dict[int, Staged] = {}
        self._scratch_read_back = 0
        self._live_read_back = False
        self._begun: list[Repack] = []

    # ---- while the old version serves

    def begin(self) -> None:
        """A version comes."""
        self._staged.clear()

    def verify(self, staged: Staged) -> str:
        """Digest a bucket that arrived. Returns what is wrong with it, or an empty string."""
        bucket = self._program.slice_.buckets[staged.bucket_pos]
        base = bucket.bucket_idx * self._program.slice_.bucket_bytes
        runs = self._program.runs[staged.bucket_pos]
        for run in runs:
            for slot in run.slots:
                self._expected[slot] = 0
        total = 0
        for begin, end, slots in runs:
            got = kernels.digest(staged.address + begin, end - begin, (base + begin) // 8, self._num_threads)
            total += got
            for slot in slots:
                self._expected[slot] += got
        self._staged[staged.bucket_pos] = staged
        if total % 2**64 == staged.digest:
            return ""
        return f"bucket {bucket.bucket_idx}: published {staged.digest:016x}, staged {total % 2**64:016x}"

    def stage(self, seq: int, cancelled: Cancelled) -> None:
        """Fill the scratch memory of one repack after the other, check it, and make the packed form of it.

        Touches nothing that the engine reads. After an error `discard` is due.

        Args:
            seq: the round that the buckets were received in.
            cancelled: called before each repack; raises the error that should end this.

        Raises:
            DigestError: staging was overwritten, or scratch memory is not what was published.
            CommitError: the engine's own code failed.
        """
        for number, (repack, fill) in enumerate(zip(self._steps.repacks, self._program.scratch, strict=True)):
            cancelled()
            self._check_valid(seq)
            self._unpack(fill, f"unpacked for {repack.name!r}")
            self._check_valid(seq)
            self._constants(repack.storages)
            if number >= self._scratch_read_back:
                # Now, and not after the last one: the next repack may use the same scratch memory.
                self._read_back(fill, f"in scratch memory of {repack.name!r}")
                self._scratch_read_back += 1
            self._begun.append(repack)
            self._run(repack.prepare, f"preparing {repack.name!r}")

    # ---- on the engine's thread

    def install(self, seq: int) -> None:
        """Write every bucket's live part into live memory, in place, on the calling thread.

        Args:
            seq: the round that the buckets were received in.

        Raises:
            DigestError: staging was overwritten, or what was written is not what was published. Live memory is of no
                known version then.
        """
        self._check_valid(seq)
        self._unpack(self._program, "unpacked")
        self._check_valid(seq)
        if not self._live_read_back:
            self._constants(self._live_storages)
            self._read_back(self._program, "installed")
            self._live_read_back = True

    def finish(self) -> None:
        """Put the prepared forms in place, and refresh what the engine derives.

        Raises:
            CommitError: the engine's own code failed. Live memory is of no known version then.
        """
        if len(self._begun) != len(self._steps.repacks):
            raise StateError(f"{self._name}: {len(self._begun)} of {len(self._steps.repacks)} repacks are prepared")
        while self._begun:
            self._run(self._begun[0].commit, f"committing {self._begun[0].name!r}")
            del self._begun[0]
        self._run(self._steps.refresh, "refreshing what the engine derives from its weights")

    def discard(self) -> None:
        """Forget what was prepared and is not in place. May be called at any time, also when there is nothing.

        The engine's code that fails here is warned of: what ended the version matters more.
        """
        begun, self._begun = self._begun, []
        for repack in begun:
            try:
                repack.discard()
            except Exception as e:
                message = f"{self._name}: discarding {repack.name!r} failed: {type(e).__name__}: {e}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _constants(self, storage_idxs: frozenset[int] | None) -> None:
        self._run(lambda: self._write_constants(storage_idxs), "writing the loader's own values")

    def _run(self, step: Callable[[], None], what: str) -> None:
        try:
            step()
        except WsyncError:
            raise
        except Exception as e:  # code of the engine: whatever it raises, the trainer must hear of it by name
            raise CommitError(f"{self._name}: {what} failed: {type(e).__name__}: {e}") from e

    # ---- bytes

    def _unpack(self, fill: Fill, what: str) -> None:
        staged = self._staged
        for i, pos in enumerate(fill.positions):
            got = kernels.unpack(fill.buckets[i], staged[pos].address, self._num_threads)
            self._compare(fill, i, got, what)

    def _read_back(self, fill: Fill, what: str) -> None:
        """Layout mistakes are the same at every version: reading all bytes back once per epoch finds them."""
        for i, pos in enumerate(fill.positions):
            self._compare(fill, i, kernels.installed_digest(fill.buckets[i], self._num_threads), what)
            second = kernels.mismatched_duplicate(fill, i, self._num_threads)
            if second is not None:
                storage = fill.duplicates[i].storages[second]
                raise DigestError(f"{self._name}: bucket at position {pos}: the second copy in {storage!r} differs")

    def _compare(self, fill: Fill, i: int, got: int, what: str) -> None:
        total = (got + fill.padding_digests[i]) % 2**64
        expected = self._expected[fill.first_slot + i] % 2**64
        if total != expected:
            raise DigestError(
                f"{self._name}: bucket at position {fill.positions[i]}: published {expected:016x}, {what} {total:016x}"
            )

    def _check_valid(self, seq: int) -> None:
        if not self._end.still_valid(seq):
            raise DigestError(f"{self._name}: staging of publish {seq} was overwritten before it was installed")
