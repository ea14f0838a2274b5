"""Classification by the nearest embeddings of a bank: exact in plain torch, or by an approximate index of FAISS."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers.base import Queries, check_bank, chunks, clip_k, query_rows, unit_rows
from hsat.classifiers.faiss_index import EXACT, build_index, load_faiss, split_factory
from hsat.classifiers.knn_vote import NeighbourVote, VoteRows
from hsat.classifiers.search import BLOCK_BYTES, BankRows, Neighbours, rerank_exact, rounding_bound, row_slack
from hsat.files import atomic_folder, digest_file
from hsat.fingerprints import fingerprint_table
from hsat.types import EmbeddingTable

_MARGIN = 8  # rows beyond k that are proposed, so that float32 rounding at the k-th place is mended afterwards
_QUALITY_QUERIES = 256
SETTINGS_FILE, INDEX_FILE = "knn.json", "index.faiss"


@dataclass(frozen=True, kw_only=True)
class KNNClassifier:
    """Settings of a weighted nearest-neighbour classifier; `fit` gives the classifier and leaves this object as it is.

    Class score = sum of softmax(cosine / temperature) over the k nearest bank rows of that class; a row of scores sums
    to one.  These are the published weights after their L1 normalisation.

    Attributes:
        k: Number of neighbours, cut to the size of the bank with a UserWarning that names both.
        temperature: Of the weights; at least 1e-30.
        index: "flat" (exact, on the bank's own rows, without a copy), "stream" (exact, the bank read in blocks and sent
            to `device`, once per 64 MiB of queries; for banks on disk; "torch" is its older name), or a FAISS factory
            string such as "IVF64,Flat", "HNSW32" or "SQfp16" (approximate; see `FittedKNN.recall` and `agreement`);
            "IVF64,Flat;nprobe=8" holds search parameters too.
        index_parameters: Search parameters such as "nprobe=8" in FAISS's own notation.
        device: Where "stream" computes its products; None: on the CPU.
        chunk: Queries that one search of "flat" or of a factory string answers.
        seed: Draws the rows that train an approximate index, and the rows that stand in for classes without neighbours.
    """

    k: int = 200
    temperature: float = 0.07
    index: str = "flat"
    index_parameters: str = ""
    device: str | None = None
    chunk: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not self.temperature >= 1e-30:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; the paper uses 0.07 (least: 1e-30)")
        if not isinstance(self.index, str) or not self.index.strip():
            raise ValueError(f"index must be 'flat', 'stream' or a FAISS factory string, got {self.index!r}")
        name, parameters = split_factory(self.index)
        if self.index_parameters and parameters:
            raise ValueError(f"index {self.index!r} has parameters and so has index_parameters; give them once")
        if name in EXACT and (self.index_parameters or parameters):
            raise ValueError(
                f"index {name!r} is exact and takes no parameters, got {self.index_parameters or parameters!r}"
            )

    @property
    def exact(self) -> bool:
        """Whether the index finds the true neighbours, whatever the bank."""
        return self.index in EXACT

    def fit(self, table: EmbeddingTable) -> FittedKNN:
        """A classifier with this table as its bank.

        Args:
            table: The bank; it is not copied.

        Returns:
            The classifier, whose k is at most the number of rows.

        Raises:
            ValueError: For an empty table or a bad factory string.
            TypeError: For what is no table.
        """
        k = clip_k(self.k, check_bank(table))
        slack = row_slack(table.z) if isinstance(table.z, np.memmap) else FittedKNN.slack
        index = None if self.exact else build_index(table.z, *self.factory(), seed=self.seed)
        return FittedKNN(settings=self, table=table, k=k, slack=slack, _index=index)

    def factory(self) -> tuple[str, str]:
        """FAISS's factory string and search parameters."""
        name, parameters = split_factory(self.index)
        return name, parameters or self.index_parameters


