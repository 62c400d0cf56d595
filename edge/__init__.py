"""The edge side: runtimes, image sources, verdicts and the inspection daemon (the *line*). Never imports torch."""
