"""The verdict for the machine that ejects the part, over Modbus TCP."""
