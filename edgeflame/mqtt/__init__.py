"""MQTT: the client, the broker's address, kits, topics and messages, and an embedded broker for one host."""
