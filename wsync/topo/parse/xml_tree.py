"""XML without its dangers: no document types, no entities, limits on size and depth; every node knows its line.

The standard library's parser, refused a DTD, has nothing to expand and nothing to fetch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from wsync.errors import ConfigError

MAX_DEPTH = 32
MAX_NODES = 1 << 18


@dataclass
class Node:
    """One element."""

    tag: str
    attributes: dict[str, str]
    line: int
    children: list[Node] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        """An attribute, or None."""
        return self.attributes.get(name)

    def number(self, name: str) -> int | None:
        """An attribute as a whole number, decimal or ``0x``; None if absent or not one."""
        text = self.attributes.get(name, "").strip()
        try:
            return int(text, 16) if text.lower().startswith("0x") else int(text)
        except ValueError:
            return None

    def real(self, name: str) -> float | None:
        """An attribute as a finite number; None if absent or not one."""
        try:
            value = float(self.attributes.get(name, ""))
        except ValueError:
            return None
        return value if abs(value) < 1e12 else None

    def all(self, tag: str) -> list[Node]:
        """Children of that tag."""
        return [c for c in self.children if c.tag == tag]

    def walk(self) -> Iterator[Node]:
        """This node and all below, in document order."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


def parse_xml(text: str, name: str) -> Node:
    """Parse a document whole.

    Raises:
        ConfigError: truncated (the message names the elements that are not closed), malformed, with a document type, or
            over the limits.
    """
    reader = _Reader(name)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = lambda tag, attributes: reader.start(tag, attributes, parser.CurrentLineNumber)
    parser.EndElementHandler = reader.end
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    try:
        # Blank lines before an element are allowed, and keep the numbers of lines; before a declaration they are not.
        parser.Parse(text.lstrip() if text.lstrip().startswith("<?xml") else text, True)
    except expat.ExpatError as e:
        if reader.open:
            where = " > ".join(f"<{node.tag}>" for node in reader.open)
            raise ConfigError(
                f"{name}: truncated XML: {where} is not closed, line {e.lineno}: {expat.ErrorString(e.code)}",
                hint="copy the whole file; a log or a chat may have cut it",
            ) from e
        raise ConfigError(f"{name}: not XML, line {e.lineno}: {expat.ErrorString(e.code)}") from e
    if reader.root is None:
        raise ConfigError(f"{name}: XML without an element")
    return reader.root


class _Reader:
    """Builds the tree under limits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: Node | None = None
        self.open: list[Node] = []
        self.num_nodes = 0

    def start(self, tag: str, attributes: dict[str, str], line: int) -> None:
        node = Node(tag, attributes, line)
        self.num_nodes += 1
        if len(self.open) >= MAX_DEPTH or self.num_nodes > MAX_NODES:
            raise ConfigError(
                f"{self.name}: XML over the limits of {MAX_DEPTH} levels and {MAX_NODES} elements, line {line}"
            )
        if self.open:
            self.open[-1].children.append(node)
        else:
            self.root = node
        self.open.append(node)

    def end(self, tag: str) -> None:
        self.open.pop()

    def refuse_doctype(self, *_: object) -> None:
        raise ConfigError(f"{self.name}: XML with a document type is refused; NCCL writes none")
