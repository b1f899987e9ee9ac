"""Names and shapes from safetensors headers. Reads no weights.

Source: safetensors README, section "Format": eight bytes of length (little endian), then JSON, then the tensors' bytes,
without holes and without overlap.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from wsync.errors import ConfigError, DtypeMismatchError, ManifestError
from wsync.spec.dtypes import itemsize
from wsync.spec.files import read_file
from wsync.spec.manifest import TensorSpec, check_tensor

MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library allows."""
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}
"""safetensors' names of dtypes -> torch's."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def read_headers(path: Path) -> tuple[TensorSpec, ...]:
    """The tensors of a safetensors file, of an index, or of a folder of either; empty for a folder without any.

    Raises:
        ConfigError: a file that is missing, truncated, or not a safetensors file.
        ManifestError: a tensor in two files, or one that the index names and its file lacks.
        DtypeMismatchError: a dtype that wsync does not move.
    """
    if path.is_dir():
        if (path / INDEX).is_file():
            return _of_index(path / INDEX)
        return _joined(sorted(path.glob("*.safetensors")))
    if path.name.endswith(".index.json"):
        return _of_index(path)
    return _joined([path])


def _of_index(path: Path) -> tuple[TensorSpec, ...]:
    try:
        index = msgspec.json.decode(read_file(path, MAX_HEADER_BYTES), type=_Index)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not the index of a safetensors checkpoint: {e}") from e
    files = dict.fromkeys(index.weight_map.values())
    for name in files:
        if Path(name).name != name:
            raise ConfigError(f"{path} names the file {name!r}, which is not in its own folder")
    found = {t.name: t for t in _joined([path.parent / name for name in files])}
    for name, file in index.weight_map.items():
        if name not in found:
            raise ManifestError(f"{path} says that {name!r} is in {file!r}, but its header does not have it")
    return tuple(found[name] for name in index.weight_map)


def _joined(paths: list[Path]) -> tuple[TensorSpec, ...]:
    found: dict[str, tuple[TensorSpec, Path]] = {}
    for path in paths:
        for tensor in read_header(path):
            if tensor.name in found:
                raise ManifestError(f"tensor {tensor.name!r} is in {found[tensor.name][1]} and again in {path}")
            found[tensor.name] = (tensor, path)
    return tuple(tensor for tensor, _ in found.values())


def read_header(path: Path) -> tuple[TensorSpec, ...]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        ConfigError: as `read_headers`.
        DtypeMismatchError: a dtype that wsync does not move.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise ConfigError(
                    f"{path} has {file_bytes} bytes, but its header says that it has {header_bytes} bytes itself, of "
                    f"at most {MAX_HEADER_BYTES}"
                )
            raw = file.read(header_bytes)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    entries = _decode(raw, path)
    _check_offsets(entries, file_bytes - 8 - header_bytes, path)
    return tuple(_tensor(name, entry, path) for name, entry in entries.items())


def _decode(raw: bytes, path: Path) -> dict[str, _Entry]:
    """The header's tensors in the order of their bytes."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(field, type=_Entry) for name, field in fields.items()}
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"the header of {path} ({len(raw)} bytes) is not that of a safetensors file: {e}") from e
    return dict(sorted(entries.items(), key=lambda item: item[1].data_offsets))


def _check_offsets(entries: dict[str, _Entry], data_bytes: int, path: Path) -> None:
    end = 0
    for name, entry in entries.items():
        if entry.data_offsets[0] != end or entry.data_offsets[1] < end:
            raise ConfigError(
                f"the header of {path} puts {name!r} at bytes {entry.data_offsets[0]} to {entry.data_offsets[1]}, but "
                f"the tensor before it ends at {end}"
            )
        end = entry.data_offsets[1]
    if end != data_bytes:
        raise ConfigError(f"the header of {path} describes {end} bytes of tensors, but the file has {data_bytes}")


def _tensor(name: str, entry: _Entry, path: Path) -> TensorSpec:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise DtypeMismatchError(
            f"{name!r} in {path} is {entry.dtype}, which is not one of those that wsync moves ({known})"
        )
    tensor = TensorSpec(name, entry.shape, dtype)
    check_tensor(tensor)
    nbytes = math.prod(entry.shape) * itemsize(dtype)
    if nbytes != entry.data_offsets[1] - entry.data_offsets[0]:
        raise ConfigError(
            f"{name!r} in {path} has shape {entry.shape} of {entry.dtype}, which is {nbytes} bytes, but "
            f"{entry.data_offsets[1] - entry.data_offsets[0]} bytes of data"
        )
    return tensor
