"""The page's routes for teaching a product.

GET  /api/teaching                             how all products stand (:class:`edge.teaching.orders.TeachingStatus`)
POST /api/teaching                             :class:`edge.teaching.orders.TeachingOrder`, with the operator's token
GET  /api/teaching/frame.jpg                   the last picture of ?camera=NAME, whole
GET  /api/teaching/{product}/scores            the scores of the model learnt (:class:`fitting.scores.FitScores`)
GET  /api/teaching/{product}/{kind}/{name}     a picture as JPEG; kind: photographs, refused, or heat
"""

from __future__ import annotations

import asyncio
from typing import get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge.teaching.look import PictureKind
from edge.teaching.orders import TeachingOrder, TeachingStatus
from edge.web.page import OperatorPage, http_status_of
from edge.web.responses import HEADERS, SIDE, json_answer, order_of, problem
from edgeflame.errors import EdgeFlameError


def teaching_routes(page: OperatorPage) -> list[Route]:
    """The routes of a page."""

    async def status(_request: Request) -> Response:
        if page.teacher is None:
            return json_answer(TeachingStatus(products=(), frames={}))
        return json_answer(await asyncio.to_thread(page.teacher.status))

    async def order(request: Request) -> Response:
        given = await order_of(page, request, TeachingOrder, expected='{"action": ..., "product": ...}')
        if isinstance(given, Response):
            return given
        try:
            return json_answer(await page.actions.teach(given))
        except EdgeFlameError as exc:
            return problem(http_status_of(exc), str(exc))

    async def frame(request: Request) -> Response:
        camera, side = request.query_params.get("camera", ""), request.query_params.get("side", "1280")
        if page.teacher is None or not SIDE.fullmatch(side):
            return problem(404, "there is no picture")
        return _picture(await asyncio.to_thread(page.teacher.frame, camera, side=int(side)))

    async def scores(request: Request) -> Response:
        if page.teacher is None:
            return problem(404, "nothing is taught here")
        try:
            found = await asyncio.to_thread(page.teacher.scores, request.path_params["product"])
        except EdgeFlameError as exc:
            return problem(http_status_of(exc), str(exc))
        # The maps are shown as pictures.
        bare = tuple(msgspec.structs.replace(one, map=()) for one in found.photographs)
        return json_answer(msgspec.structs.replace(found, photographs=bare))

    async def picture(request: Request) -> Response:
        given, side = request.path_params, request.query_params.get("side", "960")
        if page.teacher is None or given["kind"] not in get_args(PictureKind) or not SIDE.fullmatch(side):
            return problem(404, "there is no such picture")
        try:
            data = await asyncio.to_thread(
                page.teacher.picture, given["product"], given["kind"], given["name"], side=int(side)
            )
        except EdgeFlameError as exc:
            return problem(404, str(exc))
        return _picture(data)

    return [
        Route("/api/teaching", status),
        Route("/api/teaching", order, methods=["POST"]),
        Route("/api/teaching/frame.jpg", frame),
        Route("/api/teaching/{product}/scores", scores),
        Route("/api/teaching/{product}/{kind}/{name}", picture),
    ]


def _picture(data: bytes | None) -> Response:
    if data is None:
        return problem(404, "there is no such picture")
    return Response(data, media_type="image/jpeg", headers=HEADERS)
