"""A web server's way to a broker, as nginx is one: WebSocket frames in front, plain MQTT behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import threading
from collections.abc import Iterator

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PIECE = 3000
"""Bytes of a frame; MQTT's packets are cut wherever that is."""


def _frame(opcode: int, payload: bytes) -> bytes:
    if len(payload) < 126:
        return bytes([0x80 | opcode, len(payload)]) + payload
    return bytes([0x80 | opcode, 126]) + len(payload).to_bytes(2, "big") + payload


async def _to_client(broker: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    while data := await broker.read(_PIECE):
        # A proxy may ask at any time whether somebody is there.
        client.write(_frame(0x9, b"?") + _frame(0x2, data))
        await client.drain()


async def _to_broker(client: asyncio.StreamReader, broker: asyncio.StreamWriter) -> None:
    while True:
        head = await client.readexactly(2)
        length = head[1] & 0x7F
        if length > 125:
            length = int.from_bytes(await client.readexactly(2 if length == 126 else 8), "big")
        # paho does not mask its answers to pings.
        mask = await client.readexactly(4) if head[1] & 0x80 else bytes(4)
        payload = bytes(one ^ mask[at % 4] for at, one in enumerate(await client.readexactly(length)))
        if head[0] & 0x0F == 0x2:
            broker.write(payload)
            await broker.drain()


@contextlib.contextmanager
def websocket_proxy(broker_port: int, *, path: str = "/mqtt") -> Iterator[int]:
    """Serve a broker on the loopback interface while the block runs; yields the port. Other paths are a 404."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # However it ends, cancelled by the end of the block too: what is left open is reported in a later test.
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if (
                not request.startswith(f"GET {path} ".encode())
                or b"sec-websocket-protocol: mqtt" not in request.lower()
            ):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                return
            (key,) = [line[19:] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: ")]
            accept = base64.b64encode(hashlib.sha1(key.strip() + _MAGIC).digest())
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", broker_port)
            with contextlib.closing(to_broker):
                both = [
                    asyncio.create_task(_to_client(from_broker, writer)),
                    asyncio.create_task(_to_broker(reader, to_broker)),
                ]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in both:
                        task.cancel()
                    await asyncio.gather(*both, return_exceptions=True)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:

        async def stop() -> None:
            server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            # A closed connection lets go of its socket in the loop's next turn.
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
