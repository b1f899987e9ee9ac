"""What users hold: `Source` on every trainer rank, `Sink` on every engine rank."""

from wsync.api.sink import Sink
from wsync.api.source import Source
from wsync.session.auth import new_key_file
from wsync.session.publication import Publication
from wsync.session.report import PublishReport
from wsync.session.vote import Ticket

__all__ = ["Publication", "PublishReport", "Sink", "Source", "Ticket", "new_key_file"]
