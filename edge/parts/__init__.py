"""What a part is on the line: triggers, numbers, deadlines.

triggers ──> matching (which image belongs to which trigger)
   ├─> mqtt_trigger
   └─> modbus_trigger
tracker ──> sequence (numbers and names), deadline (a verdict in time)
"""
