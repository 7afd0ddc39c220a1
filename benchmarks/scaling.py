"""What OTCO costs on several ranks: `python benchmarks/scaling.py --out runs/scaling` (or `make scaling`).

Ranks are gloo processes with one thread each. Writes `scaling.json`, `scaling.md` and `scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cost_model import FLOAT, Run
from open_clip.loss import ClipLoss
from solvers import EPOCHS, FEATURES, features, table
from torch.utils.flop_counter import FlopCounterMode

from openclip_otco.method.loss import OTCOLoss
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.ot.group import ALONE, DistributedGroup

WORLDS = (1, 2, 4)
STRONG, WEAK = 4096, 1024
BATCH = 128


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plan_rank(rank: int, world: int, port: int, sizes: list[int], repeats: int, out: Path) -> None:
    torch.set_num_threads(1)
    group = ALONE
    counted = {"floats": 0, "calls": 0}
    if world > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world, rank=rank)
        group = DistributedGroup()
        _count(counted)
    results = {}
    for n in sizes:
        solver = PlanSolver(epsilon=0.1, additive_error=0.01, group=group)
        previous = solver.solve(*features(EPOCHS[1], n, FEATURES, offset=min(n // 2, 7000 - n)))
        pair = features(EPOCHS[1], n, FEATURES)
        with FlopCounterMode(display=False) as operations:
            counted.update(floats=0, calls=0)
            plan = solver.solve(*pair, previous=previous)
        results[n] = {
            "operations": operations.get_total_flops(),
            "iterations": plan.diagnostics["iterations"],
            "digest": plan.digest(),
            **counted,
        }
        seconds, busy = [], []
        for _ in range(repeats):
            if world > 1:
                dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
            solver.solve(*pair, previous=previous)
            seconds.append(time.perf_counter() - started)
            busy.append(time.process_time() - worked)
        results[n] |= {"seconds": seconds, "busy": busy}
    results["step"] = _step(world, rank, previous, counted)
    (out / f"plan-{world}-{rank}.json").write_text(json.dumps(results))
    if world > 1:
        dist.destroy_process_group()


def _count(counted: dict[str, int]) -> None:
    """From now on, counts the floats that this rank hands to collectives."""

    def counting(collective: Callable[..., object], position: int) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            tensor = args[position]
            counted["floats"] += tensor.numel() * tensor.element_size() // FLOAT
            counted["calls"] += 1
            return collective(*args, **kwargs)

        return call

    dist.all_reduce = counting(dist.all_reduce, 0)
    dist.all_gather = counting(dist.all_gather, 1)


def _step(world: int, rank: int, plan: TransportPlan, counted: dict[str, int]) -> dict[str, dict[str, float]]:
    """Operations and floats of one call of CLIP's loss and of OTCO's, without a backward pass."""
    images, texts = (x.chunk(world)[rank] for x in features(EPOCHS[0], BATCH, FEATURES))
    settings: dict[str, Any] = {"local_loss": True, "rank": rank, "world_size": world}
    losses: dict[str, ClipLoss] = {"clip": ClipLoss(**settings)}
    for name, weight in (("confidence", 0.0), ("transport", 0.5)):
        losses[name] = loss = OTCOLoss(transport_weight=weight, **settings)
        loss.exchange.set_plans([plan], plan)
    found = {}
    for name, each in losses.items():
        counted.update(floats=0, calls=0)
        with FlopCounterMode(display=False) as operations:
            each(images, texts, torch.tensor(14.0))
        found[name] = {"operations": operations.get_total_flops(), **counted}
    return found


def plans_section(out: Path, repeats: int, found: dict[str, Any]) -> str:
    ranks: dict[int, list[dict[str, Any]]] = {}
    for world in WORLDS:
        sizes = sorted({STRONG, WEAK * world})
        torch.multiprocessing.spawn(plan_rank, (world, free_port(), sizes, repeats, out), nprocs=world)
        ranks[world] = [json.loads((out / f"plan-{world}-{rank}.json").read_text()) for rank in range(world)]
        assert len({rank[str(STRONG)]["digest"] for rank in ranks[world]}) == 1
    found["plans"] = {str(world): results for world, results in ranks.items()}
    rows, steps = [], []
    for world, results in ranks.items():
        for n in sorted({STRONG, WEAK * world}):
            first, *others = (result[str(n)] for result in results)
            run = Run(n // (8 * world), world, max_support=n)
            iterations = int(first["iterations"])
            other = others[-1] if others else first
            rows.append([
                str(world), str(n), _median(first["seconds"]), _median(first["busy"]),
                _median(other["busy"]) if others else "",
                _both(first["operations"] / 1e9, run.plan_operations(first=True) / 1e9),
                _both(other["operations"] / 1e9, run.plan_operations() / 1e9) if others else "",
                str(first["calls"]), _both(first["floats"], run.plan_floats(iterations)),
            ])  # fmt: skip
        step = results[0]["step"]
        support = sorted({STRONG, WEAK * world})[-1]
        run = Run(BATCH // world, world, max_support=support, window=support * world // BATCH)
        extra = {
            name: (step[name]["operations"] - step[less]["operations"], step[name]["floats"] - step[less]["floats"])
            for name, less in (("confidence", "clip"), ("transport", "confidence"))
        }
        logits = 2 * run.clip_operations()  # each transported view has its own against all others
        steps.append([
            str(world), str(run.batch), str(support),
            _both(step["clip"]["operations"] / 1e9, run.clip_operations() / 1e9, 3),
            _both(extra["confidence"][0] / 1e9, run.confidence_operations() / 1e9, 3),
            _both(extra["transport"][0] / 1e9, (run.transport_operations() + logits) / 1e9, 3),
            _both(step["clip"]["floats"], run.clip_floats()),
            _both(extra["confidence"][1], run.confidence_floats()),
            _both(extra["transport"][1], run.transport_floats()),
        ])  # fmt: skip
    head = ["ranks", "N", "seconds", "CPU seconds, first rank", "CPU seconds, another", "GFLOP, first rank",
            "GFLOP, another", "collectives", "floats in them"]  # fmt: skip
    step_head = ["ranks", "B", "N", "CLIP, GFLOP", "confidence adds", "λ > 0 adds", "CLIP, floats", "confidence adds",
                 "λ > 0 adds"]  # fmt: skip
    return (
        "## A plan, made together\n\nWidth 512, ε = 0.1, from the nearer of combinatorial plan and last potentials; "
        f"one thread a rank on {os.cpu_count()} cores, so that the CPU seconds of a rank say what it would take on a "
        "device of its own. Behind each count, in brackets, what the cost model says. Operations are those of matrix "
        "products; floats are 4 bytes.\n\n" + table(head, rows) + "\n\n## A step, forward\n\nGlobal batch "
        f"{BATCH}, `--local-loss`.\n\n" + table(step_head, steps)
    )


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}"


def _both(counted: float, expected: float, digits: int = 1) -> str:
    if isinstance(counted, int) and isinstance(expected, int):
        return f"{counted:,} ({expected:,})"
    return f"{counted:.{digits}f} ({expected:.{digits}f})"


def steps_section(out: Path, blocks: int, found: dict[str, Any]) -> str:
    """OpenCLIP's script, CLIP and OTCO in turns on one model (`alternating.py`)."""
    data, samples = out / "scenes", 8 * BATCH * 2 * blocks
    if not data.exists():
        command = [sys.executable, "-m", "openclip_otco.cli", "scenes", str(data), "--train", "5120"]
        subprocess.run([*command, "--val", "16", "--shards", "4"], check=True, capture_output=True)
    rows, runs = [], {}
    for world in WORLDS:
        file = out / f"steps-{world}.json"
        arguments = [
            str(Path(__file__).with_name("alternating.py")), str(file),
            "--train-data", str(data / "train" / "{0000..0003}.tar"), "--train-num-samples", str(samples),
            "--dataset-type", "webdataset", "--dataset-resampled", "--workers", "1", "--model", "RN10t-bert-tiny",
            "--batch-size", str(BATCH // world), "--epochs", "1", "--precision", "fp32", "--device", "cpu",
            "--warmup", "10", "--log-every-n-steps", "1000", "--logs", str(out / "runs"),
            "--name", f"{world}-{time.time_ns()}", "--local-loss", "--gather-with-grad", "--save-frequency", "0",
            "--loss", "otco", "--otco-warmup", "0", "--otco-window", "8",
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *(launcher if world > 1 else []), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        runs[str(world)] = run = json.loads(file.read_text())
        # The first block of each warms up.
        otco, clip = run["seconds"]["otco"][1:], run["seconds"]["clip"][1:]
        # A block is compared with the mean of the two blocks around it, which removes a drift of the machine's speed.
        shares = [2 * x / (before + after) - 1 for x, before, after in zip(otco[1:], clip, clip[1:], strict=False)]
        low, middle, high = statistics.quantiles(shares, n=4)
        rows.append([
            str(world), f"{statistics.median(clip) / 8:.3f}", f"{statistics.median(otco) / 8:.3f}",
            f"{100 * middle:+.1f} %", f"{100 * low:+.1f} to {100 * high:+.1f} %", str(len(shares)), str(run["skipped"]),
        ])  # fmt: skip
    found["steps"] = runs
    head = ["ranks", "CLIP, s/step", "OTCO, s/step", "overhead, median", "quartiles", "blocks", "plans skipped"]
    return (
        f"## Steps of a training\n\n`RN10t-bert-tiny` at 64 px through OpenCLIP's script, global batch {BATCH}, Δ = 8, "
        "default flags, CLIP and OTCO in turns of 8 steps on the same model; one thread a rank.\n\n" + table(head, rows)
    )


def model_section(found: dict[str, Any]) -> str:
    """The numbers of the cost model for a large run."""
    run = Run(batch=128, ranks=256, width=1024)
    iterations = 20
    step = {"wire": run.confidence_floats(), "operations": run.confidence_operations()}
    rows = [
        ["N", f"{run.support:,}"],
        ["a plan: bytes a rank hands to collectives", f"{FLOAT * run.plan_floats(iterations) / 2**20:.1f} MiB"],
        ["a plan: operations of the first rank, of another",
         f"{(run.plan_operations(True) + run.kernel_operations(iterations)) / 1e9:.0f} and "
         f"{(run.plan_operations() + run.kernel_operations(iterations)) / 1e9:.1f} GFLOP"],
        ["a plan: working memory (the first rank: the whole cost as well)",
         f"{run.working_memory() / 2**20:.1f} MiB (and {FLOAT * run.support**2 / 2**20:.0f} MiB)"],
        ["a step: confidence, operations", f"{step['operations'] / 1e9:.1f} GFLOP"],
        ["a step: CLIP's own logits, operations", f"{run.clip_operations() / 1e9:.1f} GFLOP"],
        ["a step: confidence, bytes a rank hands over", f"{FLOAT * step['wire']} bytes"],
        ["a step: CLIP's own features, bytes a rank hands over", f"{FLOAT * run.clip_floats() / 2**20:.1f} MiB"],
        ["a step with λ > 0: operations, forward", f"{run.transport_operations() / 1e9:.1f} GFLOP"],
        ["a step with λ > 0: bytes a rank hands over", f"{FLOAT * run.transport_floats() / 2**20:.1f} MiB"],
        ["memory that stays: four plans and the window", f"{run.memory() / 2**20:.0f} MiB"],
    ]  # fmt: skip
    return (
        "## Read off: a global batch of 32,768 on 256 GPUs\n\nB = 128, W = 256, Δ = 8, d = 1,024, the cap of 8,192 "
        f"pairs, {iterations} Sinkhorn iterations. A calculation, not a measurement.\n\n"
        + table(["what", "a rank"], rows)
    )


def picture(found: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    strong, weak = figure.subplots(1, 2)
    for axes, title, size in (
        (strong, f"strong scaling: N = {STRONG}", lambda w: STRONG),
        (weak, f"weak scaling: N = {WEAK} a rank", lambda w: WEAK * w),
    ):
        for label, key, rank in (
            ("wall clock, shared cores", "seconds", 0),
            ("CPU time, first rank", "busy", 0),
            ("CPU time, another rank", "busy", -1),
        ):
            points = [statistics.median(found["plans"][str(w)][rank][str(size(w))][key]) for w in WORLDS]
            axes.plot(WORLDS, points, marker="o", label=label)
        axes.set(title=title, xlabel="ranks", ylabel="seconds a plan", ylim=(0, None), xticks=WORLDS)
    strong.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder for what is measured")
    parser.add_argument("--repeats", type=int, default=5, help="plans timed at each number of ranks")
    parser.add_argument("--blocks", type=int, default=9, help="turns of 8 steps of each loss")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__}
    page = [f"Made by `python benchmarks/scaling.py` with torch {torch.__version__} on {os.cpu_count()} cores."]
    for section in (
        lambda: plans_section(args.out, args.repeats, found),
        lambda: steps_section(args.out, args.blocks, found),
        lambda: model_section(found),
    ):
        page.append(section())
        print(page[-1], flush=True)
        (args.out / "scaling.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
        (args.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture(found, args.out / "scaling.png")


if __name__ == "__main__":
    main()
