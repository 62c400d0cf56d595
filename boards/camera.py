"""A site's camera, lamp and conveyor belt, and how they turn a board into a photograph.

Order, as in a real camera: the board is laid down not quite straight, the lens looks at it slightly from the side,
one lamp and diffuse light fall on its relief, the lens darkens towards the corners and blurs, and the sensor
amplifies, encodes, and adds noise. Around the board shows the belt: dark rubber with a fabric impression, scuffs
and dust.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from boards.board import MASK_EPSILON, Board
from boards.surface import (
    REFERENCE_SIZE,
    FieldF32,
    Surface,
    as_f32,
    check_range,
    fractal_noise,
    generator,
    smoothstep,
    value_noise,
)
from boards.textures import DISPLAY_GAMMA
from edgeflame.images import ImageU8

_LENGTHS = 3
"""The stretch of belt kept, in pictures; each photograph shows another part of it."""


def render_belt(size: int, rng: np.random.Generator) -> FieldF32:
    """What lies beneath a board at a random moment: linear reflectance ``[S, S, 3]``, BGR."""
    stretch = _belt_stretch(size)
    start = int(rng.integers(0, stretch.shape[0] - size + 1))
    return stretch[start : start + size]


@lru_cache(maxsize=4)
def _belt_stretch(size: int) -> FieldF32:
    """The belt runs down the picture, so its wear does too."""
    # Every site has the same make of belt; what tells sites apart is their camera.
    rng = generator(0, "belt")
    unit, shape = size / REFERENCE_SIZE, (size * _LENGTHS, size)
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    x = np.arange(shape[1], dtype=np.float32)[None, :]
    turn = np.float32(2 * np.pi / (5.0 * unit))
    twill = np.sin(turn * (x + y)) * np.sin(turn * (x - y))
    grain = value_noise(shape, (1.4 * unit, 1.4 * unit), rng)
    wear = fractal_noise(shape, (240 * unit, 30 * unit), rng)
    scuffs = smoothstep(1.7, 2.6, value_noise(shape, (70 * unit, 2.0 * unit), rng))
    dust = smoothstep(2.6, 3.4, value_noise(shape, (2.2 * unit, 2.2 * unit), rng))
    tone = 1.0 + 0.10 * twill + 0.07 * grain + 0.09 * wear + 0.20 * scuffs + 0.9 * dust
    stretch = as_f32(np.array([0.042, 0.043, 0.036], dtype=np.float32) * np.clip(tone, 0.2, 3.0)[..., None])
    stretch.flags.writeable = False
    return stretch


SHIFT_SHARE = 0.010
"""Greatest misplacement of a board on the belt, over the picture's side, in each direction."""

ROTATION_DEG = 0.8
"""Greatest rotation of a board on the belt: a fence along the conveyor squares it up."""

LAMP_ELEVATION_DEG = 42.0
"""Height of the lamp above the belt; low enough for dents to cast a shade."""

