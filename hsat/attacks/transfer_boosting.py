"""Attacks that carry over to models they have not seen: MI-FGSM with gradients that say less about one model."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from hsat.attacks.calling import Ascent, check_counts, check_number, check_steps
from hsat.attacks.gradient_views import diverse, look_ahead, smoothed, variance_tuned
from hsat.attacks.running import Climb, Look, Run
from hsat.types import ThreatModel


def _momentum_climb(attack: NIFGSM | DIFGSM | TIFGSM | VMIFGSM) -> Climb:
    return Climb(
        threat=attack.threat,
        step_size=attack.step_size,
        steps=attack.steps,
        random_start=attack.random_start,
        restarts=attack.restarts,
        decay=attack.decay,
        look=attack._look,
    )


def _check(attack: NIFGSM | DIFGSM | TIFGSM | VMIFGSM) -> None:
    check_steps(attack.threat, attack.step_size, attack.steps, attack.restarts)
    check_number("decay", attack.decay)


@dataclass(frozen=True, repr=False)
class NIFGSM(Ascent):
    """MI-FGSM with gradients at the Nesterov point x + decay * step_size * m.

    Lin et al., arXiv:1908.06281, section 3.2, eq. 6 to 8.  scales > 1 adds scale invariance: the gradient is the mean
    over the copies x / 2^i, i = 0 ... scales - 1 (SI-NI-FGSM, algorithm 1; the paper takes 5), at `scales` passes per
    step.  m is MI-FGSM's sum of gradients of mean size 1, which the paper's step follows by its sign only.
    Deviations: the point ahead is clamped to the pixel range (not to the ball; the published code does neither); under
    threat models other than Linf it is x + decay * step_size * ascent(m), since m has no length to speak of there.
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    scales: int = 1
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_counts(scales=self.scales)

    def _climb(self) -> Climb:
        return _momentum_climb(self)

    def _look(self, run: Run, restart: int) -> Look:
        return look_ahead(run, scales=self.scales)


@dataclass(frozen=True, repr=False)
class DIFGSM(Ascent):
    """MI-FGSM with input diversity: gradients through randomly resized and padded images (M-DI2-FGSM).

    Xie et al., arXiv:1803.06978, section 3.3, eq. 5 to 7.  At each step, with this probability, an image is resized
    (bilinear) to int(resize h), ..., h - 1 rows, and as large a share of its columns, and put at a random place on a
    black image of the old size.  Every image has its own draws.  decay=0 is the paper's DI2-FGSM without momentum.
    The defaults are those of common implementations; the paper resizes 299 pixels to 299 ... 329 on a canvas of 330,
    which only models without a fixed input size can take, and it uses probability 0.5.
    probability in [0, 1], resize in (0, 1]; resize=1 leaves the images as they are.
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    probability: float = 0.5
    resize: float = 0.9
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_number("probability", self.probability, high=1.0)
        _check_resize(self.resize)

    def _climb(self) -> Climb:
        return _momentum_climb(self)

    def _look(self, run: Run, restart: int) -> Look:
        return diverse(run, probability=self.probability, resize=self.resize, restart=restart)


@dataclass(frozen=True, repr=False)
class TIFGSM(Ascent):
    """MI-FGSM with gradients that are blurred by a Gaussian kernel: translation invariance.

    Dong et al., arXiv:1904.02884, section 3.2, eq. 7 and 8 (TI-MI-FGSM, with the paper's 15 x 15 kernel).
    size: odd number of pixels of the kernel's side; on small images take a smaller one.  sigma: how many standard
    deviations the kernel reaches to each side.  probability > 0 adds the input diversity of DIFGSM, with `resize`
    (TI-DIM in the paper).
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    size: int = 15
    sigma: float = 3.0
    probability: float = 0.0
    resize: float = 0.9
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_counts(size=self.size)
        if self.size % 2 == 0:
            raise ValueError(f"size must be odd, so that the kernel has a middle; got {self.size}")
        check_number("sigma", self.sigma)
        check_number("probability", self.probability, high=1.0)
        _check_resize(self.resize)

    def _climb(self) -> Climb:
        return _momentum_climb(self)

    def _look(self, run: Run, restart: int) -> Look:
        plain = diverse(run, probability=self.probability, resize=self.resize, restart=restart)
        return smoothed(plain if self.probability > 0 else run.look, size=self.size, sigma=self.sigma)


@dataclass(frozen=True, repr=False)
class VMIFGSM(Ascent):
    """MI-FGSM with variance tuning: each gradient is corrected by how those around the last iterate differed from it.

    Wang and He, arXiv:2103.15571, algorithm 1: m <- decay * m + (g + v) / mean|g + v| (the paper divides by the sum),
    then v <- mean over `samples` points around x of their gradients, minus g.  The points are the threat model's random
    starts around x with `beta` times its radius, inside the pixel range (for Linf uniform in [-beta eps, beta eps]).
    The paper takes 20 samples and beta 1.5.  Each step but the last costs `samples` more passes.
    samples >= 1, beta >= 0.
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    samples: int = 20
    beta: float = 1.5
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_counts(samples=self.samples)
        check_number("beta", self.beta)

    def _climb(self) -> Climb:
        return _momentum_climb(self)

    def _look(self, run: Run, restart: int) -> Look:
        return variance_tuned(run, samples=self.samples, reach=self.beta, restart=restart)


def _check_resize(resize: float) -> None:
    if not 0 < resize <= 1:
        raise ValueError(
            f"resize must lie in (0, 1], a share of the image's side; got {resize!r}."
            " Images are shrunk and padded back to their size"
        )
