"""Commands to a running line over the broker: their messages, the line's desk that takes them, and who sends them."""
