"""The one pass of every evaluation: attack, embed and count the queries, batch by batch.

`run_batches` is the loop: it deals batches out among ranks, takes finished ones from the store, and keeps new ones.
`AttackRunner` computes a batch of the evaluations that attack; certification computes its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import AttackEnsemble
from hsat.attacks.ensemble_pass import Candidate
from hsat.distributed import ShardedLoader
from hsat.embedding import (
    EmbeddingBuffer,
    LoaderInfo,
    attack_unscored,
    encode,
    eval_mode,
    ids_of,
    normalize_rows,
    select_layer,
    to_device,
    using_branch,
)
from hsat.eval.evaluation import Evaluation
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.outcomes import AttackStats, EnsembleOutcome, choose_examples
from hsat.eval.store import CleanEmbeddings, ResultStore, Session, StoredResult
from hsat.files import Arrays
from hsat.fingerprints import fingerprint_batch
from hsat.progress import show_progress
from hsat.types import Attack, AttackResult, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, MemberStats

CLEAN = "clean"
_BATCH_NAME = re.compile(r"batch-(\d+)-[0-9a-f]+\.arrays$")
_DIGEST = "batch"  # entry of a stored batch's header: the fingerprint of its images and ids


def run_batches(
    queries: Iterable[HierarchicalBatch],
    compute: Callable[[int, HierarchicalBatch], StoredResult],
    session: Session,
    *,
    key: Sequence[str] = (),
    description: str,
    visit: Callable[[HierarchicalBatch], None] | None = None,
    accept: Callable[[HierarchicalBatch, StoredResult], bool] | None = None,
) -> list[StoredResult]:
    """Go through the queries once; every rank gets the results of all batches, in order.

    Args:
        queries: A loader that gives every rank the same batches.
        compute: (number of the batch, batch) -> its result, for batches that are not in the store yet.
        session: World and store.
        key: Beginning of the keys of this pass in the store.
        description: For the progress bar.
        visit: Is shown every batch of this rank, stored or not.
        accept: (batch, stored result) -> whether it can be used; else the batch is computed anew.

    Raises:
        ValueError: If the ranks see different batches, or the loader gives other batches now than at its first reading
            or than the store knows.
    """
    numbers = finished_numbers(session.finished, key)
    shard = ShardedLoader(queries, session.world, finished=numbers)
    results: dict[int, StoredResult] = {}
    for number, batch in show_progress(shard, description) if session.shows else shard:
        name = (*key, _batch_key(number))
        result, digest = session.store.get(*name), fingerprint_batch(batch)
        session.seen.check(number, digest)
        if result is not None and result.header.get(_DIGEST) != digest:
            raise ValueError(
                f"batch {number} of the queries is not the one that {session.store.folder} knows;"
                " go on with the same patches, or give a new folder"
            )
        if result is None or (accept is not None and not accept(batch, result)):
            result = compute(number, batch)
            result = StoredResult({**result.header, _DIGEST: digest}, result.arrays)
            session.store.put(result, *name)
        results[number] = result
        if visit is not None:
            visit(batch)
    shard.check()
    session.seen.check_count(shard.batches)
    return session.world.gather_by_index(results)


def finished_numbers(finished: frozenset[str], key: Sequence[str]) -> list[int]:
    """Numbers of the finished batches of a pass, ascending."""
    numbers = {int(match[1]) for name in finished if (match := _BATCH_NAME.search(name))}
    return sorted(number for number in numbers if ResultStore.file_name(*key, _batch_key(number)) in finished)


def _batch_key(number: int) -> str:
    return f"batch-{number:06d}"


@dataclass(eq=False)
class Condition:
    """The queries as they are, or under one attack.

    Attributes:
        tables: Their embeddings, by the name of the encoder that read them.
        stats: What the attack did.
        examples: The images that are kept, in the order of the table.
        example_rows: Their rows in the table.
        outcome: For an ensemble, which member broke which image.
        inspected: What the runner's `inspect` said of each batch.
    """

    tables: dict[str, EmbeddingTable]
    stats: AttackStats
    examples: list[Tensor] = field(default_factory=list)
    example_rows: tuple[int, ...] = ()
    outcome: EnsembleOutcome | None = None
    inspected: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, table: EmbeddingTable) -> Condition:
        """The queries as they are, from their table."""
        return cls({"": table}, AttackStats())


class AttackRunner:
    """Attacks queries on one encoder and embeds them with one or several.

    Args:
        evaluation: The encoder that is attacked, which the caller does not freeze, and the options of the run.
        objectives: Makes what the attacks maximise.
        readers: Encoders by name that embed the images; the attacked one among them shares its clean embedding.  By
            default the attacked one alone, under the name "".
        include_clean: Embed the clean queries with every reader, as the condition "clean".
        inspect: Is shown (batch, attack's name, clean images, result) of every attack, on the device; what it
            returns is stored with the batch.
        accept: (batch, stored result) -> whether a stored batch can be used.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        objectives: ObjectiveFactory,
        readers: Mapping[str, EmbeddingFunction] | None = None,
        *,
        include_clean: bool = True,
        inspect: Callable[[HierarchicalBatch, str, Tensor, AttackResult], Mapping[str, Any]] | None = None,
        accept: Callable[[HierarchicalBatch, StoredResult], bool] | None = None,
    ) -> None:
        self._encoder, self._objectives, self._device = evaluation.encoder, objectives, evaluation.device
        self._seed, self._keep = evaluation.run.seed, evaluation.run.keep_examples
        readers = {"": self._encoder} if readers is None else readers
        self._scored = select_layer(self._encoder, evaluation.layer)
        self._readers = {name: select_layer(reader, evaluation.layer) for name, reader in readers.items()}
        self._own = [name for name, reader in readers.items() if reader is self._encoder]
        self._modules = (self._encoder, *readers.values())
        self._include_clean, self._inspect, self._accept = include_clean, inspect, accept
        self._seen: Counter[int] = Counter()  # queries so far, by label
        self.computed = 0  # batches that this process attacked, rather than took from the store

    def run(
        self,
        queries: Iterable[HierarchicalBatch],
        attacks: Mapping[str, Attack],
        session: Session,
        info: LoaderInfo,
        *,
        key: Sequence[str] = (),
        clean: CleanEmbeddings | None = None,
        visit: Callable[[HierarchicalBatch, np.ndarray], None] | None = None,
        frozen: Sequence[EmbeddingFunction] = (),
    ) -> dict[str, Condition]:
        """One pass over the queries; every rank gets all rows.

        Args:
            queries: A loader that gives every rank the same batches.
            attacks: By name; ensembles come after the others, whose images they take into account.
            session: World, store and cache.
            info: Class names, cohort and split of the queries.
            key: Beginning of the keys of this pass in the store.
            clean: The clean embeddings of an earlier evaluation, or on their way into the cache.
            visit: Is shown every batch of this rank, with its labels as the classifier numbers them.
            frozen: Further modules to freeze meanwhile, such as surrogates.
        """
        ordered = {name: attack for name, attack in attacks.items() if not isinstance(attack, AttackEnsemble)}
        ordered |= {name: attack for name, attack in attacks.items() if isinstance(attack, AttackEnsemble)}
        known = clean or CleanEmbeddings(None, None)

        def compute(number: int, batch: HierarchicalBatch) -> StoredResult:
            return self._attack_batch(number, batch, ordered, info, known)

        def visit_batch(batch: HierarchicalBatch) -> None:
            self._seen.update(_labels(batch))
            if visit is not None:
                visit(batch, self._objectives.labels_of(batch, info.class_names))

        with ExitStack() as stack:
            modules: list[EmbeddingFunction] = [*self._modules, *self._objectives.modules, *frozen]
            for module in modules:
                stack.enter_context(eval_mode(module))
            results = run_batches(
                queries,
                compute,
                session,
                key=key,
                description=" ".join(("attacking", *key)),
                visit=visit_batch,
                accept=self._is_complete,
            )
        known.close(len(results), session.world)
        names = [*([CLEAN] if self._include_clean else []), *attacks]
        return {name: self._merge(name, results, info) for name in names}

    def _is_complete(self, batch: HierarchicalBatch, stored: StoredResult) -> bool:
        """Whether a stored batch holds what this pass needs: all readers, and whatever the caller asks for."""
        places = {key.removeprefix("z ") for key in stored.arrays if key.startswith("z ")}
        complete = all(_place(name, reader) in places for name in stored.header["counts"] for reader in self._readers)
        return complete and (self._accept is None or self._accept(batch, stored))

    def _attack_batch(
        self,
        number: int,
        batch: HierarchicalBatch,
        attacks: Mapping[str, Attack],
        info: LoaderInfo,
        known: CleanEmbeddings,
    ) -> StoredResult:
        """Attack and embed one batch; the clean embedding serves every attack."""
        self.computed += 1
        aligned = self._objectives.labels_of(batch, info.class_names)
        images = to_device(batch.images, self._device)
        clean = known.get(number, batch, self._device)
        if clean is None:
            clean = encode(self._scored, images)
            known.put(number, batch, clean)
        if self.computed == 1:
            self._objectives.check_fits(clean)
        classes = len(info.class_names or ())
        kept = choose_examples(_labels(batch), self._keep, classes=classes, before=self._seen)
        record = _BatchRecord(batch, keep=kept)
        if self._include_clean:
            rows = {
                name: clean if name in self._own else encode(reader, images) for name, reader in self._readers.items()
            }
            record.add(CLEAN, images, rows, AttackStats())
        labels = torch.from_numpy(aligned).to(self._device)
        branch = self._objectives.branch
        with using_branch(self._encoder, branch):
            objective = self._objectives.objective(images, labels, clean, batch)
        candidates: dict[str, Candidate] = {}
        for name, attack in attacks.items():
            generator = torch.Generator().manual_seed(self._seed)
            if isinstance(attack, AttackEnsemble):  # it attacks the decision, and so the branch that is scored
                result = attack.run(
                    images,
                    self._objectives.decision(labels),
                    generator=generator,
                    ids=batch.patch,
                    candidates=candidates,
                    clean=clean,
                )
            else:
                with using_branch(self._encoder, branch):
                    result = attack_unscored(attack, images, objective, generator=generator, ids=batch.patch)
            rows = {
                name: encode(layer, result.x_adv)
                for name, layer in self._readers.items()
                if result.embedding is None or name not in self._own
            }
            if result.embedding is not None:
                rows |= dict.fromkeys(self._own, result.embedding)
            if not isinstance(attack, AttackEnsemble):
                candidates[name] = Candidate(
                    attack,
                    result.x_adv,
                    objective="" if branch else self._objectives.target,
                    follows_gradient=result.backwards > 0,
                    embedding=next((rows[own] for own in self._own), None),
                )
            if self._inspect is not None:
                record.inspected(name, self._inspect(batch, name, images, result))
            stats = AttackStats()
            stats.add(result, images)
            record.add(name, result.x_adv, rows, stats, result if result.members is not None else None)
        return record.result()

    def _merge(self, name: str, results: Sequence[StoredResult], info: LoaderInfo) -> Condition:
        """One condition of all batches, of this or another rank."""
        stats, examples = AttackStats(), list[Tensor]()
        labels = [int(label) for result in results for label in result.arrays["label"]]
        chosen, begin = choose_examples(labels, self._keep, classes=len(info.class_names or ())), 0
        buffers = {reader: EmbeddingBuffer() for reader in self._readers}
        for result in results:
            stats.merge(result.header["counts"][name])
            for reader, buffer in buffers.items():
                place = _place(name, reader)
                buffer.append_normalized(result.arrays, result.arrays[f"z {place}"], result.arrays[f"norm {place}"])
            places = begin + result.arrays["kept"]
            begin += len(result.arrays["label"])
            if (mine := np.isin(places, chosen)).any():
                kept = torch.from_numpy(result.arrays[f"kept {name}"][mine])
                examples.append(kept.to(getattr(torch, result.header["dtype"])))
        tables = {reader: buffer.table(info, encoder=reader) for reader, buffer in buffers.items()}
        inspected = [result.header["inspected"].get(name, {}) for result in results]
        return Condition(tables, stats, examples, chosen, _merge_outcomes(name, results), inspected)


