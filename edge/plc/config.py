"""Section ``[modbus]`` of the inspection's configuration."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeflame.errors import ConfigError

NUM_REGISTERS = {1: 10, 2: 13}
"""By layout."""


class ModbusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the PLC is, and which of its registers are ours."""

    host: str
    """Name or address of the PLC."""
    port: int = 502
    """Of its Modbus TCP server."""
    unit: int = 1
    """Device id."""
    register: int = 0
    """Address of the first of our holding registers, from 0."""
    layout: Literal[1, 2] = 1
    """1: ten registers. 2: these and three more, for a PLC that announces its parts: the part's own number and what is
    the matter with it."""
    heartbeat_s: float = 0.5
    """How often the register +3 changes."""
    timeout_s: float = 1.0
    """Of a request."""

    def __post_init__(self) -> None:
        rules = (
            (bool(self.host), "modbus.host must not be empty", self.host),
            (1 <= self.port <= 65535, "modbus.port must be 1..65535", self.port),
            (0 <= self.unit <= 255, "modbus.unit must be 0..255", self.unit),
            (
                0 <= self.register <= 65536 - self.num_registers,
                f"modbus.register must be 0..{65536 - self.num_registers}",
                self.register,
            ),
            (0.05 <= self.heartbeat_s <= 60, "modbus.heartbeat_s must be 0.05..60", self.heartbeat_s),
            (0.05 <= self.timeout_s <= 60, "modbus.timeout_s must be 0.05..60", self.timeout_s),
        )
        for holds, rule, value in rules:
            if not holds:
                msg = f"{rule}, not {value}"
                raise ConfigError(msg)

    @property
    def num_registers(self) -> int:
        """Of the layout."""
        return NUM_REGISTERS[self.layout]
