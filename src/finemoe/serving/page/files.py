"""The page's own files: read once, served with their ETag, and allowed nothing but themselves."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple

from fastapi import Request, Response

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time; the answer is 304 until finemoe is updated
}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class File(NamedTuple):
    """One file of the page."""

    content: bytes
    kind: str
    etag: str

    def response(self, request: Request) -> Response:
        """The file; or, to who has it, that it is the same."""
        headers = HEADERS | {"etag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.kind, headers=headers)


def read_files() -> dict[str, File]:
    """All files of the page by name; `index.html` is the page."""
    found = {}
    for path in resources.files("finemoe.serving.page").joinpath("static").iterdir():
        kind = KINDS.get(path.name.rpartition(".")[2])
        if kind is not None:
            content = path.read_bytes()
            found[path.name] = File(content, f"{kind}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found
