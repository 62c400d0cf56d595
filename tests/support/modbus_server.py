"""A PLC: pymodbus's own server, which can be switched off and on, and whose inputs a test may set."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal

from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

_FUNCTIONS = {"coil": 5, "discrete_input": 2, "register": 6, "input_register": 4}


class Plc:
    """Unit 1 with coils, inputs and registers 0..99 of each kind."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writes: list[list[int]] = []
        """Registers that were written by its clients."""
        self.num_reads = 0
        self.start()

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(20)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.shutdown(), self._loop).result(20)
        self._thread.join(20)
        self._loop.close()

    def set(
        self, kind: Literal["coil", "discrete_input", "register", "input_register"], address: int, *values: int
    ) -> None:
        """Set coils, inputs or registers, as the PLC's program would."""
        bits = kind in ("coil", "discrete_input")
        given: Any = [bool(value) for value in values] if bits else list(values)
        task = self._server.async_setValues(1, _FUNCTIONS[kind], address, given)
        asyncio.run_coroutine_threadsafe(task, self._loop).result(20)

    @property
    def registers(self) -> list[int]:
        """The last ones written; zeros before."""
        return self.writes[-1] if self.writes else [0] * 10

    def _trace(self, sending: bool, pdu: Any) -> Any:
        if not sending and getattr(pdu, "registers", None):
            self.writes.append(list(pdu.registers))
        self.num_reads += not sending
        return pdu

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            bits, words = (
                SimData(0, count=100, datatype=DataType.BITS),
                SimData(0, count=100, datatype=DataType.REGISTERS),
            )
            device = SimDevice(1, ([bits], [bits], [words], [words]))
            self._server = ModbusTcpServer(device, address=("127.0.0.1", self.port), trace_pdu=self._trace)
            await self._server.listen()
            started.set()
            await self._server.serving

        self._loop.run_until_complete(serve())
