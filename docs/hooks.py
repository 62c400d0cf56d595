"""For MkDocs: links from a page to a file of the repository that is no page become the file's name.

On the repository's own site such a link opens the file; the built pages are read elsewhere.
"""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|deploy|tests|[A-Z]+\.md)[^)\s]*)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page's text before it is rendered."""
    return _OUTSIDE.sub(lambda match: f"{match[1]} (`{match[2]}` of the repository)", markdown)
