"""Train an encoder with HSAT, or with the baseline HiDisc (--attack.name none, or --recipe hidisc).

Defaults are the paper's for OpenSRH.  Without --data.root a small synthetic cohort is used, with a recipe that fits a
laptop.  The run folder receives run.json (options, versions, cohort), train.csv, last.pt (--resume goes on from it),
final.safetensors and best.safetensors, the latter chosen by robust kNN on held-out training patients.

    hsat train --recipe hsat --out runs/hsat
    hsat train --data.root /data/opensrh --out runs/hsat
    hsat train --data.root /data/patches --data.layout folders --data.image_size 96 --model.backbone resnet18
    torchrun --nproc_per_node=4 -m hsat train --data.root /data/opensrh --out runs/hsat    # docs/devices.md
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from hsat.cli.cohort import describe, open_cohort, open_store
from hsat.cli.encoders import new_encoder
from hsat.cli.failures import explain_failure
from hsat.cli.folders import settle_folder
from hsat.cli.options import (
    DataSettings,
    LoggerSettings,
    ModelSettings,
    Settings,
    find_option,
    say,
    split_commas,
)
from hsat.cli.ranks import Ranks, command_to_resume, first_rank_first, join_ranks, silence_other_ranks
from hsat.cli.threads import Threads, computing_threads
from hsat.data import Cohort
from hsat.data.augment import default_augmentation
from hsat.files import read_json_object
from hsat.recipes import SCALES, read_recipe
from hsat.run_folder import RUN_FILE, lock_folder
from hsat.training import assert_ranks_agree
from hsat.training.config import InnerAttackConfig, OuterConfig, TrainConfig, ViewConfig, written
from hsat.training.encoder_files import BEST, FINAL
from hsat.training.folder import NumberLogger, SettingsChangedError, TrainingFolder, flatten
from hsat.training.interrupts import TrainingInterrupted
from hsat.training.resources import is_out_of_memory
from hsat.training.trainer import Trainer

CHANGEABLE = ("train.lr", "train.precision")  # with --change: what may keep numbers finite
TYPED = (
    ("give augmentation", "give --data.augmentation"),
    ("give precision", "give --train.precision"),
    ("leave out clean", "leave out --train.clean"),
    ("give the attack levels", "give --attack.levels"),
)
"""What a configuration is told to change, as it is typed."""
MAY_DIFFER = {
    "resume",
    "recipe",
    "scale",
    "data.workers",
    "train.save_every",
    "train.max_memory",
    "device",
    "threads",
    "rank_timeout",
    "quiet",
    "change",
    "log.tensorboard",
    "log.wandb",
    "out",
    "data.root",
}
MAY_DIFFER_BY_RANK = {  # paths, behind which what is read is compared; and what changes no number
    "data.root",
    "data.packed",
    "model.weights",
    "out",
    "device",  # its kind is compared when the ranks meet
    "rank_timeout",
    "data.workers",
    "log.tensorboard",
    "log.wandb",
    "quiet",
}


class Train(Settings):
    """Train an encoder with HSAT, or with the baseline HiDisc (--attack.name none)."""

    recipe: str | None = Field(
        None, description="hsat, hidisc, hsat-plus, experiment-1 ... experiment-14, or demo; other options win over it"
    )
    scale: Literal[SCALES] | None = Field(  # type: ignore[valid-type]
        None, description="size of the recipe: paper where --data.root is given, else demo; cpu is between the two"
    )
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    attack: InnerAttackConfig = Field(default_factory=InnerAttackConfig)  # so that --help shows 8/255 as written
    train: OuterConfig = Field(default_factory=OuterConfig)
    log: LoggerSettings = LoggerSettings()
    preset: Literal["paper"] | None = Field(
        None,
        description="paper: draws and augments as the published code (docs/conventions.md); data options win over it",
    )
    seed: int = Field(0, ge=0, description="of weights, draws, augmentation and attacks")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    threads: Threads = Field("auto", description="threads of a CPU; auto: torch's own number")
    rank_timeout: float = Field(300, gt=0, description="seconds to wait for other ranks to start")
    out: Path = Field(written("runs/hsat-TIME"), description="run folder; TIME stands for the time of now")
    resume: bool = Field(False, description="go on where the run in --out stopped")
    change: Annotated[list[Literal["train.lr", "train.precision"]], BeforeValidator(split_commas)] = Field(
        [], description="with --resume: options that may have other values than the run began with"
    )
    quiet: bool = Field(False, description="no progress bars")

    def train_config(self) -> TrainConfig:
        """The options as the trainer takes them."""
        views = {name: getattr(self.data, name) for name in ViewConfig.model_fields}
        outer = {name: getattr(self.train, name) for name in self.train.model_fields_set}
        return TrainConfig(**outer, views=ViewConfig(**views), attack=self.attack, seed=self.seed, preset=self.preset)


def load_settings(argv: list[str]) -> Train:
    """The options of the command line; without a cohort of the user's the demo's recipe lies beneath them."""
    name, scale = find_option(argv, "recipe", str), find_option(argv, "scale", str)
    has_root = find_option(argv, "data.root", str) is not None
    if name is None and (has_root or find_option(argv, "config", Path) is not None):
        return Train.load(argv)
    if scale is None:
        scale = "paper" if has_root else "demo"
    try:
        recipe = read_recipe(name or "hsat", scale=scale)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if name is not None:
        say(f"recipe {name} at scale {scale}")
    if find_option(argv, "train.epochs", str) is not None:
        recipe.get("train", {}).pop("steps", None)
    if find_option(argv, "train.steps", str) is not None:
        recipe.get("train", {}).pop("epochs", None)
    return Train.load(argv, recipe=recipe)


def check_config(settings: Train) -> None:
    """End the program where the options do not fit together, with the options to change."""
    try:
        settings.train_config()
    except ValidationError as error:
        message = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        for name, option in TYPED:
            message = message.replace(name, option)
        raise SystemExit(f"error: {message}") from None


def same_on_all_ranks(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the options, with dotted names, that have to be the same on all ranks of a run."""
    return {key: value for key, value in flatten(settings).items() if key not in MAY_DIFFER_BY_RANK}


