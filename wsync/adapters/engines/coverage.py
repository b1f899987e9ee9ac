"""How much of an engine a recording covers, and by which road its values arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageCoverage:
    """How much of one live storage the recording covers, in elements.

    Attributes:
        names: the tensors in it.
        covered: written from the checkpoint.
        constant: set by the loader to values that are not from the checkpoint; they stay as they are.
        total: all.
        direct_bytes: live bytes that the copies write in place.
        widened_bytes: live bytes that arrive in a narrower dtype and are widened at the commit.
        transformed_bytes: live bytes whose values are made at the commit, of codes and scales.
    """

    names: tuple[str, ...]
    covered: int
    constant: int
    total: int
    direct_bytes: int = 0
    widened_bytes: int = 0
    transformed_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether every element is covered or constant."""
        return self.covered + self.constant >= self.total


@dataclass(frozen=True)
class Coverage:
    """How much of the engine a recording covers.

    Attributes:
        storages: those that take copies or constants, in the order of the recording's storages.
        not_loaded: live buffers that the loader does not touch (rotary frequencies, caches): not weights.
        missing: parameters that it does not fill and that were allowed to be missing.
        unused: checkpoint tensors that it ignores (a tied lm_head).
    """

    storages: tuple[StorageCoverage, ...]
    not_loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def covered(self) -> int:
        """Elements that are written from the checkpoint."""
        return sum(s.covered for s in self.storages)

    @property
    def constant(self) -> int:
        """Elements that keep a constant."""
        return sum(s.constant for s in self.storages)

    @property
    def total(self) -> int:
        """Elements of all storages that the loader fills."""
        return sum(s.total for s in self.storages)

    @property
    def direct_bytes(self) -> int:
        """Live bytes that the copies write in place."""
        return sum(s.direct_bytes for s in self.storages)

    @property
    def widened_bytes(self) -> int:
        """Live bytes that arrive in a narrower dtype and are widened at the commit."""
        return sum(s.widened_bytes for s in self.storages)

    @property
    def transformed_bytes(self) -> int:
        """Live bytes whose values are made at the commit, of codes and scales."""
        return sum(s.transformed_bytes for s in self.storages)

    @property
    def complete(self) -> bool:
        """Whether every parameter is filled."""
        return not self.missing and all(s.complete for s in self.storages)

    def describe(self) -> str:
        """One paragraph for logs."""
        nbytes = self.direct_bytes + self.widened_bytes + self.transformed_bytes
        share = 100 * self.direct_bytes / nbytes if nbytes else 100.0
        said = [
            f"{self.covered} of {self.total} elements in {len(self.storages)} pieces of live memory come from the "
            f"checkpoint: {self.direct_bytes} bytes ({share:.6g} %) are written in place"
        ]
        if self.widened_bytes:
            widened = [s.names[0] for s in self.storages if s.widened_bytes]
            said.append(f"{self.widened_bytes} bytes of {_listed(widened)} are widened at the commit")
        if self.transformed_bytes:
            transformed = [s.names[0] for s in self.storages if s.transformed_bytes]
            said.append(f"{self.transformed_bytes} bytes of {_listed(transformed)} are transformed at the commit")
        if self.constant:
            constant = [s.names[0] for s in self.storages if s.constant]
            said.append(f"{self.constant} elements of {_listed(constant)} keep what the loader itself sets")
        if self.missing:
            said.append(f"nothing fills {_listed(self.missing)}, as allowed")
        if self.not_loaded:
            said.append(f"the loader leaves the buffers {_listed(self.not_loaded)} alone")
        if self.unused:
            said.append(f"it ignores the checkpoint's {_listed(self.unused)}")
        return "; ".join(said) + "."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
