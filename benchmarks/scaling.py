"""What OTCO costs on several ranks: `python benchmarks/scaling.py --out runs/scaling` (or `make scaling`).

Ranks are gloo processes with one thread each. Writes `scaling.json`, `scaling.md` and `scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from solvers import EPOCHS, FEATURES, features, table

from openclip_otco.ot.shards import ALONE, DistributedShards
from openclip_otco.solver import PlanSolver

WORLDS = (1, 2, 4)
D = 512


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def model(n: int, world: int, iterations: int) -> dict[str, float]:
    """Floats that a rank hands to collectives, and floating-point operations of its share, for one warm-started plan.

    Collectives, in order: initial plan (N + 1), previous potentials (N), the two starts compared (2N), the kernel's duals
    (N), first half-step (N), one (N + 1) an iteration, potentials (N), diagnostics and drift (4), and whether a step
    succeeded (a handful of scalars). A product of all rows with all columns is 2 N² d operations; each rank makes four
    W-ths of it (previous potentials, compared starts, kernel, diagnostics), and the first one another for the initial
    plan; a kernel product is 2 N², two an iteration.
    """
    floats = (n + 1) + n + 2 * n + n + n + iterations * (n + 1) + n + 4
    product = 2 * n * n * D
    # The two starts are compared one after the other, each over the whole of this rank's rows.
    shared = (5 * product + iterations * 4 * n * n) / world
    return {"floats": floats, "flops_first": shared + product, "flops_other": shared}


def plan_rank(rank: int, world: int, port: int, sizes: list[int], repeats: int, out: Path) -> None:
    torch.set_num_threads(1)
    shards = ALONE
    counted = {"floats": 0, "calls": 0}
    if world > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world, rank=rank)
        shards = DistributedShards()
        all_reduce = dist.all_reduce

        def counting(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            counted["floats"] += tensor.numel() * tensor.element_size() // 4
            counted["calls"] += 1
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counting
    results = {}
    for n in sizes:
        solver = PlanSolver(epsilon=0.1, additive_error=0.01, shards=shards)
        previous = solver.solve(*features(EPOCHS[1], n, FEATURES, offset=min(n // 2, 7000 - n)))
        pair = features(EPOCHS[1], n, FEATURES)
        seconds = []
        for _ in range(repeats + 1):
            counted.update(floats=0, calls=0)
            if world > 1:
                dist.barrier()
            started = time.perf_counter()
            plan = solver.solve(*pair, previous=previous)
            seconds.append(time.perf_counter() - started)
        results[n] = {
            "seconds": seconds[1:], "iterations": plan.diagnostics["iterations"], **counted, "digest": plan.digest(),
        }  # fmt: skip
    (out / f"plan-{world}-{rank}.json").write_text(json.dumps(results))
    if world > 1:
        dist.destroy_process_group()


def plans_section(out: Path, repeats: int, found: dict) -> str:
    strong, per_rank = 4096, 1024
    rows, times = [], {}
    for world in WORLDS:
        sizes = sorted({strong, per_rank * world})
        torch.multiprocessing.spawn(plan_rank, (world, free_port(), sizes, repeats, out), nprocs=world)
        ranks = [json.loads((out / f"plan-{world}-{rank}.json").read_text()) for rank in range(world)]
        assert len({rank[str(strong)]["digest"] for rank in ranks}) == 1
        times[world] = ranks
        for n in sizes:
            first = ranks[0][str(n)]
            seconds = statistics.median(first["seconds"])
            expected = model(n, world, int(first["iterations"]))
            wire = f"{first['floats']} ({expected['floats'] if world > 1 else 0:.0f})"
            rows.append(
                [str(world), str(n), f"{seconds:.2f}", f"{expected['flops_other'] / 1e9:.0f}",
                 str(first["calls"]), wire]
            )  # fmt: skip
    found["plans"] = {str(world): ranks for world, ranks in times.items()}
    head = ["ranks", "N", "seconds", "GFLOP a rank (model)", "collectives", "floats in them (model)"]
    return (
        "## A plan, made together\n\nd = 512, ε = 0.1, warm start; one thread a rank, so that four ranks share two cores.\n\n"
        + table(head, rows)
    )


def train(world: int, loss: str, folder: Path, shards: str, samples: int) -> float:
    """Mean seconds per step of a run, without its first quarter."""
    options = [
        "--train-data", shards, "--train-num-samples", str(samples), "--dataset-type", "webdataset", "--workers", "0",
        "--model", "RN10t-bert-tiny", "--batch-size", str(128 // world), "--epochs", "1", "--precision", "fp32",
        "--device", "cpu", "--warmup", "10", "--log-every-n-steps", "1", "--logs", str(folder),
        "--name", f"{loss}-{world}-{time.time_ns()}", "--local-loss", "--gather-with-grad", "--save-frequency", "0",
        "--loss", loss, *(["--otco-warmup", "0"] if loss == "otco" else []),
    ]  # fmt: skip
    command = [sys.executable, "-m", "open_clip_train.main"]
    if world > 1:
        command[2:] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m", "--", command[2]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=True)
    steps = [float(x) for x in re.findall(r"Train Epoch.*?Batch \(t\): ([\d.]+)", done.stdout + done.stderr)]
    return statistics.fmean(steps[len(steps) // 4 :])


def overhead_section(out: Path, repeats: int, found: dict) -> str:
    """Whole runs of OpenCLIP's script, CLIP and OTCO in turns."""
    data, samples = out / "scenes", 4096
    if not data.exists():
        command = [sys.executable, "-m", "openclip_otco.cli", "scenes", str(data), "--train", str(samples)]
        subprocess.run([*command, "--val", "16", "--shards", "4"], check=True, capture_output=True)
    rows, seconds = [], {}
    for world in WORLDS:
        runs = [
            {loss: train(world, loss, out / "runs", str(data / "train" / "{0000..0003}.tar"), samples)
             for loss in ("clip", "otco")} for _ in range(repeats)
        ]  # fmt: skip
        seconds[str(world)] = runs
        clip, otco = (statistics.median(run[loss] for run in runs) for loss in ("clip", "otco"))
        share = statistics.median(run["otco"] / run["clip"] - 1 for run in runs)
        rows.append([str(world), f"{clip:.3f}", f"{otco:.3f}", f"{100 * share:+.1f} %"])
    found["steps"] = seconds
    head = ["ranks", "CLIP, s/step", "OTCO, s/step", "overhead (median of pairs)"]
    return (
        f"## Steps of a training\n\n`RN10t-bert-tiny` at 64 px, global batch 128, Δ = 8, {samples // 128} steps, "
        f"{repeats} pairs of runs.\n\n" + table(head, rows)
    )


def picture(found: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    strong, weak = figure.subplots(1, 2)
    for axes, title, size in (
        (strong, "strong: N = 4096", lambda w: 4096),
        (weak, "weak: N = 1024 a rank", lambda w: 1024 * w),
    ):
        points = [statistics.median(found["plans"][str(w)][0][str(size(w))]["seconds"]) for w in WORLDS]
        axes.plot(WORLDS, points, marker="o")
        axes.set(title=title, xlabel="ranks", ylabel="seconds a plan", ylim=(0, None), xticks=WORLDS)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder for what is measured")
    parser.add_argument("--repeats", type=int, default=5, help="plans timed at each number of ranks")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of training runs at each number of ranks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {"cores": os.cpu_count(), "torch": torch.__version__}
    page = [f"Made by `python benchmarks/scaling.py` with torch {torch.__version__} on {os.cpu_count()} cores."]
    for section in (
        lambda: plans_section(args.out, args.repeats, found),
        lambda: overhead_section(args.out, args.pairs, found),
    ):
        page.append(section())
        print(page[-1], flush=True)
        (args.out / "scaling.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
        (args.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture(found, args.out / "scaling.png")


if __name__ == "__main__":
    main()
