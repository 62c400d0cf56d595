"""Administration of a fleet: identities, their rights on the broker, observing, publishing packages."""
