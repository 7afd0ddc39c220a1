"""Solvers compared with other packages: `python benchmarks/solvers.py --out runs/bench` (or `make bench`).

Every ratio comes from one process, in which the solvers take turns; each number is the median of its runs. Writes
`solvers.json` (all runs), `solvers.md` (the tables) and `solvers.png` (time against N).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.ot import CosineCost, combinatorial_plan, sinkhorn
from openclip_otco.ot.cost import TILE_ELEMENTS
from openclip_otco.pages.markdown import markdown_table

# A folder with flickr8k-epoch01.safetensors and flickr8k-epoch10.safetensors, each with `image` and `text`, `(n, d)`.
FEATURES = Path(named) if (named := os.environ.get("OPENCLIP_OTCO_FEATURES")) else None
EPOCHS = ("epoch01", "epoch10")
TOL = 1e-3
DELTA = 0.005

Seconds = dict[str, list[float]]


def features(epoch: str, n: int, folder: Path | None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """`(n, d)` image and text features: trained ones from the folder, or clustered random ones without it."""
    if folder is None:
        generator = torch.Generator().manual_seed(EPOCHS.index(epoch))
        centres = torch.randn(n // 5 + 1, 512, generator=generator)
        cluster = torch.randint(len(centres), (n,), generator=generator)
        return tuple(F.normalize(centres[cluster] + torch.randn(n, 512, generator=generator)) for _ in range(2))  # type: ignore[return-value]
    from safetensors.torch import load_file

    load = {e: load_file(folder / f"flickr8k-{e}.safetensors") for e in EPOCHS}
    first, second = load[epoch], load[EPOCHS[1 - EPOCHS.index(epoch)]]
    # If one epoch has too few: those of the other epoch, and then points half way between the two.
    pools = [[x[side].float() for x in (first, second)] for side in ("image", "text")]
    return tuple(torch.cat([pool[0], pool[1], F.normalize(pool[0] + pool[1])])[offset : offset + n] for pool in pools)  # type: ignore[return-value]


def race(contenders: Mapping[str, Callable[[], object]], repeats: int, slow: float = math.inf) -> Seconds:
    """Seconds of each contender in `repeats` rounds, in which all take turns, after one run of each to warm up.

    A contender that needs more than `slow` seconds to warm up runs only once more.
    """
    seconds: Seconds = {name: [] for name in contenders}
    warm = {}
    for round_ in range(repeats + 1):
        for name, run in contenders.items():
            if round_ > 1 and warm[name] > slow:
                continue
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
            if round_:
                seconds[name].append(took)
            else:
                warm[name] = took
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, rows, words=head[:1])


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def combinatorial_section(n: int, repeats: int, folder: Path | None, out: dict) -> str:
    import ot as pot
    from scipy.optimize import linear_sum_assignment

    rows = []
    for epoch in EPOCHS:
        x, y = features(epoch, n, folder)
        matrix = 1 - x @ y.T
        array = matrix.numpy()
        double, uniform = array.astype(np.float64), np.full(n, 1 / n)
        seconds = race(
            {
                "combinatorial_plan": lambda m=matrix: combinatorial_plan(m, DELTA),
                "combinatorial_plan, from features": lambda x=x, y=y: combinatorial_plan(CosineCost(x, y), DELTA),
                "scipy linear_sum_assignment": lambda c=array: linear_sum_assignment(c),
                "POT emd": lambda c=double, u=uniform: pot.emd(u, u, c, numItermax=10**7),
            },
            repeats,
        )
        plan = combinatorial_plan(matrix, DELTA)
        i, j = linear_sum_assignment(array)
        optimum, spread = float(double[i, j].mean()), float(np.ptp(double))
        excess = (plan.value - optimum) / spread
        out[f"combinatorial {epoch}"] = {
            "n": n, "delta": DELTA, "seconds": seconds, "value": plan.value, "optimum": optimum, "rounds": plan.rounds,
            "excess_share_of_range": excess, "proven": plan.additive_error,
        }  # fmt: skip
        ours = median(seconds["combinatorial_plan"])
        for name, runs in seconds.items():
            mine = name.startswith("combinatorial")
            value = f"{100 * (plan.value / optimum - 1):.2f} %" if mine else "0"
            rows.append([epoch, name, ms(median(runs)), f"{median(runs) / ours:.1f}", value])
        rows[-4][-1] += f" (of δ: {excess / DELTA:.2f}, proven {plan.additive_error / DELTA:.2f})"
    head = ["features", f"N = {n}, δ = {DELTA}", "ms", "times ours", "above the optimum"]
    return "## Combinatorial plan\n\n" + table(head, rows)


def l1_error(plan: np.ndarray) -> float:
    n, m = plan.shape
    return float(
        np.abs(plan.sum(1, dtype=np.float64) - 1 / n).sum() + np.abs(plan.sum(0, dtype=np.float64) - 1 / m).sum()
    )


def fewest(run: Callable[[int], np.ndarray], limit: int = 4096) -> int:
    """The least number of iterations, to within a tenth, after which the plan's marginals have an error of `TOL`."""
    high = 4
    while high < limit and l1_error(run(high)) > TOL:
        high *= 2
    low = high // 2
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if l1_error(run(middle)) <= TOL else (middle, high)
    return high


