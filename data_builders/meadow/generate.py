"""Synthetic alpine meadow seen from the air: numpy and OpenCV, no files, no TFDS.

A tile follows the order of nature: terrain and moisture decide how much of the ground plants cover, the cover
decides the class, plants grow as tussocks at that density, the sun lights terrain and tussocks, a camera
looks at it. Colour drifts from tile to tile (soil, season, white balance), so colour alone confuses adjacent
classes; the density and grain of the tussocks settle it.
"""

import functools
import zlib

import cv2
import numpy as np

from ktda_jax.data.datasets import IGNORE

# Fraction of the ground that plants hide, per class (its centre), and how much it wanders within a class.
COVER = (0.02, 0.24, 0.48, 0.72, 0.96)
NUM_CLASSES = len(COVER)
WITHIN = 0.2  # of the distance to the neighbouring class; 1 would be a ramp without visible borders


def generate_tile(seed: int, index: int, size: int = 128, *, split: str = "train"):
    """Tile `index` of `split`, the same for the same arguments wherever and whenever asked for.

    Returns (image uint8 (size, size, 3) RGB, label uint8 (size, size) with 0..4 and a few 255).
    """
    if size < 32 or size % 2:
        raise ValueError(f"size={size}: a meadow tile needs an even number of pixels a side, at least 32")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])

    height = _terrain(rng, size)
    moisture = spectral_noise(rng, size, slope=1.9)
    track = _track(rng, size)
    level = np.where(track > 0.5, 0.3, _cover_level(rng, height, moisture))
    label = np.minimum(level.astype(np.int64), NUM_CLASSES - 1).astype(np.uint8)

    cover = _cover_fraction(level, label)
    plants, plant_height = _grow(rng, cover)
    albedo = _albedo(rng, plants, cover, moisture)
    shrubs, shrub_height = _shrubs(rng, size)
    albedo = albedo * (1 - shrubs[..., None]) + shrubs[..., None] * _shrub_colour(rng, shrub_height)
    light = _light(rng, height, plant_height, shrub_height)
    image = _camera(rng, albedo * light[..., None])

    label[shrubs > 0.5] = IGNORE  # woody plants are outside the five classes: nobody labelled them
    return image, label


def spectral_noise(rng, size: int, slope: float) -> np.ndarray:
    """Gaussian noise with amplitude ~ 1/f**slope and unit variance: float32 (size, size).

    Cut from a canvas twice as large, so that a tile does not repeat at its borders and may lean as a whole.
    """
    return _filtered(rng, _power_law(2 * size, slope))[:size, :size]


def band_noise(rng, size: int, wavelength: float) -> np.ndarray:
    """Gaussian noise of unit variance around one wavelength in pixels: the grain of a texture."""
    return _filtered(rng, _band(size, wavelength))


@functools.lru_cache(maxsize=32)
def _power_law(n, slope):
    return _normalised(np.maximum(_frequency(n), 0.5 / n) ** -slope)


@functools.lru_cache(maxsize=32)
def _band(n, wavelength):
    return _normalised(np.exp(-0.5 * (np.log(np.maximum(_frequency(n), 1e-6) * wavelength) / 0.35) ** 2))


def _frequency(n):
    """Radial frequency in cycles per pixel of an rfft2 of n x n."""
    return np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])


def _normalised(gain):
    """Scaled so that filtered white noise has variance 1 in expectation.

    Not each sample on its own: tiles keep their natural differences in contrast.
    """
    gain[0, 0] = 0
    twice = np.full(gain.shape[1], 2.0)  # rfft2 keeps one of each pair of conjugate columns ...
    twice[[0, -1]] = 1.0  # ... except the first and, n being even, the last
    return gain / np.sqrt((gain**2 * twice).sum() / len(gain) ** 2)


def _filtered(rng, gain):
    n = len(gain)
    white = rng.standard_normal((n, n), np.float32)
    return np.fft.irfft2(np.fft.rfft2(white) * gain, s=(n, n)).astype(np.float32)


def _quantile(x):
    """Standard normal -> uniform in 0..1 (logistic approximation of the error function, within 0.0002)."""
    return 1 / (1 + np.exp(-1.5976 * x - 0.070566 * x**3))


def _blur(x, sigma):
    return cv2.GaussianBlur(x, (0, 0), sigma)


def _terrain(rng, size):
    """Hills with gullies, unit variance or so: smooth noise minus the creases of |noise|."""
    hills = spectral_noise(rng, size, slope=2.4)
    creases = np.abs(spectral_noise(rng, size, slope=1.9))
    return 0.8 * hills + 0.75 * (np.sqrt(creases**2 + 0.01) - 0.8)


def _track(rng, size):
    """Trodden path in a quarter of the tiles: 0 outside to 1 in the middle, a level line of smooth noise."""
    if rng.random() > 0.25:
        return np.zeros((size, size), np.float32)
    course = _blur(spectral_noise(rng, size, slope=2.6), 3)
    gy, gx = np.gradient(course)
    distance = np.abs(course - np.median(course)) / (np.hypot(gx, gy) + 0.004)  # pixels, to first order
    return np.clip(1.5 + 0.5 * (rng.uniform(1.5, 3.5) - distance), 0, 1).astype(np.float32)


def _cover_level(rng, height, moisture):
    """Continuous class coordinate 0..5, uniform over many tiles, so that the classes have like shares."""
    lean = rng.standard_normal()  # this tile's pasture as a whole
    z = (0.9 * lean - 0.7 * height + 1.1 * moisture) / np.sqrt(0.9**2 + 0.7**2 + 1.1**2)
    return NUM_CLASSES * _quantile(_blur(z, 1.2))


