"""The commands that are run on both sides, once, in the names of the first edition (commit 91c38be).

`editions.py` and `renames.yaml` say how a checkout of another edition spells them.  Every option that moves a number is
stated: a changed default is then no difference, and a changed result is.  Sizes are the smallest that reach all code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SRH, COLOUR = "srh", "colour"  # folders that the command "cohort" writes
Options = dict[str, str]


@dataclass(frozen=True)
class Command:
    """One command line.

    program: a key of `programs` in renames.yaml.  encoders: (name, command that trained it); their files are those of
    OLD for both sides, so that a changed training does not change every evaluation.  cohort: the folder that is read,
    OLD's as well.  ranks: processes that torchrun starts; 0 is a plain process.
    """

    name: str
    program: str
    options: Options = field(default_factory=dict)
    encoders: tuple[tuple[str, str], ...] = ()
    cohort: str = ""
    ranks: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the commands whose results it reads."""
        return tuple(dict.fromkeys([*(["cohort"] if self.cohort else []), *(trained for _, trained in self.encoders)]))


SHARED: Options = {"seed": "0", "device": "cpu", "quiet": "true", "data.image_size": "32", "data.workers": "0"}

TRAINING: Options = SHARED | {
    "data.slides": "2",
    "data.patches": "2",
    "data.views": "2",
    "data.augmentation": "v0",
    "data.strength": "1.0",
    "data.dynamic": "true",
    "data.tune_fraction": "0",
    "data.augment": "images",
    "model.backbone": "test_resnet",
    "model.head": "linear",
    "model.embedding_dim": "16",
    "attack.name": "pgd",
    "attack.eps": "8/255",
    "attack.step_size": "2/255",
    "attack.steps": "2",
    "attack.levels": "p_s_pt",
    "attack.warmup_epochs": "2",
    "train.steps": "20",
    "train.batch_patients": "4",
    "train.accumulate": "1",
    "train.lr": "1e-3",
    "train.weight_decay": "1e-2",
    "train.warmup": "0.1",
    "train.loss": "p_s_pt",
    "train.temperature": "0.07",
    "train.clean": "false",
    "train.plateau": "2",
    "train.precision": "32",
    "train.save_every": "20",
}

HELD_OUT: Options = {
    "data.tune_fraction": "0.34",
    "train.eval_every": "10",
    "train.eval_patches": "16",
    "train.eval_eps": "4/255",
    "train.k": "5",
}

BANK_AND_QUERIES: Options = SHARED | {"batch_size": "8", "bootstrap": "20", "k": "5", "temperature": "0.07"}
EVALUATION: Options = BANK_AND_QUERIES | {"steps": "3"}
WHITEBOX: Options = EVALUATION | {
    "attacks": "pgd,bim,mifgsm",
    "threat": "linf",
    "eps": "2/255,8/255",
    "step_size": "2/255",
    "target": "features",
    "noise": "true",
    "diagnose": "0",
    "gallery": "3",
}
TRANSFER: Options = EVALUATION | {"attacks": "pgd,mifgsm", "eps": "2/255", "step_size": "1/255", "hold": "all"}

HSAT, HIDISC, DUAL = ("hsat", "train-hsat"), ("hidisc", "train-hidisc"), ("dual", "train-dual-norm")


def _training(name: str, *, ranks: int = 0, **changed: str) -> Command:
    options = TRAINING | {key.replace("__", "."): value for key, value in changed.items()}
    return Command(f"train-{name}", "train", options, cohort=SRH, ranks=ranks)


def _whitebox(
    name: str, encoders: Sequence[tuple[str, str]], *, cohort: str = SRH, ranks: int = 0, **changed: str
) -> Command:
    return Command(f"whitebox-{name}", "whitebox", WHITEBOX | changed, tuple(encoders), cohort=cohort, ranks=ranks)


def _paper_whitebox() -> Command:
    """Without --target: under the paper's conventions it is the embedding, for a dual encoder through branch pgd."""
    options = {key: value for key, value in WHITEBOX.items() if key != "target"} | {"compat": "paper"}
    return Command("whitebox-paper", "whitebox", options, (HSAT, DUAL), cohort=SRH)


