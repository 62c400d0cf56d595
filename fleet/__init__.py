"""Administration of a fleet, the fifth role: identities, their access, observing, publishing packages."""
