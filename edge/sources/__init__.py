"""Where images come from: folders, files, videos, cameras, and generated boards."""

from edge.sources.interface import Frame, Source
from edge.sources.locate import open_source

__all__ = ["Frame", "Source", "open_source"]
