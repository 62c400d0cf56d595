"""Section ``[models]``: whether and how the line takes models that are published to its fleet."""

from __future__ import annotations

import msgspec

from edgeflame.errors import ConfigError
from edgeflame.releases.messages import MAX_OUTCOMES, MAX_SHADOW_PARTS


class ModelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[models]``; needs ``[mqtt]`` and ``--state``."""

    public_keys: tuple[str, ...]
    """Files of the keys that are trusted (``edgeflame-key.pub``). A package that none of them signed is refused, also
    one that was taken while its key still stood here."""
    shadow_parts: int = 200
    """A new model first judges so many parts beside the present one; 0: it is switched to as soon as it is checked."""
    max_disagreement: float = 0.02
    """Share of these parts on which the two verdicts may differ."""
    max_slowdown: float = 1.5
    """How many times the present model's computing time for a part a new one may take."""
    trial_parts: int = 2000
    """For so many parts after a switch the model before judges along, and the new one is rolled back if it proves bad;
    0: never by itself."""
    max_faults: int = 3
    """Parts on trial that the new model's own failures may leave without a score, of any 100 in a row, before it is
    rolled back."""
    auto: bool = True
    """Switch when the shadow run is passed; otherwise wait for a person's word."""
    keep: int = 2
    """Earlier released models kept to roll back to, besides the configuration's own file."""
    max_bytes: int = 2 << 30
    """Larger packages are refused before they are fetched."""

    def __post_init__(self) -> None:
        checks = (
            (bool(self.public_keys), "models.public_keys: at least one key file; nothing unsigned is ever taken"),
            (0 <= self.shadow_parts <= MAX_SHADOW_PARTS, f"models.shadow_parts must be 0..{MAX_SHADOW_PARTS}"),
            (0 <= self.max_disagreement <= 0.5, "models.max_disagreement must be 0..0.5"),
            (1 <= self.max_slowdown <= 100, "models.max_slowdown must be 1..100"),
            (0 <= self.trial_parts <= 10_000_000, "models.trial_parts must be 0..10000000"),
            (1 <= self.max_faults <= 100, "models.max_faults must be 1..100"),
            (1 <= self.keep < MAX_OUTCOMES, f"models.keep must be 1..{MAX_OUTCOMES - 1}"),
            (1 <= self.max_bytes <= 64 << 30, "models.max_bytes must be 1..68719476736"),
        )
        for is_good, expected in checks:
            if not is_good:
                raise ConfigError(expected)
