"""The line side: runtimes, sources, verdicts and the inspection daemon. Never imports torch."""