TRAININGS = (
    _training("hidisc", attack__name="none", model__backbone="test_byobnet", model__head="mlp"),
    Command("train-hsat", "train", TRAINING | HELD_OUT, cohort=SRH),
    _training("clean", train__clean="true"),
    _training("dual-norm", train__clean="true", model__dual_norm="true"),
    _training("free", attack__name="free", attack__replays="2"),
    _training("warm", attack__name="warm", data__augmentation="none"),
    _training("fgsm", attack__name="fgsm_rs", attack__check_every="7", attack__check_share="0.5"),
    _training("levels", attack__levels="s_pt", train__loss="p_s", train__accumulate="2"),
    _training("paper", compat="paper"),
    _training("ranks", ranks=2),
)

EVALUATIONS = (
    _whitebox("features", (HSAT, HIDISC), k="5,20", diagnose="4", untrained="true"),
    _whitebox("embedding", (HSAT, DUAL), target="embedding", attacks="pgd,fgsm,ffgsm"),
    _whitebox("knn", (HSAT, HIDISC), target="knn", k="5,20"),
    _paper_whitebox(),
    _whitebox("strongest", (HSAT, HIDISC), attacks="pgd,strongest", eps="1/255,2/255", step_size="1/255", steps="2"),
    _whitebox("l2", (HSAT,), threat="l2", eps="0.1,0.5", step_size="0.1", attacks="pgd"),
    _whitebox("raw", (HSAT,), threat="raw_srh", eps="2/255", attacks="pgd", target="knn"),
    _whitebox("stain", (HSAT,), threat="stain", eps="0.05", step_size="0.02", attacks="pgd", cohort=COLOUR),
    _whitebox("ranks", (HSAT, HIDISC), ranks=2, attacks="pgd,strongest", eps="1/255", steps="2", diagnose="4"),
    Command("transfer", "transfer", TRANSFER | {"target": "features"}, (HSAT, HIDISC, DUAL), cohort=SRH),
    Command("transfer-paper", "transfer", TRANSFER | {"compat": "paper"}, (HSAT, HIDISC), cohort=SRH),
    Command(
        "budget-patient",
        "budget",
        EVALUATION | {"level": "patient", "eps": "2/255", "step_size": "1/255", "target": "knn", "order": "worst"},
        (HSAT, HIDISC),
        cohort=SRH,
    ),
    Command(
        "budget-slide",
        "budget",
        EVALUATION | {"level": "slide", "eps": "2/255", "step_size": "1/255", "target": "features", "order": "random"},
        (HIDISC,),
        cohort=SRH,
    ),
    Command(
        "certify",
        "certify",
        BANK_AND_QUERIES
        | {"sigma": "0.1", "samples": "50", "selection": "10", "alpha": "0.05", "challenge": "4", "how": "mean"},
        (HSAT, HIDISC),
        cohort=SRH,
    ),
    Command(
        "universal",
        "universal",
        BANK_AND_QUERIES | {"threat": "linf", "eps": "8/255", "step_size": "2/255", "epochs": "2", "fit_on": "hidisc"},
        (HSAT, HIDISC),
        cohort=SRH,
    ),
    Command(
        "export-srh",
        "export",
        EVALUATION | {"threat": "raw_srh", "eps": "8/255", "step_size": "2/255", "target": "features"},
        (HSAT,),
        cohort=SRH,
    ),
    Command(
        "export-colour",
        "export",
        EVALUATION | {"threat": "linf", "eps": "8/255", "step_size": "2/255", "target": "knn"},
        (HSAT,),
        cohort=COLOUR,
    ),
)

COMMANDS: tuple[Command, ...] = (
    Command("cohort", "cohort"),
    Command("small-runs", "small-runs"),
    *TRAININGS,
    *EVALUATIONS,
)
LAYOUT = {SRH: {"data.layout": "opensrh"}, COLOUR: {"data.layout": "folders", "data.val_fraction": "0.3"}}


def selected(names: Iterable[str], commands: Sequence[Command] = COMMANDS) -> tuple[Command, ...]:
    """The commands of these names, or whose names begin so; all without names.  ValueError for an unknown one."""
    chosen: list[str] = []
    for name in names:
        fitting = [c.name for c in commands if c.name == name] or [c.name for c in commands if c.name.startswith(name)]
        if not fitting:
            raise ValueError(f"--only {name}: no such command; there are {', '.join(c.name for c in commands)}")
        chosen += fitting
    return tuple(command for command in commands if not chosen or command.name in chosen)
