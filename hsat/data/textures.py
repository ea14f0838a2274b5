"""Tissue-like pictures: blobs, fibres, grain, and the patches that are painted with them.

Pure numpy; every draw comes from a given generator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float64]

NUCLEUS_LIPID = 0.12  # brightness of nuclei in CH2; they hold little lipid
NUCLEUS_PROTEIN = 0.22  # how much brighter than the ground nuclei are in CH3
GRAIN = 0.016  # standard deviation of the fine texture: 4 grey levels of 256
NOISE = 0.006  # standard deviation of the detector noise


class Tissue(NamedTuple):
    """What sets one class apart.  Lengths are in 64ths of the patch's side, brightness in fractions of 65536.

    Coarse and of high contrast: lipid and protein, the brightness of the ground in CH2 and CH3; cells per patch,
    their radius and elongation; fibres that cover a fraction `coverage` of the patch, `width` wide, brighter than
    the ground by `fibre` in CH2 and half of it in CH3; lipid droplets per patch.  Fine and faint: a texture with one
    `period`.  An attack of 8 grey levels can wipe out the fine mark but hardly the coarse ones.
    """

    lipid: float
    protein: float
    cells: float
    radius: float
    elongation: float
    coverage: float
    width: float
    fibre: float
    droplets: float
    period: float


TISSUES: dict[str, Tissue] = {
    # columns:          lipid protein cells radius elong. cover. width fibre droplets period
    "hgg": Tissue(0.24, 0.30, 42.0, 3.4, 1.7, 0.08, 1.5, 0.10, 6.0, 3.6),
    "lgg": Tissue(0.28, 0.31, 14.0, 3.0, 1.3, 0.30, 1.2, 0.16, 0.0, 4.2),
    "mening": Tissue(0.22, 0.34, 26.0, 3.8, 3.0, 0.35, 3.5, -0.08, 0.0, 5.0),
    "metast": Tissue(0.25, 0.32, 14.0, 6.8, 1.2, 0.00, 3.0, 0.00, 14.0, 6.0),
    "normal": Tissue(0.30, 0.32, 4.0, 3.4, 1.1, 0.45, 2.4, 0.22, 2.0, 7.2),
    "pituitary": Tissue(0.22, 0.28, 60.0, 2.9, 1.1, 0.00, 2.0, 0.00, 0.0, 3.0),
    "schwannoma": Tissue(0.20, 0.28, 22.0, 3.2, 4.5, 0.50, 5.5, 0.12, 0.0, 8.6),
}


class Variation(NamedTuple):
    """How a patient, or one of its slides, differs from the mean of its class: factors, and offsets of brightness."""

    density: float
    radius: float
    coverage: float
    period: float
    gain: tuple[float, float]
    offset: tuple[float, float]
    tilt: tuple[float, float]
    angle: float


def draw_variation(rng: np.random.Generator, *, strength: float) -> Variation:
    """Draw a variation; strength scales all its deviations but the angle of the fibres, which is any.

    With strength 1 the standard deviations are 15 % for density and coverage, 8 % for radii, 3 % for the fine period,
    3 % for the gains of the two channels, 0.007 for their offsets and 6 % for the uneven light from edge to edge.
    """
    density, radius, coverage, period, gain2, gain3, offset2, offset3, tilt_down, tilt_right = (
        strength * rng.standard_normal(10) * (0.15, 0.08, 0.15, 0.03, 0.03, 0.03, 0.007, 0.007, 0.06, 0.06)
    )
    return Variation(
        density=float(np.exp(density)),
        radius=float(np.exp(radius)),
        coverage=float(np.exp(coverage)),
        period=float(np.exp(period)),
        gain=(float(np.exp(gain2)), float(np.exp(gain3))),
        offset=(float(offset2), float(offset3)),
        tilt=(float(tilt_down), float(tilt_right)),
        angle=float(rng.uniform(0.0, np.pi)),
    )


def paint_patch(
    tissue: Tissue, patient: Variation, slide: Variation, rng: np.random.Generator, *, size: int
) -> NDArray[np.uint16]:
    """One patch, (2, size, size) uint16: CH2, CH3.  The same field of view at every size."""
    unit = size / 64
    cells = blobs(
        rng,
        size,
        count=int(rng.poisson(tissue.cells * patient.density * slide.density)),
        radius=tissue.radius * patient.radius * slide.radius * unit,
        elongation=tissue.elongation,
        spread=0.15,
    )
    droplets = blobs(rng, size, count=int(rng.poisson(tissue.droplets)), radius=1.6 * unit, elongation=1.0, spread=0.2)
    streaks = tissue.fibre * fibres(
        rng,
        size,
        width=0.5 * tissue.width * unit,
        length=9.0 * unit,
        angle=slide.angle + 0.25 * float(rng.standard_normal()),
        coverage=tissue.coverage * patient.coverage * slide.coverage,
    )
    uneven = 0.02 * clouds(rng, size, width=10.0 * unit)
    fine = GRAIN * grain(rng, size, period=tissue.period * patient.period * slide.period * unit)
    lipid = (tissue.lipid + streaks + uneven) * (1.0 - cells) + NUCLEUS_LIPID * cells + 0.30 * droplets
    protein = tissue.protein + (0.5 * streaks + uneven) * (1.0 - cells) + NUCLEUS_PROTEIN * cells + 0.18 * droplets
    planes = [
        _light(plane, patient, slide, channel) + fine + NOISE * rng.standard_normal((size, size))
        for channel, plane in enumerate((lipid, protein))
    ]
    return np.clip(np.rint(np.stack(planes) * 65536.0), 0.0, 65535.0).astype(np.uint16)


def _light(plane: Plane, patient: Variation, slide: Variation, channel: int) -> Plane:
    """Stain, gain and uneven illumination of this patient's slide, in one channel."""
    side = np.linspace(-1.0, 1.0, len(plane))
    ramp = 1.0 + slide.tilt[0] * side[:, None] + slide.tilt[1] * side[None, :]
    gain = patient.gain[channel] * slide.gain[channel]
    return np.asarray(plane * gain * ramp + patient.offset[channel] + slide.offset[channel])


