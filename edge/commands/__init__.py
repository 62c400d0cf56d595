"""Commands to a running line over the broker: their messages, the server that takes them, and the client."""
