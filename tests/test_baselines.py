"""The baselines: each loss against its formula, ranks and accumulated batches against one, and through the script."""

from __future__ import annotations

import argparse
import io
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import open_clip
import ot
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import paired_features
from forks import start_ranks
from hook_fixtures import MODEL, Lab, Run, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from test_plugin import OPEN_CLIP
from torch import Tensor

from openclip_otco.baselines import plugin as baselines
from openclip_otco.baselines.callback import MomentumCallback
from openclip_otco.baselines.key_queue import KeyQueue
from openclip_otco.baselines.moco import MoCoLoss
from openclip_otco.baselines.momentum import MomentumEncoders
from openclip_otco.baselines.otter import OTTERLoss
from openclip_otco.baselines.plugin import OPTIONS, BaselinesPlugin
from openclip_otco.baselines.rcl import RCLLoss
from openclip_otco.baselines.simclr import SimCLRLoss
from openclip_otco.baselines.views import RandomViews, SecondView, blur, crop, recolour
from openclip_otco.method.features import Features

SCALE = torch.tensor(14.2857)
PLUGIN = "baselines = openclip_otco.baselines.plugin:BaselinesPlugin"


def tiny_model() -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL, output_dict=True)
    open_clip.set_model_preprocess_cfg(model, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
    return model


def batch(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, 49000, (n, 16), generator=generator)
    texts[:, -1] = 49407  # the end of the text, where its feature is read
    return torch.randn(n, 3, 32, 32, generator=generator), texts


# --- MoCo


@pytest.mark.parametrize("queued", [0, 5, 40])
def test_moco_is_its_formula(queued: int) -> None:
    v, t = paired_features(16, seed=1)
    keys, others = Features(*paired_features(16, seed=2)), Features(*paired_features(queued + 1, seed=3))
    queue = KeyQueue(100)
    if queued:
        queue.add(Features(others.images[:queued], others.texts[:queued]))
    v, t, scale = (x.clone().requires_grad_() for x in (v, t, SCALE))
    losses = MoCoLoss(queue)(v, t, scale, image_keys=keys.images, text_keys=keys.texts, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    losses["contrastive_loss"].backward()

    v64, t64, scale64 = (x.detach().double().requires_grad_() for x in (v, t, scale))
    expected = torch.zeros((), dtype=torch.float64)
    for query, own, rest in ((v64, keys.texts, others.texts), (t64, keys.images, others.images)):
        for i in range(16):
            terms = [query[i] @ own[i].double(), *(query[i] @ rest[j].double() for j in range(queued))]
            logits = scale64 * torch.stack(terms)
            expected = expected + (logits.logsumexp(0) - logits[0]) / 32
    expected.backward()
    torch.testing.assert_close(losses["contrastive_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in ((v, v64), (t, t64), (scale, scale64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 9), max_size=8))
def test_the_queue_keeps_the_newest_pairs_in_order(size: int, batches: list[int]) -> None:
    queue, pushed = KeyQueue(size), []
    for number, length in enumerate(batches):
        keys = torch.arange(length * 2.0).reshape(length, 2) + 100 * number
        queue.add(Features(keys, -keys))
        pushed += keys.tolist()
    assert len(queue) == min(size, len(pushed))
    if batches:
        assert queue.keys.images.tolist() == pushed[-size:]
        assert torch.equal(queue.keys.texts, -queue.keys.images)


def test_a_key_that_is_not_finite_stays_out_of_the_queue() -> None:
    keys = torch.arange(8.0).reshape(4, 2)
    images, texts = keys.clone(), keys.clone()
    images[1, 0], texts[2, 1] = math.nan, math.inf
    queue = KeyQueue(10)
    queue.add(Features(images, texts))
    assert queue.keys.images.tolist() == queue.keys.texts.tolist() == keys[[0, 3]].tolist()


def test_momentum_encoders_follow_and_only_encode_in_training() -> None:
    model = tiny_model()
    names, state = list(model.state_dict()), torch.get_rng_state()
    encoders = MomentumEncoders(model, 0.9)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in encoders.encoder.parameters())
    expected = [p.detach().double().clone() for p in model.parameters()]
    for step in range(3):
        for number, p in enumerate(model.parameters()):
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number)))
            expected[number] = 0.9 * expected[number] + 0.1 * p.detach().double()
        encoders.update()
    for ours, reference in zip(encoders.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)

    images, texts = batch(4)
    output = model.train()(images, texts)
    assert not output["image_keys"].requires_grad
    torch.testing.assert_close(output["image_keys"], F.normalize(encoders.encoder.visual(images), dim=1))
    torch.testing.assert_close(output["text_keys"].norm(dim=1), torch.ones(4))
    assert not torch.allclose(output["image_keys"], output["image_features"], atol=1e-3)
    with torch.no_grad():
        assert set(model.eval()(images, texts)) == {"image_features", "text_features", "logit_scale"}


