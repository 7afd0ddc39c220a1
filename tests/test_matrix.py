"""OTCO in OpenCLIP's training loop, under all that may be combined: the axes are below.

By default a covering design is run: each value of an axis meets each value of every other axis in at least one cell.
`make test-matrix` runs the full cross. Each number of ranks is one group of gloo processes that goes through its cells:
the same weights, the same global batches, four steps, a plan after the second that acts in the other two. What a cell
ends with is compared with one rank, one batch a step, fp32, eager.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import traceback
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from forks import PATIENCE, start_ranks
from torch import Tensor, nn

from openclip_otco.method.features import Features
from openclip_otco.train.callback import PlanCacheCallback

STEPS, WINDOW, PAIRS = 4, 2, 128
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
OTCO = ("--loss", "otco", "--otco-window", str(WINDOW), "--otco-warmup", "0", "--otco-transport-weight", "0.5")
TRUSTS = {
    "share": (
        "--otco-trust",
        "share",
        "--otco-epsilon",
        "0.1",
        "--otco-confidence",
        "0.5",
        "--otco-least-share",
        "0.5",
    ),
    "posterior": (),  # the defaults
}
WORLDS = (1, 2, 4)
BOTH = (False, True)
# Number of ranks; then the fields of a cell.
AXES = (WORLDS, BOTH, BOTH, (1, 2), ("fp32", "amp", "amp_bf16", "bf16"), BOTH, tuple(TRUSTS))
# How far losses may lie from those of fp32, and how far features and the way that the weights went; all relative.
WITHIN = {"fp32": (1e-6, 1e-5), "amp": (5e-3, 0.03), "amp_bf16": (2e-2, 0.1), "bf16": (3e-2, 0.25)}
# A small epsilon magnifies what rounding leaves between the potentials of one rank and of several.
WITHIN_POSTERIOR = WITHIN | {"fp32": (1e-5, 1e-4)}
# Features of other pairs lie farther apart than this.
APART = 0.1


@dataclass(frozen=True)
class Cell:
    local_loss: bool
    gather_with_grad: bool
    accum: int
    precision: str
    compiled: bool
    trust: str

    def name(self) -> str:
        switches = {"local": self.local_loss, "grad": self.gather_with_grad, "compiled": self.compiled}
        names = [name for name, on in switches.items() if on]
        return "-".join([self.precision, self.trust, f"accum{self.accum}", *names])

    def flags(self) -> list[str]:
        flags = ["--device", "cpu", "--precision", self.precision, "--accum-freq", str(self.accum)]
        chosen = {"--local-loss": self.local_loss, "--gather-with-grad": self.gather_with_grad}
        return flags + [flag for flag, given in chosen.items() if given]


PLAIN = {trust: Cell(False, False, 1, "fp32", False, trust) for trust in TRUSTS}
COVERING = {tuple(case) for case in AllPairs(AXES)}
CASES = [
    pytest.param(
        world, cell, id=f"{cell.name()}-{world}", marks=[] if (world, *astuple(cell)) in COVERING else pytest.mark.full
    )
    for world, *values in itertools.product(*AXES)
    for cell in [Cell(*values)]
]


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    moved: Tensor
    plans: list[dict[str, Any]]
    digests: list[str]
    skipped: int


@dataclass(frozen=True)
class Gradients:
    """What OpenCLIP's ways of gathering and accumulating make of the gradients, so that one rank can do the same.

    Without `--gather-with-grad` a rank's own rows alone carry gradients, of which DDP takes the mean: a share of the
    whole. With `--local-loss` beside it the texts that a picture is compared with carry none at all, nor the pictures
    of a text. Each accumulated batch adds the whole batch's gradient of the logit scale.
    """

    features: float = 1.0
    logit_scale: float = 1.0
    gallery: bool = True

    @classmethod
    def of(cls, cell: Cell, world: int) -> Gradients:
        alone = world == 1 or cell.gather_with_grad
        return cls(
            features=1.0 if alone or cell.local_loss else 1 / world,
            logit_scale=cell.accum,
            gallery=alone or not cell.local_loss,
        )

    @contextlib.contextmanager
    def on(self, model: nn.Module, loss: Any) -> Iterator[None]:
        if self == Gradients():
            yield
            return

        def scale(module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
            factors = {"image_features": self.features, "text_features": self.features, "logit_scale": self.logit_scale}
            return {key: value * factors[key] + (value * (1 - factors[key])).detach() for key, value in output.items()}

        if not self.gallery:
            loss.local_loss = True
            loss._gather = lambda local: Features(local.images.detach(), local.texts.detach())
        handle = model.register_forward_hook(scale)
        yield
        handle.remove()


class Loader(list):
    """Batches, and what the training loop asks a loader of OpenCLIP for."""

    num_samples = STEPS * PAIRS

    @property
    def num_batches(self) -> int:
        return len(self)


class Data:
    def __init__(self, batches: list[Any]) -> None:
        self.dataloader = Loader(batches)

    def set_epoch(self, epoch: int) -> None:
        pass


class Group:
    """This rank among `world` of them: its models, and runs of OpenCLIP's loop."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.models: dict[tuple[str, bool], tuple[nn.Module, nn.Module]] = {}
        generator = torch.Generator().manual_seed(1)
        # Captions that say something about their pictures, or no plan would be more than a guess.
        self.texts = torch.randint(1, 63, (STEPS * PAIRS, 8), generator=generator)
        self.texts[:, -1] = 63
        seen = torch.randn(64, 3 * 16 * 16, generator=generator)[self.texts].mean(1)
        self.images = seen.view(-1, 3, 16, 16) + 0.1 * torch.randn(STEPS * PAIRS, 3, 16, 16, generator=generator)

    def batches(self, accum: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's, so that the rows of a step are those of one rank and one batch, in the same order."""
        mine = []
        for images, texts in zip(self.images.split(PAIRS), self.texts.split(PAIRS), strict=True):
            part = images.chunk(self.world)[self.rank].chunk(accum), texts.chunk(self.world)[self.rank].chunk(accum)
            mine += list(zip(*part, strict=True))
        return mine

    def model(self, precision: str, compiled: bool) -> tuple[nn.Module, nn.Module]:
        """The model as `main` wraps it, and the bare one; the same weights each time, and compiled once."""
        from open_clip import CLIP
        from open_clip.model import convert_weights_to_lp

        torch.manual_seed(0)
        fresh = CLIP(**MODEL, output_dict=True)
        if precision == "bf16":
            convert_weights_to_lp(fresh, torch.bfloat16)
        if (precision, compiled) not in self.models:
            wrapped: nn.Module = fresh
            if self.world > 1:
                wrapped = nn.parallel.DistributedDataParallel(fresh)
            if compiled:
                # Dynamo decides where graphs break; what compiles them afterwards would only take longer.
                wrapped = torch.compile(wrapped, backend="eager")  # type: ignore[assignment]
            self.models[precision, compiled] = wrapped, fresh
        wrapped, bare = self.models[precision, compiled]
        bare.load_state_dict(fresh.state_dict())
        return wrapped, bare

    def run(
        self,
        cell: Cell,
        loss_flags: tuple[str, ...] | None = None,
        like: Gradients = Gradients(),
        grad_checkpointing: bool = False,
    ) -> Outcome:
        """OpenCLIP's loop over all steps, with its gradients changed as `like` says."""
        from open_clip import create_loss
        from open_clip_train import params, train
        from open_clip_train.plugins import create_callbacks, get_loss_plugin

        if loss_flags is None:
            loss_flags = (*OTCO, *TRUSTS[cell.trust])
        args = params.parse_args(["--model", "RN50", "--lr", "0.01", *cell.flags(), *loss_flags])
        args.rank, args.local_rank, args.world_size = self.rank, self.rank, self.world
        args.distributed, args.distill, args.wandb, args.log_every_n_steps = self.world > 1, False, False, 1
        model, bare = self.model(cell.precision, cell.compiled)
        bare.set_grad_checkpointing(grad_checkpointing)
        start = torch.cat([p.detach().float().flatten() for p in bare.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if cell.precision == "amp" else None
        plugin = get_loss_plugin(args)
        loss: Any = create_loss(args) if plugin is None else plugin.create_loss(args)
        callbacks = create_callbacks(args, loss)
        recorder = Recorder()
        for callback in callbacks:
            callback.on_train_start(step=0, total_steps=STEPS, writer=None)
        with like.on(bare, loss):
            train.train_one_epoch(
                model, {"train": Data(self.batches(cell.accum))}, loss, 0, optimizer, scaler, lambda step: None, None,
                args, callbacks=[*callbacks, recorder],
            )  # fmt: skip
        moved = torch.cat([p.detach().float().flatten() for p in bare.parameters()]) - start
        if not callbacks:
            return Outcome(recorder.losses, moved, [], [], 0)
        (hook,) = callbacks
        assert isinstance(hook, PlanCacheCallback)
        plans = [hook.cache[step] for step in hook.cache]
        return Outcome(
            recorder.losses, moved, [plan.state_dict() for plan in plans], [p.digest() for p in plans], hook.skipped
        )


class Recorder:
    """A callback that keeps each step's loss, averaged over the ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, *, losses: dict[str, Tensor], **_: object) -> None:
        total = losses["loss"].detach().float().clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        self.losses.append(float(total))


def _rank(rank: int, world: int, folder: Path, script: Path, cells: list[Cell]) -> None:
    sys.path.insert(0, str(script))
    torch.set_num_threads(1)
    # One model per precision, each traced with and without gradients, for several batch sizes.
    torch._dynamo.config.recompile_limit = 64
    logging.disable(logging.INFO)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/store", world_size=world, rank=rank, timeout=timedelta(seconds=PATIENCE)
        )
    group = Group(rank, world)
    out: dict[Any, Any] = {}
    with contextlib.redirect_stdout(None):
        for cell in cells:
            try:
                out[cell] = group.run(cell)
            except Exception:
                out[cell] = traceback.format_exc()
        out["plain"] = group.run(PLAIN["posterior"])
        out["checkpointing"] = group.run(PLAIN["posterior"], grad_checkpointing=True)
        if world == 1:
            for trust, plain in PLAIN.items():
                for like in {Gradients.of(cell, ranks) for ranks, cell in (case.values for case in CASES)}:
                    out[like, trust] = group.run(plain, like=like)
    torch.save(out, folder / f"{rank}.pt")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def matrix(
    request: pytest.FixtureRequest, patched: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[Any, Any]]]:
    """What each rank of each number of ranks ended with, by cell; of the cells that this session was asked for."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    found = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"matrix-{world}")
        cells = [params["cell"] for params in asked if "cell" in params and params["world"] == world]
        start_ranks(_rank, world, folder, patched, cells)
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return found


def test_each_value_meets_each_value_of_every_other_axis() -> None:
    for first, second in itertools.combinations(range(len(AXES)), 2):
        met = {(case[first], case[second]) for case in COVERING}
        assert met == set(itertools.product(AXES[first], AXES[second]))
    assert len(COVERING) < 20


@pytest.mark.training
@pytest.mark.parametrize(("world", "cell"), CASES)
def test_every_cell_trains_as_one_rank_does(matrix: dict[int, list[dict[Any, Any]]], world: int, cell: Cell) -> None:
    outcomes = [rank[cell] for rank in matrix[world]]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not failures, failures[0]
    assert all(outcome.skipped == 0 and len(outcome.plans) == STEPS // WINDOW for outcome in outcomes)
    assert len({tuple(outcome.digests) for outcome in outcomes}) == 1
    assert all(torch.equal(outcome.moved, outcomes[0].moved) for outcome in outcomes)

    reference = matrix[1][0][Gradients.of(cell, world), cell.trust]
    within, way = (WITHIN if cell.trust == "share" else WITHIN_POSTERIOR)[cell.precision]
    assert outcomes[0].losses == pytest.approx(reference.losses, rel=within)
    assert _apart(outcomes[0].moved, reference.moved) <= way
    for ours, theirs in zip(outcomes[0].plans, reference.plans, strict=True):
        for key in ("image_features", "text_features"):
            # Each step's pairs once, in the same order: another order would show.
            assert _apart(ours[key], theirs[key]) <= min(way, APART) < _apart(theirs[key].roll(1, 0), theirs[key])


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.training
@pytest.mark.parametrize("world", WORLDS)
def test_checkpointed_gradients_change_nothing(matrix: Any, world: int) -> None:
    for rank in matrix[world]:
        plain = rank["plain"]
        assert rank["checkpointing"].losses == pytest.approx(plain.losses, rel=1e-6)
        torch.testing.assert_close(rank["checkpointing"].moved, plain.moved, rtol=0, atol=1e-6)
