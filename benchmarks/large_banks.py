"""Time and memory of kNN over large banks: hsat's indexes, torch.mm with topk, and scikit-learn, side by side.

Every variant runs in a process of its own, forked with everything imported, on the same bank on disk and the same
queries.  It reads the bank, fits, and answers the queries several times.  Memory is what the process holds for itself
(RssAnon, sampled) above what it held before; pages of a memory-mapped file can be dropped by the system and are counted
apart (RssFile).  A variant that takes longer than --cap seconds is stopped and said to be.  Agreement is with exact
predictions.

    python benchmarks/large_banks.py --out benchmarks/results/large_banks.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import sklearn
import torch
from sklearn.neighbors import KNeighborsClassifier

from hsat.classifiers import KNNClassifier
from hsat.types import EmbeddingTable

K, TEMPERATURE, CLASSES, CENTRES, LATENT = 200, 0.07, 7, 40, 64
VARIANTS = {
    "hsat flat, mapped": ("flat", True),
    "hsat stream, mapped": ("stream", True),
    "hsat flat, in memory": ("flat", False),
    "hsat float16 file, mapped": ("half", True),
    "torch.mm + topk": ("mm", False),
    "scikit-learn brute": ("sklearn", False),
    "hsat SQfp16, mapped": ("SQfp16", True),
    "hsat IVF, 1/16 of the lists, mapped": ("IVF{lists},Flat;nprobe={few}", True),
    "hsat IVF, 1/4 of the lists, mapped": ("IVF{lists},Flat;nprobe={many}", True),
    "hsat HNSW32, mapped": ("HNSW32", True),
    "hsat HNSW32, wide search, mapped": ("HNSW32;efSearch=1024", True),
}


class Memory:
    """The most that this process held, sampled every 5 ms: anonymous (its own) and file pages, in MiB."""

    def __init__(self) -> None:
        self.start = self._now()
        self.peak = dict(self.start)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            for name, value in self._now().items():
                self.peak[name] = max(self.peak[name], value)

    @staticmethod
    def _now() -> dict[str, float]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def write_bank(folder: Path, rows: int, width: int, seed: int) -> None:
    """Unit rows around centres, each centre of one class, in blocks to disk, as a saved EmbeddingTable.

    Features of a trained encoder spread in few directions; here in LATENT, with a little noise in all.
    """
    fixed = np.random.default_rng(0)
    centres = fixed.standard_normal((CENTRES * CLASSES, width), dtype=np.float32)
    spread = fixed.standard_normal((LATENT, width), dtype=np.float32) / LATENT**0.5
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    z = np.lib.format.open_memmap(folder / "z.npy", mode="w+", dtype=np.float32, shape=(rows, width))
    centre = rng.integers(0, len(centres), rows)
    for start in range(0, rows, 8192):
        part = centre[start : start + 8192]
        block = rng.standard_normal((len(part), LATENT), dtype=np.float32) @ spread
        block += 0.7 * centres[part] + 0.3 * rng.standard_normal((len(part), width), dtype=np.float32)
        z[start : start + 8192] = block / np.linalg.norm(block, axis=1, keepdims=True)
    z.flush()
    label = np.where(rng.random(rows) < 0.2, rng.integers(0, CLASSES, rows), centre % CLASSES)  # 20 % are drawn anew
    for name, ids in (("label", label), *((n, np.arange(rows)) for n in ("patch", "slide", "patient"))):
        np.save(folder / f"{name}.npy", ids)
    text = {"cohort": "", "split": "", "encoder": "", "class_names": [f"class {c}" for c in range(CLASSES)]}
    (folder / "table.json").write_text(json.dumps(text))
    EmbeddingTable.load(folder, memory_map=True).save(half_of(folder), dtype="float16")


def half_of(bank: Path) -> Path:
    """The same bank stored in float16."""
    return bank.with_name(f"{bank.name}-half")


def answerer(kind: str, table: EmbeddingTable) -> tuple[Callable[[np.ndarray], np.ndarray], object]:
    """Class scores of queries as a function, and the fitted classifier where it is ours."""
    if kind == "mm":
        bank, label = torch.from_numpy(table.z), torch.from_numpy(table.label)

        def plain(queries: np.ndarray) -> np.ndarray:
            value, row = torch.mm(torch.from_numpy(queries), bank.T).topk(K, dim=1)
            scores = torch.zeros(len(queries), CLASSES)
            return scores.scatter_add_(1, label[row], (value / TEMPERATURE).softmax(1)).numpy()

        return plain, None
    if kind == "sklearn":
        peer = KNeighborsClassifier(
            K, weights=lambda gap: np.exp(-gap / TEMPERATURE), metric="cosine", algorithm="brute"
        )
        return peer.fit(table.z, table.label).predict_proba, None
    knn = KNNClassifier(k=K, temperature=TEMPERATURE, index=kind).fit(table)
    return knn.predict_proba, knn


def child(kind: str, mapped: bool, bank: str, query_file: str, repeats: int) -> dict[str, object]:
    """One variant, measured in this process."""
    queries = np.load(query_file)
    torch.set_num_threads(threads())
    faiss.omp_set_num_threads(threads())
    if kind == "half":
        bank, kind = str(half_of(Path(bank))), "stream"
    with Memory() as memory:
        begin = time.perf_counter()
        answer, knn = answerer(kind, EmbeddingTable.load(bank, memory_map=mapped))
        fit = time.perf_counter() - begin
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            scores = answer(queries)
            seconds.append(time.perf_counter() - begin)
    found = {
        "fit_seconds": fit,
        "search_seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "repeats": repeats,
        "own_mib": memory.peak["RssAnon"] - memory.start["RssAnon"],
        "file_mib": memory.peak["RssFile"] - memory.start["RssFile"],
        "predicted": scores.argmax(1).tolist(),
    }
    if knn is not None and not knn.settings.exact:
        found["recall"] = knn.recall(queries)
    return found


def forked(task: list[object], cap: float) -> dict[str, object] | None:
    """What `child` finds, in a process of its own; None where it takes more than `cap` seconds."""
    context = multiprocessing.get_context("fork")  # importing all again would take longer than most searches
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send_bytes(json.dumps(child(*task)).encode()))
    process.start()
    sender.close()
    found = None
    try:
        found = json.loads(receiver.recv_bytes()) if receiver.poll(cap) else None
    finally:
        process.kill() if found is None else None
        process.join()
    return found


def threads() -> int:
    """Threads in use, as OMP_NUM_THREADS says."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def measure_size(rows: int, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All variants at one size of the bank."""
    bank, queries = folder / f"bank{rows}", folder / "queries.npy"
    writer = multiprocessing.get_context("fork").Process(target=write_bank, args=(bank, rows, options.width, 1))
    writer.start()  # a process of its own leaves no free memory here that the variants could use uncounted
    writer.join()
    results: dict[str, object] = {}
    exact = None
    for title, (kind, mapped) in VARIANTS.items():
        if options.variants and title not in (*options.variants, next(iter(VARIANTS))):
            results[title] = {"skipped": "not measured at this size"}
            continue
        if kind.startswith("HNSW") and rows > options.graph_rows:
            results[title] = {"skipped": f"built on one thread; measured up to {options.graph_rows} rows only"}
            continue
        lists = max(16, int(rows**0.5))
        task = [
            kind.format(lists=lists, few=lists // 16, many=lists // 4),
            mapped,
            str(bank),
            str(queries),
            options.repeats,
        ]
        found = forked(task, options.cap)
        if found is None:
            results[title] = {"stopped": f"took more than {options.cap:g} s"}
            continue
        predicted = np.array(found.pop("predicted"))
        exact = predicted if exact is None else exact  # the first variants are exact
        results[title] = {"index": task[0]} | found | {"agreement": float((predicted == exact).mean())}
        sys.stdout.write(f"{rows} {title}: {json.dumps(results[title])}\n")
        sys.stdout.flush()
    for written in (bank, half_of(bank)):
        shutil.rmtree(written)
    return {"bank_mib": rows * options.width * 4 / 2**20, "variants": results}


def markdown(about: dict[str, object], sizes: dict[str, object]) -> str:
    """The results as tables."""
    lines = ["# Large banks", "", *(f"- {name.replace('_', ' ')}: {value}" for name, value in about.items()), ""]
    for rows, found in sizes.items():
        lines += [f"## {rows} rows, {found['bank_mib']:.0f} MiB", ""]
        lines += [
            "| variant | fit s | search s (min, max) | times faster than torch.mm | own MiB | recall | agreement |"
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        plain = found["variants"]["torch.mm + topk"].get("search_seconds", {}).get("median")
        for title, got in found["variants"].items():
            if "search_seconds" not in got:
                lines.append(f"| {title} | {got.get('stopped', got.get('skipped'))} | | | | | |")
                continue
            s, recall = got["search_seconds"], got.get("recall")
            ratio = f"{plain / s['median']:.2f}" if plain else ""
            recalled = "" if recall is None else f"{recall:.4f}"
            lines.append(
                f"| {title} | {got['fit_seconds']:.1f} | {s['median']:.2f} ({s['min']:.2f}, {s['max']:.2f}) | {ratio}"
                f" | {got['own_mib']:.0f} | {recalled} | {got['agreement']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run all sizes, print what was found, write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 250_000])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cap", type=float, default=120, help="seconds that a variant may take at one size")
    parser.add_argument("--graph-rows", type=int, default=10_000)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="measure these only; the first is always one")
    parser.add_argument("--folder", type=Path, help="where the banks are written meanwhile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about = {
        "queries": options.queries,
        "width": options.width,
        "k": K,
        "threads": threads(),
        "load_before": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {m.__name__: m.__version__ for m in (torch, faiss, sklearn, np)},
    }
    info = Path("/proc/cpuinfo")
    about["processor"] = next(
        (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), ""
    )
    sizes: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        write_bank(Path(scratch) / "q", options.queries, options.width, 2)
        np.save(Path(scratch) / "queries.npy", np.load(Path(scratch) / "q" / "z.npy"))
        for rows in options.rows:
            sizes[str(rows)] = measure_size(rows, options, Path(scratch))
            about["load_after"] = os.getloadavg()[0]
            if options.out:
                options.out.write_text(json.dumps({"about": about, "sizes": sizes}, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(markdown(about, sizes))


if __name__ == "__main__":
    main()