# Ranges each field may take: what a camera that is set up at all can show.
_RANGES = {
    "gain": (0.2, 3.0),
    "gamma": (1.0, 3.5),
    "blur_sigma_px": (0.0, 5.0),
    "vignetting": (0.0, 0.9),
    "noise_std": (0.0, 40.0),
    "colour_temperature_k": (2500.0, 10000.0),
    "light_azimuth_deg": (0.0, 360.0),
    "light_strength": (0.0, 1.0),
    "tilt_x": (-0.1, 0.1),
    "tilt_y": (-0.1, 0.1),
}


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Camera and lamp of one site; they stay as they are while boards pass.

    Attributes:
        gain: brightness over that of a well exposed picture.
        gamma: of the encoding; 2.2 shows colours as they are, more lifts the shadows.
        blur_sigma_px: of the lens, for a picture 256 pixels wide; wider pictures blur in proportion.
        vignetting: share of light missing in the corners.
        noise_std: standard deviation of the noise at full brightness, in grey levels of 255.
        colour_temperature_k: of the light, in kelvin; 5500 is neutral, less is yellow, more is blue.
        light_azimuth_deg: where the lamp stands, clockwise from the right of the picture.
        light_strength: share of the light that comes from the lamp and not from all around.
        tilt_x: how much larger the right edge is seen than the left, over the mean.
        tilt_y: how much larger the lower edge is seen than the upper, over the mean.

    Raises:
        ValueError: a field is out of its range.
    """

    gain: float = 1.0
    gamma: float = 2.2
    blur_sigma_px: float = 0.55
    vignetting: float = 0.08
    noise_std: float = 2.0
    colour_temperature_k: float = 5500.0
    light_azimuth_deg: float = 225.0
    light_strength: float = 0.5
    tilt_x: float = 0.0
    tilt_y: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(f"Camera.{field.name}", getattr(self, field.name), *_RANGES[field.name])

    @classmethod
    def for_site(cls, site: int | str, seed: int = 0) -> Camera:
        """The camera of a site: always the same one for the same site and seed."""
        rng = generator(seed, "camera", site)

        def near(mean: float, spread: float) -> float:
            # Rounded so that dataset.json shows exactly the number that was used.
            return round(float(np.clip(rng.normal(mean, spread), mean - 2 * spread, mean + 2 * spread)), 4)

        return cls(
            gain=near(1.0, 0.06),
            gamma=near(2.2, 0.10),
            blur_sigma_px=near(0.60, 0.10),
            vignetting=near(0.10, 0.035),
            noise_std=near(2.2, 0.5),
            colour_temperature_k=near(5500.0, 420.0),
            light_azimuth_deg=round(float(rng.uniform(0.0, 360.0)), 4),
            light_strength=near(0.50, 0.06),
            tilt_x=near(0.0, 0.009),
            tilt_y=near(0.0, 0.009),
        )

    def photograph(self, board: Board, rng: np.random.Generator) -> tuple[ImageU8, ImageU8]:
        """Lay the board on the belt and take one picture.

        Args:
            board: the part.
            rng: placement, lamp, belt and noise of this picture. The same stream gives the same picture
                outside the mask whether or not the board has its defect.

        Returns:
            The picture ``[S, S, 3]`` uint8 BGR, and the defect's mask ``[S, S]`` uint8, 255 on the defect
            and 0 elsewhere.
        """
        size = board.image_size
        to_frame = self._placement(size, rng)
        light = self._light(rng)
        exposure = self._exposure(size, rng)
        belt = render_belt(size, rng)
        frame = self._develop(board.intact, to_frame, light, belt) * exposure
        mask = np.zeros((size, size), dtype=np.uint8)
        if board.defect is not None:
            damaged = self._develop(board.defect.damaged, to_frame, light, belt) * exposure
            amount = self._blur(_warp(board.defect.amount, to_frame, cv2.BORDER_CONSTANT))
            changed = amount > MASK_EPSILON
            # Below the epsilon the defect is dropped, so the mask misses nothing that was changed.
            frame = np.where(changed[..., None], damaged, frame)
            mask[changed] = 255
        return self._expose(as_f32(frame), rng), mask

    def rephotograph(self, photograph: ImageU8, rng: np.random.Generator) -> ImageU8:
        """What this camera would make of the scene of a photograph: gain, vignetting, blur, gamma and noise.

        Lamp and placement stay those of the photograph; they cannot be changed without the part.

        Args:
            photograph: ``[H, W, 3]`` uint8 BGR, taken to be encoded with the usual gamma of 2.2.
            rng: the noise.
        """
        light = as_f32(cv2.pow(as_f32(photograph) / np.float32(255), DISPLAY_GAMMA))
        height, width = photograph.shape[:2]
        x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
        y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
        exposure = np.float32(self.gain) * (1.0 - np.float32(self.vignetting / 2) * (x * x + y * y))
        return self._expose(self._blur(as_f32(light * exposure[..., None])), rng)

    def _placement(self, size: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Homography ``[3, 3]`` from the board's canvas to the picture, in pixels."""
        shift_x, shift_y = size * rng.uniform(-SHIFT_SHARE, SHIFT_SHARE, size=2)
        angle = np.deg2rad(rng.uniform(-ROTATION_DEG, ROTATION_DEG))
        middle = (size - 1) / 2
        cos, sin = np.cos(angle), np.sin(angle)
        centre = np.array([[1, 0, -middle], [0, 1, -middle], [0, 0, 1]])
        lay = np.array([[cos, -sin, shift_x], [sin, cos, shift_y], [0, 0, 1]])
        # Scale falls off along the tilt: to first order 1 - tilt at one side and 1 + tilt at the other.
        look = np.array([[1, 0, 0], [0, 1, 0], [-self.tilt_x / middle, -self.tilt_y / middle, 1]])
        back = np.array([[1, 0, middle], [0, 1, middle], [0, 0, 1]])
        return np.asarray(back @ look @ lay @ centre, dtype=np.float64)

    def _light(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Unit vector to the lamp: right, down, and up from the belt. Lamps shake a little."""
        azimuth = np.deg2rad(self.light_azimuth_deg + rng.normal(0.0, 1.5))
        elevation = np.deg2rad(LAMP_ELEVATION_DEG + rng.normal(0.0, 0.8))
        flat = np.cos(elevation)
        return float(flat * np.cos(azimuth)), float(flat * np.sin(azimuth)), float(np.sin(elevation))

    def _exposure(self, size: int, rng: np.random.Generator) -> FieldF32:
        """What the light and the lens do to a white sheet: ``[S, S, 3]``, linear."""
        flicker = 1.0 + rng.normal(0.0, 0.012)
        line = np.linspace(-1.0, 1.0, size, dtype=np.float32)
        x, y = line[None, :], line[:, None]
        vignette = 1.0 - np.float32(self.vignetting / 2) * (x * x + y * y)
        # The lamp's side is nearer to it.
        azimuth = np.deg2rad(self.light_azimuth_deg)
        nearer = 1.0 + np.float32(0.09 * self.light_strength) * (
            np.float32(np.cos(azimuth)) * x + np.float32(np.sin(azimuth)) * y
        )
        # Around daylight the ratio of blue to red rises about as the temperature.
        warmth = (self.colour_temperature_k / 5500.0) ** 0.5
        balance = np.array([warmth, 1.0, 1.0 / warmth], dtype=np.float32)
        return as_f32((self.gain * flicker) * (vignette * nearer)[..., None] * balance)

    def _develop(
        self, surface: Surface, to_frame: npt.NDArray[np.float64], light: tuple[float, float, float], belt: FieldF32
    ) -> FieldF32:
        """Light falling on the sensor ``[S, S, 3]``, linear, before exposure."""
        unit = surface.unit
        board = _warp(np.dstack([surface.albedo, surface.height]), to_frame, cv2.BORDER_REPLICATE)
        coverage = np.clip(_warp(surface.coverage, to_frame, cv2.BORDER_CONSTANT), 0.0, 1.0)
        shading = self._shading(as_f32(board[..., 3]), light)
        # The board stands a little above the belt and keeps the lamp's light, and some of the rest, off it.
        reach = 2.4 * unit
        away = np.array([[1, 0, -reach * light[0]], [0, 1, -reach * light[1]]])
        thrown = cv2.warpAffine(coverage, away, coverage.shape[::-1])
        shadow = as_f32(cv2.GaussianBlur(thrown, (0, 0), 1.5 * unit))
        lit_belt = belt * (1.0 - np.float32(0.35 + 0.45 * self.light_strength) * shadow)[..., None]
        lit_board = board[..., :3] * shading[..., None]
        return self._blur(as_f32(lit_belt + (lit_board - lit_belt) * coverage[..., None]))

    def _shading(self, height: FieldF32, light: tuple[float, float, float]) -> FieldF32:
        """Brightness ``[S, S]`` of the relief over that of a flat board: diffuse light, lamp and a soft sheen."""
        slope_x = as_f32(cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8))
        slope_y = as_f32(cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8))
        steep = 1.0 / np.sqrt(1.0 + slope_x * slope_x + slope_y * slope_y)
        towards = (np.float32(light[2]) - np.float32(light[0]) * slope_x - np.float32(light[1]) * slope_y) * steep
        lamp = np.maximum(towards, 0.0) / np.float32(light[2])
        # Diffuse light reaches a slope less than a flat.
        around = 0.5 + 0.5 * steep
        share = np.float32(self.light_strength)
        return as_f32(around * (1.0 - share) + lamp * share)

    def _blur(self, frame: FieldF32) -> FieldF32:
        sigma = self.blur_sigma_px * frame.shape[0] / 256
        # Below this the kernel is one pixel wide.
        return frame if sigma < 0.2 else as_f32(cv2.GaussianBlur(frame, (0, 0), sigma))

    def _expose(self, light: FieldF32, rng: np.random.Generator) -> ImageU8:
        """Encode and add noise: grey levels 0-255."""
        level = as_f32(cv2.pow(np.clip(light, 0.0, 1.0), 1.0 / self.gamma)) * np.float32(255)
        # Photon noise, as it looks after encoding, hardly depends on brightness.
        noise = rng.standard_normal(level.shape, dtype=np.float32) * np.float32(self.noise_std)
        return np.asarray(np.clip(np.rint(level + noise), 0, 255), dtype=np.uint8)


def _warp(planes: FieldF32, to_frame: npt.NDArray[np.float64], border: int) -> FieldF32:
    size = (planes.shape[1], planes.shape[0])
    return as_f32(cv2.warpPerspective(planes, to_frame, size, flags=cv2.INTER_LINEAR, borderMode=border))