def blobs(rng: np.random.Generator, size: int, *, count: int, radius: float, elongation: float, spread: float) -> Plane:
    """Soft ellipses at random places and angles, (size, size) in [0, 1]; where they overlap the larger value stays.

    radius: geometric mean of the two half axes, in pixels; elongation: their ratio, 1 for discs; spread: standard
    deviation of the logarithm of the radius from one ellipse to the next.
    """
    if count == 0:
        return np.zeros((size, size))
    rows, columns = rng.uniform(-radius, size + radius, (2, count, 1, 1))
    angle = rng.uniform(0.0, np.pi, (count, 1, 1))
    radii = radius * np.exp(spread * rng.standard_normal((count, 1, 1)))
    ratio = np.sqrt(elongation * np.exp(0.15 * rng.standard_normal((count, 1, 1))))
    grid = np.arange(size) + 0.5
    down, right = grid[None, :, None] - rows, grid[None, None, :] - columns
    along = (np.cos(angle) * down + np.sin(angle) * right) / (radii * ratio)
    across = (np.cos(angle) * right - np.sin(angle) * down) / (radii / ratio)
    distance = radii * (np.sqrt(along**2 + across**2) - 1.0)  # about pixels outside of the rim
    return np.asarray((0.5 - 0.5 * np.tanh(1.5 * distance)).max(axis=0))


def fibres(rng: np.random.Generator, size: int, *, width: float, length: float, angle: float, coverage: float) -> Plane:
    """Streaks along one direction, (size, size) in [0, 1], that cover about the fraction `coverage` of the patch.

    Noise smoothed over `length` along the direction `angle` (radians) and over `width` across it, then cut softly.
    """
    if coverage <= 0.0:
        return np.zeros((size, size))
    down, right = _frequencies(size)
    along = np.cos(angle) * right + np.sin(angle) * down
    across = np.cos(angle) * down - np.sin(angle) * right
    noise = _filtered(rng, np.exp(-2.0 * np.pi**2 * ((along * length) ** 2 + (across * width) ** 2)))
    cut = np.quantile(noise, 1.0 - min(coverage, 1.0))
    return np.asarray(0.5 + 0.5 * np.tanh(3.0 * (noise - cut)))


def grain(rng: np.random.Generator, size: int, *, period: float) -> Plane:
    """Structureless fine texture of one period in pixels, any direction and phase: (size, size), mean 0, variance 1."""
    radius = np.hypot(*_frequencies(size)) * period
    return _filtered(rng, np.exp(-0.5 * ((radius - 1.0) / 0.12) ** 2))


def clouds(rng: np.random.Generator, size: int, *, width: float) -> Plane:
    """Smooth unevenness over distances of `width` pixels: (size, size), mean 0, variance 1."""
    return _filtered(rng, np.exp(-2.0 * np.pi**2 * np.hypot(*_frequencies(size)) ** 2 * width**2))


def _frequencies(size: int) -> tuple[Plane, Plane]:
    """Cycles per pixel down and to the right, as broadcastable arrays in the order of numpy's FFT."""
    cycles = np.asarray(np.fft.fftfreq(size), dtype=np.float64)
    return cycles[:, None], cycles[None, :]


def _filtered(rng: np.random.Generator, response: Plane) -> Plane:
    """White noise with this frequency response, mean 0 and variance 1; the mean's own frequency is left out."""
    spectrum = np.fft.fft2(rng.standard_normal(response.shape)) * response
    spectrum[0, 0] = 0.0
    noise = np.fft.ifft2(spectrum).real
    return np.asarray(noise / max(float(noise.std()), 1e-12))
