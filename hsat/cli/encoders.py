"""From model settings to an encoder: a new one to train, or one from a file to evaluate."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from hsat.cli.options import EncoderSettings, ModelSettings, StoredModelSettings, say
from hsat.eval import WhiteboxResult
from hsat.models import (
    Encoder,
    HeadSpec,
    active_branch,
    build_encoder,
    checkpoint_hash,
    has_encoder_spec,
    is_dual,
    load_checkpoint,
    load_encoder,
    set_branch,
    trained_branch,
    unused_branches,
    wrap_encoder,
)
from hsat.models.checkpoints import load_backbone, read_weights
from hsat.models.state_dicts import find_head

_NOT_OF_FACTORIES = {"dual_norm", "image_size", "pretrained"}  # a backbone may come from a recipe, and is replaced


class NamedEncoder(NamedTuple):
    """An encoder to evaluate; digest: the SHA-256 of its file."""

    title: str
    encoder: Encoder
    digest: str


def new_encoder(model: ModelSettings, *, seed: int) -> Encoder:
    """The encoder to train, its random weights drawn from the seed."""
    if model.factory is not None:
        encoder = own_encoder(model, seed=seed, head=_head_of(model, model.embedding_dim))
        if model.weights is not None:
            load_backbone(encoder, model.weights)
        return encoder
    return build_encoder(
        model.backbone,
        embedding_dim=model.embedding_dim,
        head=_head_of(model),
        weights=model.weights,
        pretrained=model.pretrained,
        input_size=model.input_size,
        image_size=model.image_size,
        norm=model.norm,
        dual_norm=model.dual_norm,
        seed=seed,
    )


def own_encoder(model: EncoderSettings, *, seed: int, head: HeadSpec | None) -> Encoder:
    """The encoder around what the user's own function makes, its random weights drawn from the seed.

    Raises:
        ValueError: Where there is no such function, it gives no module, or for options that concern other networks.
    """
    if unused := sorted(_NOT_OF_FACTORIES & model.model_fields_set):
        listed = ", ".join(f"--model.{name}" for name in unused)
        raise ValueError(
            f"--model.factory makes the network by itself, so that {listed} would change nothing; leave out"
        )
    name, colon, function = str(model.factory).partition(":")
    if not colon:
        raise ValueError(f"--model.factory {model.factory}: write package.module:function")
    sys.path.insert(0, "")  # as python itself has it: a module in the working directory is found
    try:
        make = attrgetter(function)(importlib.import_module(name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--model.factory {model.factory}: {error}") from error
    finally:
        sys.path.remove("")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        if not isinstance(module, torch.nn.Module):
            raise ValueError(f"--model.factory {model.factory} gave {type(module).__name__}, not a torch.nn.Module")
        try:
            return wrap_encoder(
                module,
                norm=model.norm,
                head=head,
                input_size=model.input_size,
                features=model.features,
            )
        except ValueError as error:
            raise ValueError(_as_typed(str(error))) from error


def _head_of(model: EncoderSettings, embedding_dim: int | None = None) -> HeadSpec | None:
    return None if model.head == "none" else HeadSpec(model.head, embedding_dim, tuple(model.head_hidden))


def stored_encoder(model: StoredModelSettings, path: Path, *, alone: bool = True) -> Encoder:
    """The encoder in a file, its BatchNorm branch chosen.

    What was not said and had to be inferred is printed to standard error.

    Args:
        model: --model.backbone and the options beside it, for files that do not say how to build their encoder; a file
            of hsat train does.
        path: The file.
        alone: False where several files are opened: those that say how to build their encoder keep to it.

    Returns:
        The encoder.

    Raises:
        ValueError: For a file that does not fit, naming what is wrong.
        OSError: For a file that cannot be read.
    """
    if model.factory is not None:
        head = find_head(read_weights(path).state)
        encoder = own_encoder(model, seed=0, head=None if head is None else head.spec)
        load_checkpoint(encoder, path)
        say(f"{path}: {encoder.pixels}")
        return encoder.eval()
    own = "backbone" not in model.model_fields_set or (not alone and has_encoder_spec(path))
    said_head, hidden = "head" in model.model_fields_set, tuple(model.head_hidden)
    try:
        encoder = load_encoder(
            path,
            None if own else model.backbone,
            head=_head_of(model) if said_head else HeadSpec("mlp", hidden=hidden) if hidden else "auto",
            embedding_dim=model.embedding_dim,
            dual_norm=model.dual_norm,
            input_size=model.input_size,
            image_size=model.image_size,
            norm=model.norm if alone or not own else None,
        )
    except ValueError as error:
        raise ValueError(_as_typed(str(error))) from error
    if not own:
        _say_what_was_read(path, encoder, inferred=not said_head or model.embedding_dim is None)
    say(f"{path}: {encoder.pixels}")
    choose_branch(encoder, model.branch, path)
    return encoder


def open_encoders(checkpoints: Sequence[str], model: StoredModelSettings, *, paper: bool = False) -> list[NamedEncoder]:
    """The encoders of --checkpoint.

    Args:
        checkpoints: `file` or `name=file` each.
        model: What the files do not say.
        paper: As the published evaluation, which attacks branch "pgd" of a dual encoder and scores "normal".

    Returns:
        The encoders, with names and digests of their files.

    Raises:
        ValueError: For what cannot be read, and for equal names.
    """
    encoders: list[NamedEncoder] = []
    for text in checkpoints:
        title, path = name_file(text)
        try:
            encoder = stored_encoder(model, path, alone=len(checkpoints) < 2)
        except OSError as error:
            raise ValueError(f"--checkpoint {text}: {error}") from error
        if paper and model.branch is None and is_dual(encoder):
            set_branch(encoder, "normal")
            say(f"{path}: --preset paper scores branch normal; the attacks go through pgd")
        encoders.append(NamedEncoder(title, encoder, checkpoint_hash(path)))
        check_titles(one.title for one in encoders)
    return encoders


def name_file(text: str) -> tuple[str, Path]:
    """The name of an encoder and its file, from `file` or `name=file`."""
    title, file = ("", text) if Path(text).exists() or "=" not in text else text.split("=", 1)
    path = Path(file)
    return title or (path.parent.name if path.stem in ("best", "final", "last") else path.stem), path


def untrained_encoder(encoder: Encoder, *, seed: int) -> Encoder:
    """An encoder of the same kind with random weights, at the size of the patches.

    Raises:
        ValueError: If it is unknown how the encoder was built.
    """
    spec = encoder.spec
    if spec is None:
        raise ValueError("--untrained needs an encoder whose file says how it was built, or --model.backbone")
    head = None if spec["head"] is None else HeadSpec(spec["head"], hidden=tuple(spec["head_hidden"]))
    return build_encoder(
        spec["name"],
        embedding_dim=spec["embedding_dim"],
        head=head,
        mean=spec["mean"],
        std=spec["std"],
        norm="image" if spec.get("per_image") else None,
        dual_norm=spec["dual_norm"],
        image_size=spec.get("image_size"),
        seed=seed,
    ).eval()


def check_titles(titles: Iterable[str]) -> None:
    """Check that encoders have names of their own.

    Raises:
        ValueError: For two encoders of one name.
    """
    known: set[str] = set()
    for title in titles:
        if title in known:
            raise ValueError(f"two encoders are called {title!r}; name them: --checkpoint a=FILE,b=FILE")
        known.add(title)


def choose_branch(encoder: Encoder, wanted: str | None, path: Path) -> None:
    """Set the BatchNorm branch of a dual encoder.

    Args:
        encoder: Any encoder.
        wanted: The branch that was asked for; None is the one that was trained with attacks.
        path: The encoder's file, for messages.

    Raises:
        ValueError: For a branch of an encoder that has none.
    """
    if not is_dual(encoder):
        if wanted is not None:
            raise ValueError(
                f"{path} holds no dual BatchNorm, so --model.branch {wanted} chooses nothing; leave it out"
            )
        return
    chosen = wanted or trained_branch(encoder)
    set_branch(encoder, chosen)
    if wanted is None:
        say(f"{path}: dual BatchNorm, using branch {chosen}; --model.branch chooses")
    if chosen in unused_branches(encoder):
        say(f"note: branch {chosen} of {path} was never trained")


def naming_branch(result: WhiteboxResult, encoder: Encoder) -> WhiteboxResult:
    """The result with the BatchNorm branch in the settings of its records; unchanged where there is one only."""
    if (name := active_branch(encoder)) is None:
        return result
    records = [replace(record, settings={**record.settings, "branch": name}) for record in result.records]
    return replace(result, records=tuple(records))


def _as_typed(message: str) -> str:
    """An error of load_encoder with the options of the command line beside its arguments."""
    options = (
        ("head=None", "--model.head none"),
        ("name its backbone", "--model.backbone NAME"),
        ("norm='none'", "--model.norm none"),
    )
    for argument, option in options:
        message = message.replace(argument, f"{argument} ({option})")
    return message


def _say_what_was_read(path: Path, encoder: Encoder, *, inferred: bool) -> None:
    spec, report = encoder.spec or {}, encoder.weights_report
    if report is None:
        return
    head = spec["head"]
    hidden = f", hidden {spec['head_hidden']}" if spec["head_hidden"] else ""
    words = (
        f"head {head}, embedding_dim {encoder.embedding_dim}{hidden}" if head else "no head: embeddings are features"
    )
    source = "inferred from the file" if inferred else "as asked for"
    say(f"{path}: {report.loaded} tensors ({report.layout}); {words} ({source})")
    if report.dropped:
        say(f"{path}: left out {len(report.dropped)} entries, from {report.dropped[0]} on")
