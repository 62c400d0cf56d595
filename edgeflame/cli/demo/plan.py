"""How large the demo is and where it writes; two sizes, one shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeflame.errors import UsageError

CONDITIONS = {
    "none": "without training",
    "alone": "trained alone",
    "federated": "trained together",
}
"""What each site's model is compared under: the pre-trained backbone, FADE alone, FLAME with the others."""


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Sizes, counts and paths of one demo run."""

    out: Path
    texture: str
    seed: int
    num_sites: int
    rounds: int
    epochs: int
    train_parts: int
    good_parts: int
    defective_parts: int
    stream_parts: int
    photos: int = 2
    image_size: int = 256
    """Side of the photographs, pixels."""
    input_size: int
    """Side of what the model sees, pixels."""
    defect_rate: float = 0.3

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(f"site-{index + 1}" for index in range(self.num_sites))

    def data(self, site: str) -> Path:
        return self.out / "data" / site

    def package(self, site: str) -> Path:
        return self.out / "models" / f"{site}.edgeflame"

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def report(self) -> Path:
        return self.out / "report.html"


def make_plan(*, out: Path, texture: str, seed: int, num_sites: int, quick: bool) -> DemoPlan:
    """The full demo, or one of a third of the boards, seen more coarsely.

    Raises:
        UsageError: there is no such texture.
    """
    from edgeflame.boards import TEXTURES

    if texture not in TEXTURES:
        msg = f"no texture {texture!r}; there are {', '.join(TEXTURES)}"
        raise UsageError(msg)
    return DemoPlan(
        out=out,
        texture=texture,
        seed=seed,
        num_sites=num_sites,
        rounds=2,
        epochs=1 if quick else 2,
        train_parts=20 if quick else 48,
        good_parts=8 if quick else 16,
        defective_parts=10 if quick else 30,
        stream_parts=20 if quick else 50,
        input_size=192 if quick else 256,
    )
