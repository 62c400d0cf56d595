"""Parts on the line: triggers that announce them, their numbers, and deadlines.

triggers ──> matching (which image belongs to which trigger)
   ├─> mqtt_trigger
   └─> modbus_trigger
tracker ──> sequence (numbers and names), deadline (a verdict in time)
"""