@dataclass(frozen=True, eq=False)
class FittedKNN(NeighbourVote):
    """A bank that answers queries.

    The index proposes a few rows more than k from float32 products; these are measured again in float64 and ordered by
    similarity, then by row.  With an exact index, queries for which rounding could hide a nearer row are searched again
    in float64, so that the neighbours depend neither on the index nor on the other queries, and equal rows go to the
    lower row.

    Attributes:
        settings: The settings that were fitted.
        table: The bank.
        k: Number of neighbours in use.
        slack: How far bank rows may be from unit length.
        search_k: Neighbours that one search looks for, at least k; classifiers that share a search share this number.
    """

    settings: KNNClassifier
    table: EmbeddingTable
    k: int
    slack: float = 1e-5
    search_k: int = 0
    _index: Any = field(default=None, repr=False)
    _bank: Any = field(default=None, repr=False)
    _held: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "search_k", max(self.search_k, self.k))
        if self._bank is None:
            streams = self.settings.exact and self.settings.index != "flat"
            device = self.settings.device if streams and self.settings.device else "cpu"
            object.__setattr__(self, "_bank", BankRows(self.table, device=device, hold=False))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the bank, in the order of the columns of the scores."""
        return self.table.class_names

    @property
    def temperature(self) -> float:
        """Temperature of the vote's weights."""
        return self.settings.temperature

    @property
    def label(self) -> np.ndarray:
        """(m,) int64, the class of each row of the bank."""
        return self.table.label

    @property
    def width(self) -> int:
        """Width d of the embeddings."""
        return int(self.table.z.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the embeddings of `logits` and `scores` have to be: the CPU until `to` says otherwise."""
        return self._bank.device if self._held else torch.device("cpu")

    @cached_property
    def classes_with_rows(self) -> int:
        """Number of classes that have rows in the bank."""
        return len(np.unique(self.table.label))

    def neighbours(self, z: Queries) -> Neighbours:
        """The k nearest bank rows of each query, measured in float64.

        Args:
            z: (n, d) queries of any length, or a table of them.

        Returns:
            (n, k) similarities and rows.

        Raises:
            ValueError: If an approximate index finds no neighbour at all of some queries.
        """
        rows = query_rows(z, self.class_names, width=self.width)
        similarity, row = np.empty((len(rows), self.k)), np.empty((len(rows), self.k), dtype=np.int64)
        for part in chunks(len(rows), self._queries_per_search):
            nearest, _ = self._search(unit_rows(rows[part], first=part.start), self.search_k)
            similarity[part], row[part] = nearest.similarity[:, : self.k], nearest.row[:, : self.k]
        self._require_neighbours(similarity)
        return Neighbours(similarity, row)

    def predict(self, z: Queries) -> np.ndarray:
        """The class with the highest score; ties go to the lower index.

        The products that propose neighbours decide where no rounding could change the winner; the others are decided by
        `predict_proba`.  Both give the same classes.

        Args:
            z: (n, d) queries of any length, or a table of them.

        Returns:
            (n,) int64, places in `class_names`.
        """
        if self._index is not None:
            return super().predict(z)
        rows = query_rows(z, self.class_names, width=self.width)
        winner = np.empty(len(rows), dtype=np.int64)
        error = rounding_bound(self.width) + self.slack
        for part in chunks(len(rows), self._queries_per_search):
            unit = unit_rows(rows[part], first=part.start)
            proposals = self._bank.propose(unit, min(self.k + _MARGIN, len(self._bank)))
            product, row = proposals.product.cpu().numpy().astype(np.float64), proposals.row.cpu().numpy()
            best, certain = self.certain_winner(product, row, error=error, whole=row.shape[1] == len(self._bank))
            if not certain.all():
                best[~certain] = super().predict(np.asarray(rows[part])[~certain])
            winner[part] = best
        return winner

    def vote_rows(self, unit: np.ndarray) -> VoteRows:
        """Neighbours and the nearest row of each class.

        A bank on a device is measured there.  Queries whose decision could depend on the last digits are measured again
        with numpy, as `predict_proba` measures, so that both decide alike.

        Args:
            unit: (n, d) float64 queries of length one.

        Returns:
            Rows and similarities, from which logits are made.
        """
        bank, on_device = self._bank, self.device.type != "cpu"
        one_pass = self._index is None and bank.in_memory
        if not bank.in_memory:
            self._warn_of_cost()
        k = min(self.search_k + on_device, len(bank))
        nearest, class_row = self._search(unit, k, per_class=one_pass, on_device=on_device)
        if class_row is None:
            class_row = bank.nearest_of_sample(unit, seed=self.settings.seed)
        class_similarity = bank.similarities(unit, np.maximum(class_row, 0), on_device=on_device)
        neighbours = Neighbours(nearest.similarity[:, : self.k], nearest.row[:, : self.k])
        if on_device:
            doubtful = self.doubtful_queries(nearest)
            again, _ = self._search(unit[doubtful], self.search_k)
            neighbours.similarity[doubtful] = again.similarity[:, : self.k]
            neighbours.row[doubtful] = again.row[:, : self.k]
        self._require_neighbours(neighbours.similarity)
        return VoteRows(neighbours, class_row, class_similarity)

    def gather(self, row: Tensor) -> Tensor:
        """The rows of the bank with these indices.

        Args:
            row: (...) int64 indices.

        Returns:
            (..., d) float32, on the device of `row`.
        """
        rows: Tensor = self._bank.gather(row)
        return rows

    def recall(self, z: Queries) -> float:
        """Share of the true k nearest neighbours that the index finds: 1.0 for the exact indexes.

        A row as similar as the true k-th neighbour counts as found, so that ties cost nothing.

        Args:
            z: (n, d) queries of any length, or a table of them.

        Returns:
            A share in [0, 1].
        """
        last = self.with_exact_index().neighbours(z).similarity[:, -1:]
        return float((self.neighbours(z).similarity >= last - 1e-9).mean())

    def agreement(self, z: Queries) -> float:
        """Share of the queries that the index and an exact search give the same class: 1.0 for the exact indexes.

        Args:
            z: (n, d) queries of any length, or a table of them.

        Returns:
            A share in [0, 1].
        """
        return float((self.predict(z) == self.with_exact_index().predict(z)).mean())

    def index_quality(self, queries: EmbeddingTable, *, seed: int) -> dict[str, float | int]:
        """Recall and agreement of an approximate index, for records.

        Args:
            queries: At most 256 of them, drawn with the seed, are answered by an exact search as well.
            seed: Draws the queries.

        Returns:
            index_recall, index_agreement and index_queries; nothing for an exact index, and nothing where the queries
            came without embeddings, as those of a transfer do.
        """
        if self.settings.exact or not len(queries) or queries.z.shape[1] != self.width:
            return {}
        count = min(_QUALITY_QUERIES, len(queries))
        chosen = np.sort(np.random.default_rng(seed).choice(len(queries), count, replace=False))
        z = np.asarray(queries.z[chosen])
        return {"index_recall": self.recall(z), "index_agreement": self.agreement(z), "index_queries": count}

    def with_exact_index(self) -> FittedKNN:
        """The same bank and k, searched exactly and without an index of its own (in blocks, on `device`)."""
        settings = KNNClassifier(
            k=self.settings.k, temperature=self.temperature, index="stream", device=self.settings.device
        )
        return FittedKNN(settings=settings, table=self.table, k=self.k, slack=self.slack)

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its bank on a device; a bank on disk is read in blocks that travel there.

        An approximate index stays where FAISS built it.

        Args:
            device: Where embeddings will be.

        Returns:
            A copy, or this object where it is there already.
        """
        if torch.empty(0, device=device).device == self.device:
            return self
        return dataclasses.replace(self, _bank=BankRows(self.table, device=device, hold=True), _held=True)

    def tensors(self) -> dict[str, Tensor]:
        """The bank's rows, (m, d) float32: the table's own memory on the CPU; nothing where they are read in blocks."""
        return {} if self._bank.tensor is None else {"rows": self._bank.tensor}

    @property
    def search_key(self) -> tuple[int, ...]:
        """Equal for classifiers whose neighbours come from the same search."""
        return id(self.table), id(self._index), id(self._bank), self.search_k

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write settings, the bank's fingerprint and, where there is one, the FAISS index; all of it or nothing.

        The bank itself is not in the folder: save it with `EmbeddingTable.save`, and give it to `load_knn`.  An older
        classifier at `path` is replaced.

        Args:
            path: The folder.

        Returns:
            The folder.

        Raises:
            FileExistsError: If something else is at `path`.
        """
        path = Path(path)
        with atomic_folder(path, marker=SETTINGS_FILE, what="a saved classifier") as folder:
            content: dict[str, Any] = {"settings": dataclasses.asdict(self.settings), "k": self.k, "slack": self.slack}
            content |= {"rows": len(self.table), "bank": fingerprint_table(self.table), "index_sha256": ""}
            if self._index is not None:
                load_faiss(self.settings.index).write_index(self._index, str(folder / INDEX_FILE))
                content["index_sha256"] = digest_file(folder / INDEX_FILE)
            (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=1))
        return path

    @property
    def _queries_per_search(self) -> int:
        """A stream reads the bank for each search, so it takes as many queries as fit a block."""
        streams = self.settings.exact and (self.settings.index != "flat" or self._bank.tensor is None)
        return max(self.settings.chunk, BLOCK_BYTES // (8 * self.width)) if streams else self.settings.chunk

    def _search(
        self, unit: np.ndarray, k: int, *, per_class: bool = False, on_device: bool = False
    ) -> tuple[Neighbours, np.ndarray | None]:
        """Neighbours of float64 unit rows, and the nearest row of each class where a pass over the bank tells it."""
        bank, exact = self._bank, self.settings.exact
        count = min(k + (_MARGIN if exact else max(_MARGIN, k // 4)), len(bank))
        if self._index is not None:
            _, candidates = self._index.search(np.ascontiguousarray(unit, dtype=np.float32), count)
            return bank.rank(unit, candidates, k, on_device=on_device), None
        proposals = bank.propose(unit, count, per_class=per_class)
        nearest = bank.rank(unit, proposals.row.cpu().numpy(), k, on_device=on_device)
        if count < len(bank):
            hidden = proposals.product[:, -1].cpu().numpy().astype(np.float64) + rounding_bound(self.width) + self.slack
            undecided = np.flatnonzero(nearest.similarity[:, k - 1] <= hidden)
            for part in chunks(len(undecided), self.settings.chunk):
                at = undecided[part]
                nearest.similarity[at], nearest.row[at] = rerank_exact(unit[at], bank, k, on_device=on_device)
        return nearest, None if proposals.class_row is None else proposals.class_row.cpu().numpy()

    def _warn_of_cost(self) -> None:
        if not self._bank.has_warned_of_cost:
            self._bank.has_warned_of_cost = True
            size = self.table.z.nbytes / 2**30
            warnings.warn(
                f"the bank is a file of {size:.2f} GiB: every call of logits reads"
                f" {'all of it' if self._index is None else 'the neighbours from it'}; np.array(table.z) holds it in"
                " memory",
                stacklevel=5,
            )

    def _require_neighbours(self, similarity: np.ndarray) -> None:
        if missing := int(np.isneginf(similarity[:, 0]).sum()):
            raise ValueError(
                f"index {self.settings.index!r} found no neighbour for {missing} of {len(similarity)} queries;"
                " search wider, for instance index_parameters='nprobe=8', or use index='flat'"
            )
