"""What all routes of the page have in common: their headers, how a request's body is read, and their answers."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from edge.web.page import OperatorPage, given_token
from edgeflame.errors import UsageError
from edgeflame.listener import IDLE_S

MAX_BODY_BYTES = 10_000

Told = TypeVar("Told", bound=msgspec.Struct)

_KEY = re.compile(r"[0-9]{1,18}", re.ASCII)
SIDE = re.compile(r"[1-9][0-9]{1,3}", re.ASCII)

HEADERS = {
    # Everything is loaded from this server, and no other site may frame the page.
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


async def order_of(page: OperatorPage, request: Request, of: type[Told], *, expected: str) -> Told | Response:
    """What a request asks to change; or the answer to one without the token, or that cannot be read.

    Args:
        page: whose token it is.
        request: with the order as its body.
        of: the order's type.
        expected: what such a body looks like, for the answer.
    """
    if not page.may_change(request):
        return _not_taken(request)
    if not isinstance(body := await _body_of(request), bytes):
        return body
    try:
        return msgspec.json.decode(body, type=of)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        return problem(400, f"expected {expected} ({exc})")


def query_of(request: Request, of: type[Told], *, what: str) -> Told:
    """A request's parameters.

    Args:
        request: any of its parameters may be left out.
        of: their names and types.
        what: is looked for with them.

    Raises:
        UsageError: an unknown one, or a value that makes no sense.
    """
    given, known = dict(request.query_params), of.__struct_fields__
    unknown = given.keys() - set(known)
    if unknown:
        raise UsageError(f"unknown: {', '.join(sorted(unknown))[:100]}; known: {', '.join(known)}")
    try:
        return msgspec.convert(given, of, strict=False)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise UsageError(f"{what} are looked for by {', '.join(known)} ({exc})") from exc


async def _body_of(request: Request) -> bytes | Response:
    """A request's body, or the answer to one that is too long, too slow, or broken off."""
    try:
        return await asyncio.wait_for(_read(request), IDLE_S)
    except ValueError:
        return problem(413, "too long")
    except (TimeoutError, asyncio.TimeoutError):
        return problem(408, "too slow")
    except ClientDisconnect:
        return problem(400, "broken off")


async def _read(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ValueError
    return body


def part_key(request: Request) -> int | None:
    """The number of a part in a path; None if it is none that a part can have."""
    key = request.path_params["key"]
    return int(key) if _KEY.fullmatch(key) else None


def json_answer(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=HEADERS)


def _not_taken(request: Request) -> Response:
    return problem(
        401, "that is not the operator's token" if given_token(request) else "this needs the operator's token"
    )


def problem(status: int, text: str) -> Response:
    return Response(msgspec.json.encode({"error": text}), status, HEADERS, "application/json")
