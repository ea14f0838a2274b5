"""Does torch's own rendezvous end a training whose ranks are killed, or does it need `hsat.rendezvous.meet_ranks`?

    python benchmarks/rendezvous_trial.py --runs 23 --minutes 20 --out benchmarks/results/rendezvous_trial.json

`hsat train` on two ranks over gloo, with --max_restarts=3.  A plan kills ranks by
SIGKILL at random moments: while they start, in a step, in a checkpoint.  The same plans are run

- in three ways: `meet_ranks` as it is; torch's rendezvous "env://" with a PrefixStore by TORCHELASTIC_RESTART_COUNT;
  and `init_process_group("env://")` alone,
- by one torchrun for both ranks (standalone), and by two of them with one rank each (--rdzv_backend=c10d).

A run has ended well if its weights and its train.csv are, byte for byte, those of a run that nobody killed.  A run
whose processes neither use nor wait for a processor for 45 seconds is ended and is counted as hung: on a busy machine,
the time alone tells nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

WAYS = ("meet_ranks", "count", "env")
AGENTS = (1, 2)
STEPS = 8
BUSY, IDLE = 2.0, 45.0  # a run whose processes use less CPU seconds than that in so many seconds hangs
FILES = ("final.safetensors", "train.csv")
TRAINING = (
    "--data.image_size 32 --model.backbone test_byobnet --model.embedding_dim 16 --data.tune_fraction 0"
    f" --train.steps {STEPS} --train.save_every 2 --train.batch_patients 2 --attack.steps 1 --quiet"
).split()


def plan_kills(seed: int, number: int) -> list[dict[str, Any]]:
    """One or two kills: which rank, in which phase, from which step on, and so many seconds after its begin."""
    rng = random.Random(f"{seed} {number}")
    longest = {"start": 6.0, "step": 0.2, "checkpoint": 0.03}
    kills = []
    for _ in range(rng.choice((1, 1, 2))):
        phase = rng.choice(tuple(longest))
        delay = rng.uniform(0, longest[phase])
        kills.append({"rank": rng.randrange(2), "phase": phase, "step": rng.randrange(STEPS), "delay": delay})
    return kills


# --- a rank -----------------------------------------------------------------------------------------------------------


class Assassin:
    """Kills this process at the moment that the first kill of the plan which nobody has done yet names, if any."""

    def __init__(self, folder: Path) -> None:
        kills = json.loads((folder / "plan.json").read_text())
        self.mark = folder / f"kill-{len(list(folder.glob('kill-*')))}"
        number = int(self.mark.name.partition("-")[2])
        self.kill = kills[number] if number < len(kills) and kills[number]["rank"] == int(os.environ["RANK"]) else None

    def enter(self, phase: str, step: int = STEPS) -> None:
        """Called at the begin of a phase."""
        if self.kill is None or self.kill["phase"] != phase or step < self.kill["step"]:
            return
        delay, self.kill = self.kill["delay"], None
        threading.Thread(target=self.strike, args=(delay,), daemon=True).start()

    def strike(self, delay: float) -> None:
        """Kill -9 for this process, after so many seconds."""
        time.sleep(delay)
        self.mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def join_as_torch_does(device: str, *, patience: timedelta) -> Iterator[Any]:
    """In place of `hsat.cli.ranks.join_ranks`: only torch's own rendezvous, with and without a prefix by restarts."""
    import torch
    import torch.distributed as dist

    from hsat.cli.ranks import Ranks, has_begun

    store, rank, size = next(iter(dist.rendezvous("env://", timeout=patience)))
    if os.environ["TRIAL_WAY"] == "count":
        room = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("gloo", store=room, rank=rank, world_size=size, timeout=patience)
    else:
        dist.init_process_group("gloo", init_method="env://", timeout=patience)
    again = [has_begun(store)]
    dist.broadcast_object_list(again)
    yield Ranks(rank, size, torch.device(device), again[0], store)
    dist.destroy_process_group()


def train_as_a_rank() -> None:
    """What torchrun starts: `hsat train` with an assassin."""
    folder = Path(os.environ["TRIAL_FOLDER"])
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()} {os.environ['RANK']} {os.environ['TORCHELASTIC_RESTART_COUNT']}\n")
    assassin = Assassin(folder)
    assassin.enter("start")
    from hsat.cli import train
    from hsat.training.trainer import Trainer

    step, save = Trainer.step, Trainer.save

    def watched_step(self: Trainer, batch: Any) -> Any:
        assassin.enter("step", self.done)
        return step(self, batch)

    def watched_save(self: Trainer) -> Any:
        assassin.enter("checkpoint", self.done)
        return save(self)

    Trainer.step, Trainer.save = watched_step, watched_save  # type: ignore[method-assign]
    if os.environ["TRIAL_WAY"] != "meet_ranks":
        train.join_ranks = join_as_torch_does  # type: ignore[assignment]
    train.main([*TRAINING, "--device", "cpu", *sys.argv[1:]])


# --- a run ------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_agents(folder: Path, root: Path, way: str, agents: int, restarts: int) -> list[subprocess.Popen[bytes]]:
    """The torchruns of one run, each in a process group of its own."""
    meeting = ["--standalone", "--nproc_per_node=2"]
    if agents == 2:
        meeting = [
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        ]
        meeting += [f"--rdzv_id={folder.name}", "--local_addr=127.0.0.1"]
    words = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--max_restarts={restarts}"]
    words += [__file__, "--data.root", str(root), "--out", str(folder / "run")]
    about = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRIAL_WAY": way, "TRIAL_FOLDER": str(folder)}
    started = []
    for number in range(agents):
        with (folder / f"agent-{number}.log").open("wb") as log:
            started.append(
                subprocess.Popen(words, env=os.environ | about, stdout=log, stderr=log, start_new_session=True)
            )
    return started