def moco_callback(model: torch.nn.Module, size: int = 24) -> MomentumCallback:
    return MomentumCallback("moco", MomentumEncoders(model, 0.9), MoCoLoss(KeyQueue(size)))


def moco_steps(callback: MomentumCallback, count: int) -> None:
    model = callback.encoders.model
    for step in range(count):
        callback.loss(**model.train()(*batch(8, seed=step)))
        for p in model.parameters():
            p.data.mul_(0.99)
        callback.on_step_end(step=step, epoch=0, losses={})


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("size", [24, 5, 1000])
def test_the_checkpoint_brings_encoders_and_queue_back(size: int, caplog: pytest.LogCaptureFixture) -> None:
    first = moco_callback(tiny_model())
    moco_steps(first, 4)
    state = saved(first.on_save_checkpoint())
    second = moco_callback(tiny_model(), size)
    with caplog.at_level(logging.INFO):
        second.on_load_checkpoint(state)
    kept = min(size, 24)
    assert f"=> resuming moco with its momentum encoders and {kept} queued pairs" in caplog.text
    assert_equal(second.encoders.state_dict(), first.encoders.state_dict())
    for ours, theirs in zip(second.loss.queue.keys, first.loss.queue.keys, strict=True):
        assert torch.equal(ours, theirs[-kept:])


def test_a_missing_or_broken_state_costs_no_more_than_itself(caplog: pytest.LogCaptureFixture) -> None:
    first = moco_callback(tiny_model())
    moco_steps(first, 2)
    good = first.on_save_checkpoint()
    encoders = dict(good["encoders"])
    encoders.pop("text_projection")
    wrong = [{"images": torch.zeros(3, 16)}, {"images": torch.zeros(3, 16), "texts": torch.zeros(2, 16)}]
    states = [None, {}, {**good, "encoders": encoders}, {"encoders": good["encoders"], "queue": {"images": 3}}]
    for state in [*states, *({**good, "queue": queue} for queue in wrong)]:
        model = tiny_model()
        callback = moco_callback(model)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            callback.on_load_checkpoint(state)
        [line] = caplog.records
        assert "starting with the model's copy and an empty queue" in line.message
        assert line.levelname == ("INFO" if state is None else "WARNING")
        assert len(callback.loss.queue) == 0
        assert_equal(callback.encoders.state_dict(), dict(model.state_dict()))


# --- SimCLR