def hold_out(cohort: Cohort, settings: Train) -> Cohort:
    """Some training patients become the split "tune", by which the best encoder is chosen.

    Args:
        cohort: With a split "train".
        settings: The options.

    Returns:
        The cohort; unchanged where --data.tune_fraction is 0.

    Raises:
        ValueError: For a cohort of too few patients.
    """
    share, seed = settings.data.tune_fraction, settings.data.split_seed
    if share == 0:
        return cohort
    try:
        return cohort.with_split(val_fraction=share, seed=seed, names=("train", "tune"), of="train")
    except ValueError as error:
        raise ValueError(f"{error}; or hold out no training patient: --data.tune_fraction 0") from None


def make_trainer(settings: Train, ranks: Ranks | None = None) -> Trainer:
    """The trainer of these options, at the step where the run in --out stands; all ranks call this."""
    ranks = ranks or Ranks.alone(settings.device)
    assert_ranks_agree(settings=same_on_all_ranks(settings.plain()))
    with first_rank_first(ranks):  # which may write the synthetic cohort, and pack
        cohort = hold_out(open_cohort(settings.data, seed=settings.seed), settings)
        store = open_store(cohort, settings.data, out=settings.out)
    assert_ranks_agree(cohort=cohort, store=store, seed=settings.seed)
    settings = choose_augmentation(settings, cohort.kind)
    if ranks.is_main:
        say(describe(cohort))
        if cohort.kind != "srh":  # for which the published pipelines were made
            say(describe_augmentation(settings, cohort.kind))
    resume = settings.resume or ranks.again
    if resume or not (settings.out / RUN_FILE).exists():  # else the run is refused, and stays refused
        ranks.begin()
    plain = settings.plain()

    def open_folder(*, cohort: str, writes: bool) -> TrainingFolder:
        return TrainingFolder(
            settings.out,
            plain,
            cohort=cohort,
            command=sys.argv,
            defaults=choose_augmentation(Train(), "srh").plain() | {"compat": None},
            may_differ=MAY_DIFFER,
            change=settings.change,
            resume=resume,
            writes=writes,
            loggers=open_loggers(settings) if writes else (),
        )

    return Trainer(
        new_encoder(settings.model, seed=settings.seed),
        cohort,
        settings.train_config(),
        out=open_folder,
        device=ranks.device,
        store=store,
        progress=not settings.quiet,
    )


def choose_augmentation(settings: Train, kind: str) -> Train:
    """The options with the augmentation that fits patches of this kind, where none was given."""
    if settings.data.augmentation is not None:
        return settings
    data = settings.data.model_copy(update={"augmentation": default_augmentation(kind)})
    return settings.model_copy(update={"data": data})


def describe_augmentation(settings: Train, kind: str) -> str:
    """Which augmentation is used, and whether it was made for other patches."""
    name = settings.data.augmentation
    if name in ("static", "v0", "v1"):
        return (
            f"augmentation {name} was made for stimulated Raman images: on {kind} patches it draws colours that no"
            " tissue has; --data.augmentation he is made for haematoxylin and eosin"
        )
    return f"augmentation {name}"


