"""Faint synthetic defects on good photographs, for choosing settings without looking at a test set."""

from __future__ import annotations

import cv2
import numpy as np

from edgeflame.images import ImageU8
from edgeflame.tensors import F32

KINDS = ("line", "blob", "cut-paste", "shade", "edge", "texture")

MIN_CONTRAST = 6.0
"""Grey levels: what counts as one unit of contrast on a picture that is nearly uniform."""


def add_defect(image: ImageU8, kind: str, rng: np.random.Generator) -> ImageU8:
    """A copy of ``image [H, W, 3]`` with one defect; its strength goes with the picture's own contrast."""
    plain = image.astype(np.float32)
    contrast = max(MIN_CONTRAST, float(plain.std()))
    if kind == "line":
        spoiled = plain - rng.uniform(0.5, 1.6) * contrast * _line(plain, rng)
    elif kind == "blob":
        sign = rng.choice([-1, 1], p=[0.7, 0.3])
        spoiled = plain + sign * rng.uniform(0.5, 1.6) * contrast * _ellipse(plain, rng, (3, 10), blur=1.0)
    elif kind == "cut-paste":
        spoiled = _cut_paste(plain, rng)
    elif kind == "shade":
        sign = rng.choice([-1, 1])
        blur = rng.uniform(6, 20)
        spoiled = plain + sign * rng.uniform(0.4, 1.2) * contrast * _ellipse(plain, rng, (30, 90), blur=blur)
    elif kind == "edge":
        mask = 0.8 * _notch(plain, rng)
        target = plain.mean() + rng.choice([-1, 1]) * rng.uniform(1, 2.5) * contrast
        spoiled = plain * (1 - mask) + mask * target
    else:
        spoiled = plain + rng.uniform(0.6, 1.6) * contrast * _texture(plain, rng)
    return np.clip(spoiled, 0, 255).astype(np.uint8)


def _line(image: F32, rng: np.random.Generator) -> F32:
    height, width = image.shape[:2]
    steps = int(rng.integers(4, 9))
    length = rng.uniform(20, 90) / steps
    angle = rng.uniform(0, 2 * np.pi)
    points = [rng.uniform([0, 0], [width, height])]
    for _ in range(steps):
        angle += rng.normal(0, 0.35)
        points.append(points[-1] + length * np.array([np.cos(angle), np.sin(angle)]))
    mask = np.zeros((height, width), np.float32)
    cv2.polylines(mask, [np.array(points, np.int32)], False, 1.0, int(rng.integers(1, 3)), cv2.LINE_AA)
    return _blurred(mask, 0.6)


def _ellipse(image: F32, rng: np.random.Generator, radii: tuple[int, int], *, blur: float) -> F32:
    height, width = image.shape[:2]
    centre = (int(rng.integers(10, width - 10)), int(rng.integers(10, height - 10)))
    axes = tuple(int(one) for one in rng.integers(*radii, 2))
    mask = np.zeros((height, width), np.float32)
    cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
    return _blurred(mask, blur)


def _cut_paste(image: F32, rng: np.random.Generator) -> F32:
    height, width = image.shape[:2]
    tall, wide = (int(one) for one in rng.integers(14, 50, 2))
    (y, v), (x, u) = rng.integers(0, height - tall, 2), rng.integers(0, width - wide, 2)
    mask = np.zeros((height, width), np.float32)
    mask[y : y + tall, x : x + wide] = 1.0
    pasted = image.copy()
    pasted[y : y + tall, x : x + wide] = image[v : v + tall, u : u + wide]
    soft = _blurred(mask, 1.5)
    mixed: F32 = image * (1 - soft) + pasted * soft
    return mixed


def _notch(image: F32, rng: np.random.Generator) -> F32:
    side = int(rng.integers(4))
    size = image.shape[0] if side in (2, 3) else image.shape[1]
    centre = rng.integers(20, size - 20)
    points = [
        (centre + at * rng.uniform(12, 30), -2.0 if abs(at) == 1 else (1 - abs(at)) * rng.uniform(8, 26))
        for at in np.linspace(-1, 1, 9)
    ]
    outline = np.array(points)
    mask = np.zeros(image.shape[:2] if side < 2 else image.shape[1::-1], np.float32)
    cv2.fillPoly(mask, [outline.astype(np.int32)], 1.0, cv2.LINE_AA)
    if side in (1, 3):
        mask = mask[::-1]
    return _blurred(np.ascontiguousarray(mask if side < 2 else mask.T), 1.0)


def _texture(image: F32, rng: np.random.Generator) -> F32:
    height, width = image.shape[:2]
    fine = _noise(rng, height, width, int(rng.integers(4, 12)))
    coarse = _noise(rng, height, width, int(rng.integers(40, 80)))
    where = _blurred((coarse > np.quantile(coarse, 0.93)).astype(np.float32), 3.0)
    return (fine[..., None] - 0.5) * 2 * where


def _noise(rng: np.random.Generator, height: int, width: int, scale: int) -> F32:
    small = rng.standard_normal((max(2, height // scale), max(2, width // scale))).astype(np.float32)
    noise = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    scaled: F32 = (noise - noise.min()) / max(float(noise.max() - noise.min()), 1e-6)
    return scaled


def _blurred(mask: F32, sigma: float) -> F32:
    """``[H, W, 1]``, to be multiplied with a picture."""
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), sigma), dtype=np.float32)[..., None]