def test_simclr_is_clip_and_nt_xent() -> None:
    v, t = paired_features(12, seed=1)
    views = F.normalize(v + 0.5 * paired_features(12, seed=2)[0], dim=1)
    v, views = v.requires_grad_(), views.requires_grad_()
    loss = SimCLRLoss(weight=0.7, temperature=0.2)
    losses = loss(v, t, SCALE, view_features=views, output_dict=True)
    assert torch.equal(losses["contrastive_loss"], ClipLoss()(v, t, SCALE))
    losses["simclr_loss"].backward()

    v64, views64 = (x.detach().double().requires_grad_() for x in (v, views))
    z = torch.cat([v64, views64])
    expected = torch.zeros((), dtype=torch.float64)
    for a in range(24):
        others = torch.stack([z[a] @ z[b] / 0.2 for b in range(24) if b != a])
        expected = expected + 0.7 * (others.logsumexp(0) - z[a] @ z[(a + 12) % 24] / 0.2) / 24
    expected.backward()
    torch.testing.assert_close(losses["simclr_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in ((v, v64), (views, views64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(loss(v, t, SCALE, view_features=views), sum(losses.values()))


def test_second_views_have_a_gradient_and_are_left_out_of_evaluation() -> None:
    model = tiny_model()
    SecondView(model, RandomViews((0.5,) * 3, (0.25,) * 3))
    images, texts = batch(4)
    output = model.train()(images, texts)
    output["view_features"][0, 0].backward()
    assert model.visual.conv1.weight.grad.abs().max() > 0
    assert not torch.allclose(output["view_features"], output["image_features"], atol=1e-3)
    assert "view_features" not in model.eval()(images, texts)


def some(*values: float) -> Tensor:
    return torch.tensor(values)


def test_crop_is_torchvisions() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # 16 rows from row 4 of the 16 that are free, 24 columns from column 6 of 8.
    out = crop(images, some(0.5, 1), some(0.75, 1), some(0.25, 0), some(0.75, 0), torch.tensor([False, True]))
    expected = TF.resized_crop(images[0], 4, 6, 16, 24, [32, 32], antialias=False)
    # torchvision cuts before it interpolates, so that only the rim differs.
    torch.testing.assert_close(out[0, :, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1], images[1].flip(-1), rtol=0, atol=1e-5)


def test_colours_are_torchvisions() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    b, c, s = some(1.4, 0.7, 1.0), some(0.6, 1.3, 1.0), some(0.5, 1.4, 0.0)
    out = recolour(images, b, c, s, torch.zeros(3))
    for i in range(3):
        expected = TF.adjust_contrast(TF.adjust_brightness(images[i], float(b[i])), float(c[i]))
        expected = TF.adjust_saturation(expected, float(s[i]))
        torch.testing.assert_close(out[i], expected, rtol=0, atol=2e-3)  # its luma is of four digits


def test_a_third_of_a_turn_of_hue_takes_red_towards_green_and_keeps_luma() -> None:
    images = 0.4 + 0.1 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, 0] += 0.1
    one = torch.ones(2)
    out = recolour(images, one, one, one, some(1 / 3, 0))
    torch.testing.assert_close(out[1], images[1], rtol=0, atol=1e-6)
    luma = torch.tensor([0.299, 0.587, 0.114])
    gray = torch.einsum("c,bchw->bhw", luma, images)
    torch.testing.assert_close(torch.einsum("c,bchw->bhw", luma, out), gray, rtol=0, atol=1e-5)
    assert (images[0].argmax(0) == 0).float().mean() > 0.9
    assert not (out[0].argmax(0) == 0).any()
    back = recolour(out, one, one, one, some(-1 / 3, 0))
    torch.testing.assert_close(back, images, rtol=0, atol=1e-5)


def test_blur_is_torchvisions() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = blur(images, some(0.8, 1.7, 0.0), radius=6)
    for i, sigma in enumerate((0.8, 1.7)):
        torch.testing.assert_close(out[i], TF.gaussian_blur(images[i], [13, 13], [sigma, sigma]), rtol=0, atol=1e-5)
    assert torch.equal(out[2], images[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_stay_images_and_each_has_its_own_draw(dtype: torch.dtype) -> None:
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    normalized = ((image - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)).to(dtype)
    torch.manual_seed(1)
    views = RandomViews(mean.tolist(), std.tolist())(normalized.expand(64, -1, -1, -1))
    assert views.shape == (64, 3, 48, 48)
    assert views.dtype == dtype
    pictures = views.float() * std.reshape(3, 1, 1) + mean.reshape(3, 1, 1)
    assert pictures.min() > -0.02
    assert pictures.max() < 1.02
    assert len({tuple(view.flatten()[:64].tolist()) for view in views}) == 64
    spread = (pictures - pictures.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3))
    assert 2 < int((spread < 0.02).sum()) < 30  # a fifth of them is gray


# --- OTTER


def test_otter_is_its_formula_with_pots_plan() -> None:
    v, t = paired_features(24, seed=1)
    teacher = Features(*paired_features(24, seed=2))
    v, t, scale = (x.clone().requires_grad_() for x in (v, t, SCALE))
    loss = OTTERLoss(share=0.3, epsilon=0.15)
    keys = {"image_keys": teacher.images, "text_keys": teacher.texts}
    losses = loss(v, t, scale, **keys, output_dict=True)
    torch.testing.assert_close(losses["contrastive_loss"], 0.7 * ClipLoss()(v, t, scale), rtol=1e-6, atol=0)
    losses["otter_loss"].backward()

    a, b = teacher.images.double(), teacher.texts.double()
    similarity = a @ b.T + a @ a.T + b @ b.T - 100 * torch.eye(24)
    uniform = torch.full((24,), 1 / 24, dtype=torch.float64)
    plan = ot.sinkhorn(uniform, uniform, -similarity, 0.15, method="sinkhorn_log", numItermax=10000, stopThr=1e-10)
    assert plan.diagonal().max() < 1e-100
    v64, t64, scale64 = (x.detach().double().requires_grad_() for x in (v, t, scale))
    logits = scale64 * v64 @ t64.T
    expected = -0.3 * (plan * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / 2
    expected.backward()
    # Our plan stops at a marginal error of 1e-3.
    torch.testing.assert_close(losses["otter_loss"].double(), expected, rtol=1e-3, atol=0)
    for ours, theirs in ((v, v64), (t, t64), (scale, scale64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2e-3 * float(theirs.grad.abs().max()))
    assert torch.equal(loss(v, t, scale, **keys), sum(losses.values()))


def test_otter_teaches_itself_without_a_teacher_and_is_clip_without_a_share() -> None:
    v, t = (x.requires_grad_() for x in paired_features(24, seed=1))
    own = OTTERLoss(share=0.3)(v, t, SCALE)
    assert torch.equal(own, OTTERLoss(share=0.3)(v, t, SCALE, image_keys=v.detach(), text_keys=t.detach()))
    off = OTTERLoss(share=0)(v, t, SCALE, output_dict=True)
    assert list(off) == ["contrastive_loss"]
    assert torch.equal(off["contrastive_loss"], ClipLoss()(v, t, SCALE))


@pytest.mark.parametrize("n", [1, 2])
def test_otter_takes_the_smallest_batches(n: int) -> None:
    v, t = paired_features(n)
    assert torch.isfinite(OTTERLoss()(v, t, SCALE))


# --- RCL


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20), scale=st.floats(1, 100), seed=st.integers(0, 100))
def test_rcl_is_its_formula(n: int, scale: float, seed: int) -> None:
    v, t = (x.requires_grad_() for x in paired_features(n, seed=seed))
    losses = RCLLoss()(v, t, torch.tensor(scale), output_dict=True)
    assert list(losses) == ["complementary_loss"]
    losses["complementary_loss"].backward()
    v64, t64 = (x.detach().double().requires_grad_() for x in (v, t))
    others = ~torch.eye(n, dtype=torch.bool)
    expected = torch.zeros((), dtype=torch.float64)
    for logits in (scale * v64 @ t64.T, scale * t64 @ v64.T):
        # 1 - p_ij is the sum of the other shares: nothing cancels.
        log_p = logits.log_softmax(1)
        rest = torch.stack([log_p[:, torch.arange(n) != j].logsumexp(1) for j in range(n)], dim=1)
        expected = expected - torch.where(others, rest, 0.0).sum(1).mean() / 2
    torch.testing.assert_close(losses["complementary_loss"].double(), expected, rtol=1e-3, atol=1e-5)
    expected.backward()
    bound = 1e-2 * float(v64.grad.abs().max()) + 1e-5
    torch.testing.assert_close(v.grad.double(), v64.grad, rtol=0, atol=bound)


def test_rcl_stays_finite_where_a_negative_takes_all() -> None:
    v = F.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    loss = RCLLoss()(v, v.detach().flip(0), torch.tensor(100.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(v.grad).all()
    assert loss.item() > 5
    # This is the caption that matters most: it must be pushed away.
    assert v.grad.abs().max() > 1


def test_rcl_of_a_pair_alone_is_zero() -> None:
    v, t = (x.requires_grad_() for x in paired_features(1))
    loss = RCLLoss()(v, t, SCALE)
    loss.backward()
    assert loss.item() == 0
    assert not v.grad.any()


def test_a_nan_in_the_batch_is_left_to_the_training_loop() -> None:
    v, t = paired_features(8)
    v[3] = math.nan
    assert torch.isnan(OTTERLoss()(v, t, SCALE))
    assert torch.isnan(RCLLoss()(v, t, SCALE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_features_train(dtype: torch.dtype) -> None:
    v, t = (x.to(dtype).requires_grad_() for x in paired_features(16))
    keys = dict(zip(("image_keys", "text_keys"), (x.to(dtype) for x in paired_features(16, seed=2)), strict=True))
    queue = KeyQueue(64)
    queue.add(Features(*paired_features(32, seed=3)))
    with torch.autocast("cpu", dtype=dtype):
        total = MoCoLoss(queue)(v, t, SCALE, **keys) + OTTERLoss()(v, t, SCALE, **keys)
        total = total + SimCLRLoss()(v, t, SCALE, view_features=keys["image_keys"])
    total.backward()
    assert torch.isfinite(v.grad).all()
    assert v.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: OTTERLoss(share=1.1), "share"),
        (lambda: OTTERLoss(epsilon=0), "epsilon"),
        (lambda: SimCLRLoss(weight=0), "weight"),
        (lambda: SimCLRLoss(temperature=-1), "temperature"),
        (lambda: KeyQueue(0), "size"),
        (lambda: MomentumEncoders(torch.nn.Linear(1, 1), 1.0), "momentum"),
    ],
)
def test_bad_settings_are_refused(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


# --- Arguments


def parse(*argv: str, loss: str, **open_clip_args: Any) -> argparse.Namespace:
    parser, plugin = argparse.ArgumentParser(prog="main"), BaselinesPlugin()
    plugin.add_arguments(parser.add_argument_group("baselines"))
    defaults = {**OPEN_CLIP, "torchscript": False, "trace": False, "precision": "fp32"}
    args = parser.parse_args(argv, argparse.Namespace(loss=loss, **defaults | open_clip_args))
    plugin.check_args(parser, args)
    return args


@pytest.mark.parametrize("loss", OPTIONS)
def test_every_loss_parses_with_its_defaults(loss: str) -> None:
    args = parse(loss=loss)
    for option in (option for options in OPTIONS.values() for option in options):
        assert getattr(args, option.dest) == option.default
        assert option.rule.accepts(option.default)


@pytest.mark.parametrize(
    ("loss", "argv", "open_clip_args", "words"),
    [
        ("moco", ("--moco-momentum", "1"), {}, "--moco-momentum: must be in [0, 1), got 1.0"),
        ("moco", ("--moco-queue-size", "0"), {}, "--moco-queue-size: must be at least 1"),
        ("simclr", ("--simclr-weight", "0"), {}, "--simclr-weight: must be positive"),
        ("simclr", ("--simclr-temperature", "nan"), {}, "--simclr-temperature: must be positive"),
        ("otter", ("--otter-share", "1.5"), {}, "--otter-share: must be in [0, 1]"),
        ("otter", ("--otter-epsilon", "-1"), {}, "--otter-epsilon: must be positive"),
        ("otter", ("--otter-momentum", "1"), {}, "--otter-momentum: must be in [0, 1)"),
        ("otter", (), {"device": "mps"}, "--device: mps has no float64, which --loss otter needs"),
        ("moco", (), {"horovod": True}, "--horovod: not supported by --loss moco"),
        ("simclr", (), {"model": "coca_ViT-B-32"}, "simclr does not train CoCa"),
        ("otter", (), {"distill_model": "ViT-B-32"}, "otter does not distill"),
        ("moco", (), {"precision": "pure_bf16"}, "--precision: --loss moco averages weights in float32"),
        ("simclr", (), {"torchscript": True}, "--torchscript: not supported by --loss simclr"),
        ("moco", (), {"fsdp": True}, "--fsdp: not supported by --loss moco, which keeps a copy of the model"),
        ("otter", (), {"fsdp": True}, "--fsdp: not supported by --loss otter, which keeps a copy of the model"),
    ],
)
def test_what_cannot_train_ends_with_one_line_and_code_2(
    loss: str, argv: tuple[str, ...], open_clip_args: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*argv, loss=loss, **open_clip_args)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_half_precision_and_fsdp_are_refused_only_where_weights_are_averaged() -> None:
    for open_clip_args in ({"precision": "bf16"}, {"fsdp": True}):
        parse("--otter-momentum", "0", loss="otter", **open_clip_args)
        parse(loss="simclr", **open_clip_args)


def test_a_flag_of_another_loss_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="--moco-queue-size given without --loss moco: no effect with --loss otter"):
        parse("--moco-queue-size", "8", loss="otter")


@pytest.mark.parametrize("loss", ["clip", "otco"])
def test_other_losses_get_no_hook_no_callback_and_no_random_number(loss: str) -> None:
    plugin, model, args = BaselinesPlugin(), tiny_model(), parse(loss=loss)
    state = torch.get_rng_state()
    plugin.prepare_model(args, model)
    assert plugin.create_callbacks(args, ClipLoss()) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert set(model.train()(*batch(2))) == {"image_features", "text_features", "logit_scale"}


# --- Ranks and accumulated batches, by OpenCLIP's own training loop


class Mirrored:
    """A second view that draws nothing, so that ranks and runs can be compared."""

    def __init__(self, mean: Any, std: Any) -> None:
        pass

    def __call__(self, images: Tensor) -> Tensor:
        return images.flip(-1)


# The queue drops whole steps: accumulated batches enter it in another order on two ranks.
STEPS, GLOBAL_BATCH, QUEUE = 5, 16, 48
SETTINGS = {"local_loss": False, "gather_with_grad": True}
CASES = {
    **{f"{loss}-{local}": (loss, {**SETTINGS, "local_loss": local}, 1) for loss in OPTIONS for local in (False, True)},
    "moco-plain": ("moco", {"local_loss": False, "gather_with_grad": False}, 1),
    **{f"{loss}-accum": (loss, SETTINGS, 2) for loss in OPTIONS},
}


def _train(rank: int, world: int, script: Path, folder: Path) -> None:
    """Each case for some steps on the same samples, however they are shared out."""
    sys.path.insert(0, str(script))
    from open_clip_train.train import train_one_epoch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    baselines.RandomViews = Mirrored
    for name, (loss_name, flags, accum) in CASES.items():
        size = GLOBAL_BATCH // world // accum
        more = {"batch_size": size, "accum_freq": accum, "skip_scheduler": True, "distill": False, "local_rank": rank}
        more |= {"grad_clip_norm": None, "rank": rank, "world_size": world, "wandb": False, "log_local": False}
        args = parse("--moco-queue-size", str(QUEUE), "--moco-momentum", "0.9", loss=loss_name, **more, **flags)
        plugin, model = BaselinesPlugin(), tiny_model()
        # OpenCLIP's accumulation counts its gradient once for each of the batches, whatever the loss.
        model.logit_scale.requires_grad_(name.endswith("True"))
        plugin.prepare_model(args, model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        loss = plugin.create_loss(args)
        callbacks = plugin.create_callbacks(args, loss)
        batches = []
        for step in range(STEPS):
            # An accumulated batch is a contiguous part of the large one, a rank's share a part of that.
            for part in zip(*(side.chunk(accum) for side in batch(GLOBAL_BATCH, seed=step)), strict=True):
                batches.append(tuple(side.chunk(world)[rank] for side in part))
        loader = Loader(batches)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_one_epoch(
            wrapped, {"train": loader}, loss, 0, optimizer, None, None, None, args, tb_writer=None, callbacks=callbacks
        )
        states = {callback.name: callback.on_save_checkpoint() for callback in callbacks}
        torch.save({"model": model.state_dict(), "states": states}, folder / f"{name}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Loader(list[tuple[Tensor, Tensor]]):
    """What OpenCLIP's loop asks of its data."""

    @property
    def dataloader(self) -> Loader:
        return self

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(images) for images, _ in self)

    def set_epoch(self, epoch: int) -> None:
        pass


@pytest.fixture(scope="module")
def ranks(patched: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """What every rank ended with, by case and number of ranks."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world-{world}")
        start_ranks(_train, world, patched, folder)
        found |= {(name, world): [folder / f"{name}.{rank}.pt" for rank in range(world)] for name in CASES}
    return {key: [torch.load(file) for file in files] for key, files in found.items()}


def assert_near(ours: Any, theirs: Any, start: dict[str, Tensor]) -> None:
    """The same change of each weight, relative to the largest change."""
    changed = max(float((theirs["model"][name] - start[name]).abs().max()) for name in start)
    assert changed > 1e-3
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=0, atol=1e-3 * changed, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(ranks: dict[tuple[str, int], list[Any]], name: str) -> None:
    [one], both = ranks[name, 1], ranks[name, 2]
    assert_equal(both[0]["model"], both[1]["model"])
    assert_equal(both[0]["states"], both[1]["states"])
    if name.endswith("accum"):
        # Ranks hold the accumulated batches in another order than one process does.
        return
    assert_near(both[0], one, tiny_model().state_dict())
    for key, state in one["states"].items():
        ours = both[0]["states"][key]
        torch.testing.assert_close(ours, state, rtol=0, atol=1e-3)
        if key == "moco":
            assert state["queue"]["images"].shape == (QUEUE, 16)


@pytest.mark.parametrize("loss", OPTIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_batches_train_as_the_large_one(
    ranks: dict[tuple[str, int], list[Any]], loss: str, world: int
) -> None:
    large, accumulated = ranks[f"{loss}-False", world][0], ranks[f"{loss}-accum", world][0]
    assert_near(accumulated, large, tiny_model().state_dict())


# --- OpenCLIP's script

MOCO = (
    "--loss",
    "moco",
    "--moco-queue-size",
    "50",
    "--epochs",
    "2",
    "--aug-cfg",
    "scale=(1.0, 1.0)",
    "ratio=(1.0, 1.0)",
)


@pytest.fixture(scope="module")
def runs(lab: Lab, patched: Path) -> dict[str, Run]:
    validation = ("--val-data", str(lab.folder / "small.csv"))
    started = {
        "moco": lab.start("moco", patched, PLUGIN, *MOCO, ranks=2),
        "simclr": lab.start("simclr", patched, PLUGIN, "--loss", "simclr", *validation),
        "otter": lab.start("otter", patched, PLUGIN, "--loss", "otter", "--accum-freq", "2", *validation),
        "rcl": lab.start("rcl", patched, PLUGIN, "--loss", "rcl", *validation),
    }
    return {name: run.wait() for name, run in started.items()}


@pytest.mark.training
def test_each_trains_through_the_script(runs: dict[str, Run]) -> None:
    terms = {"moco": ["Contrastive"], "simclr": ["Contrastive", "Simclr"], "otter": ["Contrastive", "Otter"]}
    terms["rcl"] = ["Complementary"]
    for name, run in runs.items():
        assert f"Loss: {name} (plugin baselines)" in run.output
        assert len(run.steps) == {"moco": 4, "simclr": 4, "otter": 2, "rcl": 4}[name]
        for line in run.steps:
            assert re.findall(r"(\w+)_loss: ", line) == terms[name]
        assert all(torch.isfinite(value).all() for value in run.checkpoint(1)["state_dict"].values())
    assert set(runs["otter"].checkpoint(1)["plugins"]["otter"]) == {"encoders"}
    assert "plugins" not in runs["simclr"].checkpoint(1)


@pytest.mark.training
def test_a_resumed_moco_run_ends_as_one_that_was_not_stopped(lab: Lab, patched: Path, runs: dict[str, Run]) -> None:
    """To the bit: weights, momentum encoders, queues and optimizer."""
    straight = runs["moco"]
    file = str(straight.folder / "checkpoints" / "epoch_1.pt")
    resumed = lab.start("moco-resumed", patched, PLUGIN, *MOCO, "--resume", file, ranks=2).wait()
    assert "=> resuming moco with its momentum encoders and 32 queued pairs" in resumed.output
    ours, theirs = resumed.checkpoint(2), straight.checkpoint(2)
    for checkpoint in (ours, theirs):
        checkpoint.pop("name")
    assert theirs["plugins"]["moco"]["queue"]["texts"].shape == (50, 16)
    assert resumed.steps == straight.steps[2:]
    assert_equal(ours, theirs)