def open_loggers(settings: Train) -> list[NumberLogger]:
    """What takes the numbers of each step besides train.csv."""
    loggers: list[NumberLogger] = []
    hint = 'needs an extra: pip install "hsat[train]"'
    if settings.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SystemExit(f"error: --log.tensorboard {hint}") from None
        writer = SummaryWriter(str(settings.out))

        def log_scalars(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        loggers.append(log_scalars)
    if settings.log.wandb:
        try:
            import wandb
        except ImportError:
            raise SystemExit(f"error: --log.wandb {hint}") from None
        session = wandb.init(project=settings.log.wandb, dir=str(settings.out), config=settings.plain())
        loggers.append(lambda numbers, step: session.log(numbers, step=step))
    return loggers


def train(settings: Train, ranks: Ranks | None = None) -> Path:
    """Run or resume the training; returns the path of the best encoder (the final one where none was held out)."""
    return make_trainer(settings, ranks).fit()


def main(argv: list[str]) -> None:
    """Read the options, train, say where the encoder is; what the user can mend ends the program with the reason."""
    settings = load_settings(argv)
    check_config(settings)
    try:
        patience = timedelta(seconds=settings.rank_timeout)
        with (
            join_ranks(settings.device, patience=patience) as ranks,
            silence_other_ranks(ranks),
            computing_threads(settings.threads),
        ):
            settings = settle_folder(settings, ranks, resume=settings.resume, is_unfinished=is_unfinished)
            with lock_folder(settings.out) if ranks.is_main else nullcontext():
                trainer = make_trainer(settings, ranks)
                path = trainer.fit()
            if ranks.is_main:
                print(f"encoder: {path}")
                say(describe_end(trainer))
    except TrainingInterrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # the group has ended
            say(f"{stop}; to go on: {command_to_resume('train', argv, settled_out(settings, argv))}")
        raise SystemExit(128 + stop.signal) from None
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}. {advise_finite(settings, argv)}") from None
    except SettingsChangedError as error:
        changeable = set(error.names) <= set(CHANGEABLE)
        raise SystemExit(
            f"error: {error}" + (f"; or add --change {','.join(error.names)}" if changeable else "")
        ) from None
    except Exception as error:
        workers = settings.data.workers
        message = advise_memory(error, settings) if is_out_of_memory(error) else explain_failure(error, workers=workers)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from None


def is_unfinished(out: Path) -> bool:
    """Whether a folder holds a training that has not come to its end."""
    return (out / RUN_FILE).exists() and not (out / FINAL).exists()


def settled_out(settings: Train, argv: Sequence[str]) -> dict[str, str]:
    """The folder of the run as an option, where the command line named none."""
    return {} if find_option(list(argv), "out", str) else {"--out": str(settings.out)}


def describe_end(trainer: Trainer) -> str:
    """The last words: steps, score, and the command that comes next."""
    out = trainer.folder.out
    text = f"{trainer.done} of {trainer.total} steps"
    if (out / BEST).exists():
        best = read_json_object(out / "best.json")
        text += f"; the best encoder is that of step {best['step']}, with a held-out score of {best['score']:.3f}"
    else:
        text += "; no patient was held out, so that the final encoder is the result"
    return f"{text}\nnext: {shlex.join(['hsat', 'evaluate', '--run', str(out)])}"


def advise_memory(error: BaseException, settings: Train) -> str:
    """What to lower when memory is used up, with the values at hand."""
    train, data = settings.train, settings.data
    images = train.batch_patients * data.slides * data.patches * data.views
    return (
        f"out of memory ({str(error).strip().splitlines()[0]}). A step holds {images} images of"
        f" {data.image_size} x {data.image_size}. Raise --train.accumulate (now {train.accumulate}; the same negatives"
        f" in less memory) or lower --train.batch_patients (now {train.batch_patients}), --data.slides ({data.slides}),"
        f" --data.patches ({data.patches}), --data.views ({data.views}) or --data.image_size ({data.image_size});"
        f" --train.precision bf16 halves the activations (now {train.precision})"
    )


def advise_finite(settings: Train, argv: Sequence[str]) -> str:
    """After a number that was not finite: what to change, and the command that goes on so.

    The same options would compute the same numbers and end in the same place.
    """
    if settings.train.precision == "16":
        reason, changed = "bf16 has the range of float32, which float16 lacks", {"train.precision": "bf16"}
    else:
        reason, changed = "a lower learning rate may avoid it", {"train.lr": f"{settings.train.lr / 10:g}"}
    names = [*settings.change, *(name for name in changed if name not in settings.change)]
    values = settled_out(settings, argv) | {f"--{name}": value for name, value in changed.items()}
    values |= {"--change": ",".join(names)}
    command = command_to_resume("train", argv, values)
    return f"The same options would come to the same step again; {reason}. To go on:\n  {command}"