def sinkhorn_contenders(
    x: Tensor, y: Tensor, matrix: Tensor, epsilon: float, slow: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The contenders, and notes on the settings and the error of each other package."""
    import ot as pot

    n = len(matrix)
    array, uniform = matrix.numpy(), np.full(n, 1 / n, dtype=np.float32)

    def pots(method: str, torch_backend: bool) -> Callable[[int], np.ndarray]:
        cost, mass = (matrix, torch.from_numpy(uniform)) if torch_backend else (array, uniform)

        def run(iterations: int) -> np.ndarray:
            plan = pot.sinkhorn(
                mass, mass, cost, epsilon, method=method, numItermax=iterations, stopThr=0.0, warn=False
            )
            return np.asarray(plan)

        return run

    contenders: dict[str, Callable[[], object]] = {"sinkhorn (ours)": lambda: sinkhorn(matrix, epsilon, tol=TOL)}
    notes: dict[str, str] = {}
    iterations = fewest(pots("sinkhorn", False))
    variants = [("sinkhorn", False), ("sinkhorn", True)]
    if slow:
        variants += [("sinkhorn_stabilized", False), ("sinkhorn_log", False), ("sinkhorn_log", True)]
    for method, torch_backend in variants:
        run = pots(method, torch_backend)
        name = f"POT {method}, {'torch' if torch_backend else 'NumPy'}"
        contenders[name] = lambda run=run: run(iterations)
        notes[name] = f"{iterations} iterations, error {l1_error(run(iterations)):.1e}"
    try:
        add_geomloss(contenders, notes, x, y, matrix, epsilon)
    except ImportError:
        notes["geomloss"] = "not installed"
    if slow:
        try:
            add_ott(contenders, notes, array, epsilon)
        except ImportError:
            notes["OTT-JAX"] = "not installed"
    return contenders, notes


def add_geomloss(contenders: dict, notes: dict, x: Tensor, y: Tensor, matrix: Tensor, epsilon: float) -> None:
    """GeomLoss: its cost `|x - y|²/2` is ours for unit vectors, its blur is `√ε`. Slower ε-scaling takes more steps."""
    from geomloss import SamplesLoss

    def solver(scaling: float) -> Callable[[], object]:
        loss = SamplesLoss(
            "sinkhorn", p=2, blur=math.sqrt(epsilon), scaling=scaling, debias=False, potentials=True,
            backend="tensorized",
        )  # fmt: skip
        return lambda: loss(x, y)

    best: tuple[float, Callable[[], object]] | None = None
    for scaling in (0.5, 0.8, 0.9):
        run = solver(scaling)
        f, g = (p.flatten().double() for p in run())  # type: ignore[attr-defined]
        error = l1_error(((f[:, None] + g - matrix) / epsilon).exp().div(matrix.numel()).numpy())
        if best is None or error < best[0]:
            best = error, run
            notes["geomloss, tensorized"] = f"scaling {scaling}, error {error:.1e}"
        if error <= TOL:
            break
    assert best is not None
    contenders["geomloss, tensorized"] = best[1]


def add_ott(contenders: dict, notes: dict, array: np.ndarray, epsilon: float) -> None:
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    cost = jax.numpy.asarray(array)
    settings = {
        "kernel": {"lse_mode": False},
        "log domain, Anderson": {"lse_mode": True, "anderson": acceleration.AndersonAcceleration(memory=5)},
    }
    for name, setting in settings.items():
        solver = ott_sinkhorn.Sinkhorn(threshold=TOL, max_iterations=2000, **setting)

        @jax.jit
        def run(cost, solver=solver):
            return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=epsilon)))

        result = run(cost)
        notes[f"OTT-JAX, {name}"] = f"{int(result.n_iters)} iterations, error {l1_error(np.asarray(result.matrix)):.1e}"
        contenders[f"OTT-JAX, {name}"] = lambda run=run: jax.block_until_ready(run(cost).f)


def sinkhorn_section(n: int, repeats: int, folder: Path | None, slow: bool, out: dict) -> str:
    rows, floors = [], []
    for epoch in EPOCHS[::-1]:
        x, y = features(epoch, n, folder)
        matrix = 1 - x @ y.T
        for epsilon in (0.05, 0.02):
            contenders, notes = sinkhorn_contenders(x, y, matrix, epsilon, slow and epoch == EPOCHS[1])
            contenders["floor: exponential pass"] = lambda m=matrix: torch.exp(m)
            contenders["floor: read"] = lambda m=matrix: m.sum()
            seconds = race(contenders, repeats, slow=1.5)
            result = sinkhorn(matrix, epsilon, tol=TOL)
            notes["sinkhorn (ours)"] = f"{result.iterations} iterations, error {result.marginal_error:.1e}"
            exponential, read = (median(seconds.pop(f"floor: {name}")) for name in ("exponential pass", "read"))
            floor = exponential + (2 * result.iterations + 1) * read
            ours = median(seconds["sinkhorn (ours)"])
            out[f"sinkhorn {epoch} {epsilon}"] = {
                "n": n, "epsilon": epsilon, "seconds": seconds, "notes": notes, "exponential_pass": exponential,
                "read": read, "floor": floor, "iterations": result.iterations, "error": result.marginal_error,
            }  # fmt: skip
            for name, runs in seconds.items():
                rows.append([epoch, str(epsilon), name, ms(median(runs)), f"{median(runs) / ours:.2f}", notes[name]])
            floors.append(
                [f"{epoch}, {epsilon}", ms(exponential), f"{1e3 * read:.2f}", str(2 * result.iterations + 1),
                 ms(floor), ms(ours), f"{ours / floor:.2f}"]
            )  # fmt: skip
    head = ["features", "ε", f"N = {n}, L1 error {TOL:g}", "ms", "times ours", "setting"]
    floor_head = [
        "features, ε",
        "exponential pass, ms",
        "one read, ms",
        "reads",
        "floor, ms",
        "ours, ms",
        "times floor",
    ]
    return (
        "## Sinkhorn\n\n" + table(head, rows) + "\n\nThe floor: one exponential pass into new memory, and the reads of "
        "the matrix that the iterations make, at the speed of a sum.\n\n" + table(floor_head, floors)
    )


def profile_section(n: int, repeats: int, folder: Path | None, out: dict) -> str:
    """Where the time of a Sinkhorn solve goes."""
    from openclip_otco.ot.anderson import Anderson
    from openclip_otco.ot.cost import DenseCost
    from openclip_otco.ot.group import ALONE
    from openclip_otco.ot.half_steps import KernelHalfSteps
    from openclip_otco.ot.sparse_plan import feasible_duals

    x, y = features(EPOCHS[1], n, folder)
    matrix = 1 - x @ y.T
    mass, g, epsilon = torch.full((n,), 1 / n), torch.zeros(n), 0.02
    cost = DenseCost(matrix)
    half_steps = KernelHalfSteps(cost, g, epsilon, mass, mass, ALONE)
    kernel = half_steps.kernel
    f = half_steps.exact_rows(g)
    acceleration = Anderson(mass)
    points = [f + 1e-3 * torch.rand(n) for _ in range(8)]
    seconds = race(
        {
            "range of the cost, which finds NaN": lambda: DenseCost(matrix),
            "feasible duals": lambda: feasible_duals(cost, g),
            "duals and kernel": lambda: KernelHalfSteps(cost, g, epsilon, mass, mass, ALONE),
            "an iteration": lambda: half_steps.step(f),
            "its two products, `torch.mv`": lambda: (torch.mv(kernel, mass), torch.mv(kernel.T, mass)),
            "the same two reads, `sum`": lambda: (kernel.sum(), kernel.sum()),
            "acceleration": lambda: [acceleration.next(p, 0.9 * p, 1.0) for p in points],
        },
        4 * repeats,
    )
    seconds["acceleration"] = [s / len(points) for s in seconds["acceleration"]]
    out["profile"] = {"n": n, "epsilon": epsilon, "seconds": seconds}
    rows = [[name, f"{1e3 * median(runs):.2f}"] for name, runs in seconds.items()]
    return f"## Where the time of a solve goes, ε = {epsilon}\n\n" + table([f"N = {n}", "ms"], rows)


def iterations_section(n: int, folder: Path | None, out: dict) -> str:
    import ot as pot

    rows = []
    uniform = np.full(n, 1 / n, dtype=np.float32)
    for epoch in EPOCHS:
        x, y = features(epoch, n, folder)
        # Another window of the same model, half of it other pairs.
        past_x, past_y = features(epoch, n, folder, offset=n // 2 if n // 2 + n <= 7000 else 7000 - n)
        matrix = 1 - x @ y.T
        array = matrix.numpy()
        initial = combinatorial_plan(matrix, DELTA)
        for epsilon in (0.1, 0.05, 0.02):
            past = sinkhorn(CosineCost(past_x, past_y), epsilon, tol=TOL)
            carried = TransportPlan(past_x, past_y, past.f, past.g, epsilon).text_potential(y)

            def pots(iterations: int, array: np.ndarray = array, epsilon: float = epsilon) -> np.ndarray:
                return pot.sinkhorn(
                    uniform, uniform, array, epsilon, method="sinkhorn", numItermax=iterations, stopThr=0.0, warn=False
                )

            plain = fewest(pots)
            starts = {"zero": None, "combinatorial": initial, "previous plan": (torch.zeros_like(carried), carried)}
            counts = {name: sinkhorn(matrix, epsilon, init=start, tol=TOL).iterations for name, start in starts.items()}
            out[f"iterations {epoch} {epsilon}"] = {"n": n, "plain": plain, **counts}
            share = min(counts["combinatorial"], counts["previous plan"]) / plain
            rows.append([f"{epoch}, ε = {epsilon}", str(plain), *map(str, counts.values()), f"{share:.2f}"])
    head = [
        f"N = {n}",
        "plain, from zero",
        "from zero",
        "from the combinatorial plan",
        "from the previous plan",
        "best warm start / plain",
    ]
    return "## Iterations to an L1 error of 1e-3\n\nAll but the first column with acceleration.\n\n" + table(head, rows)


def update_section(n: int, repeats: int, folder: Path | None, out: dict) -> str:
    """A plan update with everything that is logged, and a training step to compare with."""
    import timm
    from transformers import BertConfig, BertModel

    batch, window = 128, 8
    contenders: dict[str, Callable[[], object]] = {}
    for size in (batch * window, n):
        x, y = features(EPOCHS[1], size, folder)
        past = features(EPOCHS[1], size, folder, offset=min(size // 2, 7000 - size))
        for initial in ("combinatorial", "previous", "none"):
            solver = PlanSolver(epsilon=0.1, initial_plan=initial, additive_error=DELTA)
            previous = solver.solve(*past)
            contenders[f"{size} {initial}"] = lambda s=solver, x=x, y=y, p=previous: s.solve(x, y, previous=p)
    image = timm.create_model("resnet18", num_classes=512)
    text = BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        add_pooling_layer=False,
    )
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters()])
    pixels, tokens = torch.randn(batch, 3, 128, 128), torch.randint(0, 30000, (batch, 32))

    def training_step() -> None:
        v, t = F.normalize(image(pixels)), F.normalize(text(tokens).last_hidden_state.mean(1))
        (F.cross_entropy(20 * v[:, :384] @ t.T, torch.arange(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = race(contenders, repeats)
    seconds["training step"] = race({"step": training_step}, 3)["step"]
    step = median(seconds["training step"])
    out["update"] = {"seconds": seconds, "batch": batch, "window": window, "epsilon": 0.1}
    rows = []
    for name in contenders:
        size, initial = name.split()
        # A window of N pairs is N / batch steps of training.
        share = median(seconds[name]) / (int(size) / batch * step)
        rows.append([size, initial, f"{median(seconds[name]):.3f}", f"{100 * share:.2f} %"])
    head = ["N", "`--otco-initial-plan`", "seconds", "share of the training time of its window"]
    return (
        f"## A whole update, d = 512, ε = 0.1\n\nFrom features to plan, with the drift and all diagnostics. The "
        f"training time is that of resnet18 at 128 px with a 6-layer BERT, {step:.2f} s for a step of {batch} pairs "
        f"({batch / step:.0f} pairs/s).\n\n" + table(head, rows)
    )


def memory_section(n: int, folder: Path | None, out: dict) -> str:
    """The memory of a plan, measured as the peak of a process of its own."""
    command = [sys.executable, __file__, "--memory", str(n), *(["--features", str(folder)] if folder else [])]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    out["memory"] = measured
    head = [f"streaming, N = {n}, d = 512, ε = 0.05", "peak above the inputs, MiB", "seconds", "iterations"]
    rows = [[k, f"{v['mib']:.0f}", f"{v['seconds']:.1f}", str(v["iterations"])] for k, v in measured.items()]
    matrix = n * n * 4 / 2**20
    return f"## Memory\n\nThe float32 matrix alone would be {matrix:.0f} MiB.\n\n" + table(head, rows)


def measure_memory(n: int, folder: Path | None) -> None:
    x, y = features(EPOCHS[1], n, folder)

    def peak(reset: bool) -> float:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10

    CosineCost(x[:256], y[:256]).rows(
        slice(0, 256)
    )  # the first product loads libraries, which are not the solver's memory
    runs: dict[str, dict[str, float]] = {}
    for name in ("combinatorial plan", "whole update"):
        before, started = peak(reset=True), time.perf_counter()
        if name == "combinatorial plan":
            iterations = combinatorial_plan(CosineCost(x, y), DELTA).rounds
        else:
            plan = PlanSolver(epsilon=0.05, additive_error=DELTA).solve(x, y)
            iterations = int(plan.diagnostics["iterations"])
        seconds = time.perf_counter() - started
        runs[name] = {"mib": peak(reset=False) - before, "seconds": seconds, "iterations": iterations}
    print(json.dumps(runs))


def growth_section(largest: int, folder: Path | None, out: dict, picture: Path) -> str:
    import ot as pot
    from matplotlib.figure import Figure
    from scipy.optimize import linear_sum_assignment

    def matrix(x: Tensor, y: Tensor) -> np.ndarray:
        return (1 - x @ y.T).numpy()

    def mass(x: Tensor) -> np.ndarray:
        return np.full(len(x), 1 / len(x))

    def pot_plain(x: Tensor, y: Tensor) -> object:
        u = mass(x).astype(np.float32)
        # As many iterations as N = 4096 needs.
        return pot.sinkhorn(u, u, matrix(x, y), 0.05, numItermax=28, stopThr=0.0, warn=False)

    contenders: dict[str, tuple[int, Callable[[Tensor, Tensor], object]]] = {
        "combinatorial_plan (ours)": (largest, lambda x, y: combinatorial_plan(CosineCost(x, y), DELTA)),
        "sinkhorn (ours)": (largest, lambda x, y: sinkhorn(CosineCost(x, y), 0.05, tol=TOL)),
        "scipy linear_sum_assignment": (8192, lambda x, y: linear_sum_assignment(matrix(x, y))),
        "POT emd": (4096, lambda x, y: pot.emd(mass(x), mass(x), matrix(x, y).astype(np.float64), numItermax=10**7)),
        "POT sinkhorn, 28 iterations": (8192, pot_plain),
    }
    sizes = [512 * 2**k for k in range(int(math.log2(largest // 512)) + 1)]
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in contenders}
    for n in sizes:
        x, y = features(EPOCHS[1], n, folder)
        for name, (limit, run) in contenders.items():
            if n <= limit:
                seconds[name][n] = []
                for _ in range(5 if n <= 4096 else 1):
                    started = time.perf_counter()
                    run(x, y)
                    seconds[name][n].append(time.perf_counter() - started)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="N", ylabel="seconds, from features")
    rows = []
    for name, runs in seconds.items():
        points = [(n, median(runs[n])) for n in runs]
        slope = float(np.polyfit(*np.log(np.array(points)).T, 1)[0]) if len(points) > 1 else math.nan
        axes.plot(*zip(*points, strict=True), marker="o", linestyle="-" if "ours" in name else "--", label=name)
        rows.append([name, *(f"{median(runs[n]):.3f}" if n in runs else "" for n in sizes), f"{slope:.2f}"])
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(picture, dpi=120)
    out["growth"] = {name: {str(n): runs[n] for n in runs} for name, runs in seconds.items()}
    return (
        "## Time against N\n\nSeconds from features, the matrix included; δ = 0.005, ε = 0.05. The last column is the "
        "exponent of a power of N fitted to them.\n\n" + table(["", *map(str, sizes), "exponent"], rows)
    )


def setting(folder: Path | None) -> dict[str, str]:
    names = ("torch", "numpy", "scipy", "POT", "geomloss", "ott-jax")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        **versions,
        "Python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "features": "trained" if folder else "synthetic clusters",
        "tile": f"{TILE_ELEMENTS} entries",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for what is measured")
    parser.add_argument(
        "--features",
        type=Path,
        default=FEATURES,
        help="folder of trained features (default: $OPENCLIP_OTCO_FEATURES, else clustered features are made)",
    )
    parser.add_argument("--points", type=int, default=4096, help="N of all sections but growth and memory")
    parser.add_argument("--largest", type=int, default=16384, help="largest N of growth and memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="measure these sections anew")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return measure_memory(args.memory, args.features)
    args.out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Callable[[dict], str]] = {
        "combinatorial": lambda out: combinatorial_section(args.points, args.repeats, args.features, out),
        "sinkhorn": lambda out: sinkhorn_section(args.points, args.repeats, args.features, True, out),
        "profile": lambda out: profile_section(args.points, args.repeats, args.features, out),
        "iterations": lambda out: iterations_section(args.points, args.features, out),
        "update": lambda out: update_section(args.points, args.repeats, args.features, out),
        "memory": lambda out: memory_section(args.largest, args.features, out),
        "growth": lambda out: growth_section(args.largest, args.features, out, args.out / "solvers.png"),
    }
    if unknown := set(args.only) - set(sections):
        parser.error(f"argument --only: no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    file = args.out / "solvers.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, section in sections.items():
        if args.only and name not in args.only:
            continue
        out: dict[str, object] = {"setting": setting(args.features)}
        text = section(out)
        found[name] = {"text": text, **out}
        print(text, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    made = ", ".join(f"{k} {v}" for k, v in setting(args.features).items())
    page = [f"Made by `python benchmarks/solvers.py` with {made}."]
    page += [found[name]["text"] for name in sections if name in found]
    (args.out / "solvers.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nPeak memory of all that: {used:.1f} GiB. Written: {args.out}/solvers.md, solvers.json, solvers.png")


if __name__ == "__main__":
    main()