class _BatchRecord:
    """One batch under one condition after another, as it is stored."""

    def __init__(self, batch: HierarchicalBatch, *, keep: Sequence[int]) -> None:
        self._batch, self._keep = batch, list(keep)
        dtype = str(batch.images.dtype).removeprefix("torch.")
        self._header: dict[str, Any] = {"dtype": dtype, "counts": {}, "members": {}, "inspected": {}}
        self._arrays: Arrays = {**ids_of(batch), "kept": np.array(self._keep, dtype=np.int64)}

    def add(
        self,
        name: str,
        images: Tensor,
        rows: Mapping[str, Tensor],
        stats: AttackStats,
        ensemble: AttackResult | None = None,
    ) -> None:
        """Take in the images of a condition, their embeddings by reader, what was counted, and an ensemble's result."""
        for reader, z in rows.items():
            place = _place(name, reader)
            self._arrays[f"z {place}"], self._arrays[f"norm {place}"] = normalize_rows(
                z, self._batch.patch, self._batch.images
            )
        kept = images.detach()[self._keep].cpu()
        self._arrays[f"kept {name}"] = (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy()
        self._header["counts"][name] = stats.counts()
        if ensemble is not None:
            assert ensemble.broken_by is not None and ensemble.members is not None  # what makes it an ensemble's
            self._arrays[f"broken_by {name}"] = np.array(ensemble.broken_by, dtype=str)
            self._arrays[f"margin {name}"] = ensemble.value.double().cpu().numpy()
            self._header["members"][name] = [dataclasses.asdict(member) for member in ensemble.members]

    def inspected(self, name: str, facts: Mapping[str, Any]) -> None:
        """Take in what the caller says of an attack's images."""
        self._header["inspected"][name] = dict(facts)

    def result(self) -> StoredResult:
        """The batch under all conditions."""
        return StoredResult(self._header, self._arrays)


def _labels(batch: HierarchicalBatch) -> list[int]:
    labels: list[int] = ids_of(batch)["label"].tolist()
    return labels


def _place(name: str, reader: str) -> str:
    return f"{name} {reader}".strip()


def _merge_outcomes(name: str, results: Sequence[StoredResult]) -> EnsembleOutcome | None:
    """What an ensemble did to all batches; None for other conditions."""
    if not results or name not in results[0].header["members"]:
        return None
    members: list[MemberStats] = []
    for result in results:
        batch = [MemberStats(**member) for member in result.header["members"][name]]
        members = [_sum(old, new) for old, new in zip(members, batch, strict=True)] if members else batch
    columns = {
        column: np.concatenate([result.arrays[key] for result in results])
        for column, key in (("patch", "patch"), ("broken_by", f"broken_by {name}"), ("margin", f"margin {name}"))
    }
    return EnsembleOutcome(**columns, members=tuple(members))


def _sum(old: MemberStats, new: MemberStats) -> MemberStats:
    """The counts of both; the rest is the first batch's."""
    names = ("seen", "newly_broken", "forwards", "backwards")
    return dataclasses.replace(old, **{name: getattr(old, name) + getattr(new, name) for name in names})