def read_starts(folder: Path) -> list[list[str]]:
    """[id, rank, restarts] of each process that the torchruns have started."""
    path = folder / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def look_at(folder: Path, agents: list[subprocess.Popen[bytes]]) -> tuple[float, bool]:
    """CPU seconds that the living torchruns and ranks have used, and whether one of them waits for a processor."""
    ids = [str(process.pid) for process in agents]
    ids += (
        [line.split()[0] for line in (folder / "starts").read_text().splitlines()]
        if (folder / "starts").exists()
        else []
    )
    ticks, waits = 0, False
    for number in ids:
        with suppress(OSError):
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:13]))
            waits |= fields[0] in ("R", "D")
    return ticks / os.sysconf("SC_CLK_TCK"), waits


def end_all(folder: Path, agents: list[subprocess.Popen[bytes]]) -> None:
    """Kill -9 for what is left of the torchruns and of the ranks that they started."""
    for process in agents:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for words in read_starts(folder):
        with suppress(OSError):  # it has ended
            if f"TRIAL_FOLDER={folder}\0".encode() in Path(f"/proc/{words[0]}/environ").read_bytes():
                os.kill(int(words[0]), signal.SIGKILL)


def digest(folder: Path) -> str:
    """Of the files that have to be the same bytes."""
    found = [folder / "run" / name for name in FILES]
    return "" if not all(map(Path.exists, found)) else hashlib.sha256(b"".join(map(Path.read_bytes, found))).hexdigest()


def last_lines(folder: Path) -> str:
    """What the ranks said about errors."""
    texts = [path.read_text(errors="replace").splitlines() for path in sorted(folder.glob("agent-*.log"))]
    return "\n".join(line[:300] for lines in texts for line in lines if "rror" in line and "elastic" not in line)[
        -1500:
    ]


def run(folder: Path, root: Path, way: str, agents: int, kills: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """One run: how it ended, its kills and its starts."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(kills))
    begin = marked = time.monotonic()
    processes, hung, used, waited = start_agents(folder, root, way, agents, restarts=3), False, 0.0, 0
    try:
        while any(process.poll() is None for process in processes) and not hung:
            time.sleep(1)
            now, waits = look_at(folder, processes)
            waited += waits
            if now < used or now > used + BUSY or waited > IDLE / 4:
                used, waited, marked = now, 0, time.monotonic()
            hung = time.monotonic() - marked > IDLE or time.monotonic() - begin > limit
    finally:
        end_all(folder, processes)
    return {
        "way": way,
        "agents": agents,
        "ended": "hung" if hung else "failed" if any(process.returncode for process in processes) else "ended",
        "digest": digest(folder)[:16],
        "said": "" if not hung and not any(each.returncode for each in processes) else last_lines(folder),
        "kills": len(list(folder.glob("kill-*"))),
        "restarts": sum(words[1] == "0" for words in read_starts(folder)) - 1,
        "seconds": round(time.monotonic() - begin, 1),
    }


def summarize(results: list[dict[str, Any]], expected: str) -> list[dict[str, Any]]:
    """For each way and number of torchruns: how the runs ended in which a rank was killed."""
    rows = []
    for way in WAYS:
        for agents in AGENTS:
            chosen = [one for one in results if (one["way"], one["agents"]) == (way, agents) and one["kills"]]
            endings = Counter(
                one["ended"] if one["ended"] != "ended" else "same" if one["digest"] == expected else "other bytes"
                for one in chosen
            )
            more = sum(one["restarts"] > one["kills"] for one in chosen if one["ended"] == "ended")
            kills = sum(one["kills"] for one in chosen)
            rows.append({"way": way, "agents": agents, "runs": len(chosen), "kills": kills, **endings, "more": more})
    return rows


def main() -> None:
    """Read the options, run the plans in turn, print and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=23, help="plans")
    parser.add_argument("--first", type=int, default=0, help="number of the first plan")
    parser.add_argument("--minutes", type=float, default=20.0, help="no run begins later than that")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a run hangs, anyway")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the counts and all runs are written, as JSON")
    options = parser.parse_args()
    import torch

    from hsat.data import write_synthetic_cohort

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = write_synthetic_cohort(
            folder / "cohort", classes=("hgg", "lgg"), patients_per_class=4, patches=3, size=32
        )
        expected = {run(folder / f"whole-{n}", root, "meet_ranks", n, [], 600)["digest"] for n in AGENTS}
        if len(expected) != 1 or "" in expected:
            raise SystemExit(f"runs that nobody kills do not agree or failed: {expected}")
        end = time.monotonic() + 60 * options.minutes

        def one(number: int, way: str, agents: int) -> None:
            if time.monotonic() < end:
                kills = plan_kills(options.seed, number)
                found = run(folder / f"{way}-{agents}-{number}", root, way, agents, kills, options.limit)
                results.append(found | {"number": number, "plan": kills})
                print(
                    json.dumps({name: value for name, value in results[-1].items() if name not in ("plan", "said")}),
                    flush=True,
                )

        with ThreadPoolExecutor(options.jobs) as pool:
            order = [
                (n, way, a)
                for n in range(options.first, options.first + options.runs)
                for way in options.ways.split(",")
                for a in AGENTS
                if way != "env" or n % 4 == 0
            ]
            list(pool.map(lambda words: one(*words), order))
    rows = summarize(results, *expected)
    for row in rows:
        print(row)
    if options.out is not None:
        about = {"torch": torch.__version__, "limit": options.limit, "counts": rows, "expected": [*expected]}
        options.out.write_text(json.dumps(about | {"runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    train_as_a_rank() if "TRIAL_WAY" in os.environ else main()