def _cover_fraction(level, label):
    """Fraction of the ground under plants, 0..1: steps at the class borders, a slope in between."""
    centres = np.asarray(COVER, np.float32)
    ramp = np.interp(level - 0.5, np.arange(NUM_CLASSES), centres)
    cover = (1 - WITHIN) * centres[label] + WITHIN * ramp
    return _blur(cover.astype(np.float32), 1.5)  # borders in nature are a few leaves wide


def _grow(rng, cover):
    """Plants on the ground: (presence 0..1, height), tussocks coarse where sparse and fine where dense."""
    size = len(cover)
    tussock, tuft, blade = (band_noise(rng, size, w) for w in (9.0, 5.0, 2.8))
    fine = cover**1.5
    grain = (1 - fine) * tussock + (0.55 + 0.35 * fine) * tuft + (0.25 + 0.3 * fine) * blade
    grain /= np.sqrt((1 - fine) ** 2 + (0.55 + 0.35 * fine) ** 2 + (0.25 + 0.3 * fine) ** 2)
    threshold = cover + 0.05 * spectral_noise(rng, size, slope=1.2)
    presence = 1 / (1 + np.exp((_quantile(-grain) - threshold) / 0.05))
    height = presence * (0.5 + 0.5 * cover) * (1 + 0.35 * grain)
    return presence.astype(np.float32), height.astype(np.float32)


def _albedo(rng, plants, cover, moisture):
    """Ground and plant colours, linear RGB float32 (S, S, 3)."""
    size = len(cover)
    soil = np.array([0.36, 0.262, 0.175]) * rng.uniform(0.75, 1.25) + rng.normal(0, 0.015, 3)
    dry = np.array([0.29, 0.265, 0.095]) * rng.uniform(0.85, 1.15)
    lush = np.array([0.075, 0.135, 0.035]) * rng.uniform(0.85, 1.3)

    ground = 1 + 0.13 * spectral_noise(rng, size, 1.3) + 0.08 * band_noise(rng, size, 2.6)
    pebbles = np.clip(band_noise(rng, size, 3.4) - 1.9, 0, 1) * (1 - cover)
    wetness = np.clip(0.5 + 0.22 * moisture + 0.25 * (cover - 0.5) + rng.normal(0, 0.15), 0, 1)
    wetness = np.clip(wetness + 0.10 * band_noise(rng, size, 7.0), 0, 1)[..., None]
    leaf = (1 - wetness) * dry + wetness * lush
    leaf = leaf * (1 + 0.10 * band_noise(rng, size, 2.5))[..., None]
    earth = soil * (ground * (1 - 0.12 * np.tanh(moisture)))[..., None] + pebbles[..., None] * 0.35
    mixed = earth + plants[..., None] * (leaf - earth)

    flowers = (band_noise(rng, size, 2.4) > 2.75) & (rng.random() < 0.35)  # a flowering pasture now and then
    bloom = np.array([0.78, 0.70, 0.20]) if rng.random() < 0.6 else np.array([0.80, 0.78, 0.74])
    weight = 0.8 * flowers * plants * (cover > 0.35)
    return (mixed + weight[..., None] * (bloom - mixed)).astype(np.float32)


def _shrubs(rng, size):
    """A clump of round shrubs in every sixth tile: (coverage 0..1, height above the meadow)."""
    coverage, height = np.zeros((2, size, size), np.float32)
    if rng.random() > 1 / 6:
        return coverage, height
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    centre = rng.uniform(0.1, 0.9, 2) * size
    for _ in range(rng.integers(3, 9)):
        y, x = centre + rng.normal(0, 0.07 * size, 2)
        radius = rng.uniform(0.025, 0.055) * size
        wobble = 1 + 0.15 * band_noise(rng, size, 6.0)
        dome = np.clip(1 - ((yy - y) ** 2 + (xx - x) ** 2) / (radius * wobble) ** 2, 0, 1)
        height = np.maximum(height, radius * np.sqrt(dome))
    coverage = _blur((height > 0).astype(np.float32), 0.7)
    return coverage, height


def _shrub_colour(rng, height):
    texture = 1 + 0.25 * band_noise(rng, len(height), 3.0)
    return np.array([0.030, 0.055, 0.022]) * texture[..., None]


def _light(rng, terrain, plants, shrubs):
    """Sunlight on relief: Lambert shading of terrain and tussocks, and the shadows that shrubs cast."""
    azimuth = rng.uniform(0, 2 * np.pi)
    beam = np.array([np.sin(azimuth), np.cos(azimuth)])  # where light travels: slopes rising that way glow

    def slope(surface):
        gy, gx = np.gradient(surface)
        return gy * beam[0] + gx * beam[1]

    relief = 9 * slope(_blur(terrain, 1.0)) + 0.9 * slope(_blur(plants, 0.6)) + 0.2 * slope(shrubs)
    light = 1 + 0.7 * np.tanh(relief)
    shadow = np.zeros_like(shrubs)
    for step in range(1, 9):  # what stands `step` px towards the sun and high enough hides it
        shift = np.float32([[1, 0, step * beam[1]], [0, 1, step * beam[0]]])
        moved = cv2.warpAffine(shrubs, shift, shrubs.shape[::-1])
        shadow = np.maximum(shadow, moved - shrubs > 0.8 * step)
    return (light * (1 - 0.5 * _blur(shadow.astype(np.float32), 0.8))).astype(np.float32)


def _camera(rng, radiance):
    """Linear light to uint8: lens blur, exposure, white balance, display gamma, sensor noise."""
    image = _blur(radiance.astype(np.float32), 0.55)
    image = image * rng.uniform(0.9, 1.4) * rng.normal(1, 0.035, 3)
    image = np.clip(image, 0, 1) ** (1 / 2.2)
    image = image + rng.normal(0, 0.014, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
