"""Programs: a plan's slices bound to addresses, as flat arrays of the records of `wsync.plan.descriptors`."""

from wsync.plan.padding import padding_digest, padding_ranges
from wsync.plan.sink_program import UNCOUNTED_WORD, Duplicates, Fill, Run, SinkProgram, StorageMemory, compile_sink
from wsync.plan.source_program import ShardMemory, SourceProgram, compile_source
from wsync.plan.tables import ScaleTable, TableKey

__all__ = [
    "UNCOUNTED_WORD",
    "Duplicates",
    "Fill",
    "Run",
    "ScaleTable",
    "ShardMemory",
    "SinkProgram",
    "SourceProgram",
    "StorageMemory",
    "TableKey",
    "compile_sink",
    "compile_source",
    "padding_digest",
    "padding_ranges",
]
