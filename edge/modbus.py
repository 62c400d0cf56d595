"""A connection to a PLC over Modbus TCP, shared by the PLC sink, the trigger source and ``inspect --check``."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ModbusException
from pymodbus.pdu import ModbusPDU

from edgeflame.errors import LinkError


@final
class ModbusLink:
    """Connects when it is used, and anew after an error. Not thread-safe.

    Args:
        host: name or address of the PLC.
        port: TCP port of its Modbus server.
        timeout_s: limit for each request, and for connecting, seconds.
    """

    def __init__(self, host: str, port: int, *, timeout_s: float) -> None:
        self.address = f"{host}:{port}"
        self._client = ModbusTcpClient(host, port=port, timeout=timeout_s, retries=0, reconnect_delay=0)

    def request(self, send: Callable[[ModbusTcpClient], ModbusPDU]) -> ModbusPDU:
        """Send one request and return the PLC's answer.

        Args:
            send: makes the request: one call of the client.

        Raises:
            LinkError: there is no connection, or no answer in time, or the PLC refuses.
        """
        try:
            if not self._client.connected and not self._client.connect():  # type: ignore[no-untyped-call]
                raise LinkError("no connection to the PLC")
            answer = send(self._client)
        except (ModbusException, OSError) as exc:
            self.close()
            raise LinkError(f"the PLC does not answer ({exc})") from exc
        if answer.isError():
            raise LinkError(f"the PLC refuses: {answer}")
        return answer

    def close(self) -> None:
        """Disconnect; the next request connects again."""
        self._client.close()  # type: ignore[no-untyped-call]
