"""What OpenCLIP calls: arguments, checks, loss and callbacks, without the training script."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import sys
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_shard_check import write_shard

from openclip_otco import FeatureWindow, OTCOLoss, PlanCache, PlanCacheCallback, PlanSolver
from openclip_otco.models.registry import register_models
from openclip_otco.ot import combinatorial_plan, sinkhorn, sinkhorn_divergence
from openclip_otco.train.plugin import OPTIONS, OTCOPlugin

# The parts of OpenCLIP's arguments that the plugin reads.
OPEN_CLIP = {
    "model": "RN10t-bert-tiny",
    "distill_model": None,
    "distill_pretrained": None,
    "dataset_type": "auto",
    "train_data": None,
    "val_data": None,
    "horovod": False,
    "local_loss": True,
    "gather_with_grad": False,
    "rank": 0,
    "world_size": 1,
    "seed": 3,
    "device": "cpu",
    "log_every_n_steps": 10,
    "wandb": False,
}


@pytest.fixture(scope="module")
def plugin() -> OTCOPlugin:
    return OTCOPlugin()


@pytest.fixture
def parse(plugin):
    def parse(*argv: str, loss: str = "otco", **open_clip) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog="main")
        plugin.add_arguments(parser.add_argument_group("otco"))
        args = parser.parse_args(argv, argparse.Namespace(loss=loss, **OPEN_CLIP | open_clip))
        plugin.check_args(parser, args)
        return args

    return parse


def test_defaults_are_those_of_the_table(parse):
    args = parse()
    assert (args.otco_window, args.otco_epsilon, args.otco_initial_plan, args.otco_additive_error) == (
        8,
        0.03,
        "combinatorial",
        0.01,
    )
    assert (args.otco_trust, args.otco_confidence, args.otco_least_share) == ("posterior", 2, 0.25)
    assert (args.otco_negatives, args.otco_negative_power, args.otco_negative_price) == ("price", 0.6, 1)
    assert (args.otco_cache_size, args.otco_plans_per_step, args.otco_divergence_weight) == (4, 1, 0)
    assert (args.otco_warmup, args.otco_max_support) == (0.02, 8192)


def test_flags_and_classes_have_the_same_defaults(parse):
    """What a user gets in a script is what a training gets."""
    args = parse(local_loss=False, seed=0)
    plugin = OTCOPlugin()
    loss, alone = plugin.create_loss(args), OTCOLoss()
    named = {name for name in vars(alone) if not name.startswith("_")} - {"cache_labels", "training"}
    assert {name: getattr(loss, name) for name in named} == {name: getattr(alone, name) for name in named}
    (callback,) = plugin.create_callbacks(args, loss)
    assert callback.solver == PlanSolver()
    defaults = inspect.signature(PlanCacheCallback).parameters
    for name in ("plans_per_step", "warmup", "max_age"):
        assert getattr(callback, name) == defaults[name].default
    assert callback.cache.size == PlanCache().size
    assert callback.window.max_support == FeatureWindow(1).max_support
    assert inspect.signature(sinkhorn).parameters["epsilon"].default == PlanSolver().epsilon
    assert inspect.signature(sinkhorn_divergence).parameters["epsilon"].default == PlanSolver().epsilon
    assert inspect.signature(combinatorial_plan).parameters["additive_error"].default == PlanSolver().additive_error


def test_help_gives_each_flag_its_default(plugin, capsys):
    parser = argparse.ArgumentParser(prog="main")
    plugin.add_arguments(parser.add_argument_group("otco"))
    text = " ".join(parser.format_help().split())
    for option in OPTIONS:
        assert option.flag in text
        assert f"(default: {option.default})" in text


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--otco-window", "0"),
        ("--otco-cache-size", "0"),
        ("--otco-epsilon", "0"),
        ("--otco-epsilon", "-1"),
        ("--otco-epsilon", "nan"),
        ("--otco-additive-error", "0"),
        ("--otco-additive-error", "1.01"),
        ("--otco-least-share", "1.5"),
        ("--otco-warmup", "-0.1"),
        ("--otco-warmup", "1.1"),
        ("--otco-confidence", "-1"),
        ("--otco-confidence", "inf"),
        ("--otco-transport-weight", "-1"),
        ("--otco-divergence-weight", "-1"),
        ("--otco-plans-per-step", "0"),
        ("--otco-max-support", "0"),
        ("--otco-max-age", "0"),
        ("--otco-initial-plan", "best"),
        ("--otco-window", "many"),
    ],
)
def test_bad_values_end_with_one_line_and_code_2(parse, capsys, flag, value):
    with pytest.raises(SystemExit) as ended:
        parse(flag, value)
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 or value in ("best", "many")  # argparse's own errors come with its usage
    error = error[-1]
    assert error.startswith(f"main: error: argument {flag}: ")
    assert value in error


def test_an_age_below_the_caches_own_is_refused(parse, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--otco-cache-size", "5", "--otco-max-age", "4")
    assert ended.value.code == 2
    error = "main: error: argument --otco-max-age: must be at least --otco-cache-size, which is 5; got 4\n"
    assert capsys.readouterr().err == error
    parse("--otco-cache-size", "5", "--otco-max-age", "5")


@pytest.fixture(scope="module")
def parse_args(patched):
    """OpenCLIP's own parser, of the patched copy, in this process."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "open_clip_train"]

    with pytest.MonkeyPatch.context() as patch:
        # Another test may have imported the installed copy, which stays what it was.
        for name in loaded():
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(patched)
        yield importlib.import_module("open_clip_train.params").parse_args
        for name in loaded():
            del sys.modules[name]


words = st.one_of(
    st.sampled_from([option.flag for option in OPTIONS]),
    st.sampled_from(["--otco", "--otco-", "--", "-", "", "=", "--otco-window=3", "--otco-epsilon=1e-3"]),
    st.sampled_from(["0", "-1", "1", "0.5", "nan", "inf", "-inf", "1e400", "none", "emd", "0x10", "１", "1_0", "\x00"]),
    st.text(max_size=6),
)


@given(argv=st.lists(words, max_size=6), loss=st.sampled_from(["otco", "clip"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_arguments_parse_or_end_with_code_2_and_a_reason(parse_args, argv, loss):
    stderr, args, code = io.StringIO(), None, None
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = parse_args(["--model", "RN10t-bert-tiny", "--device", "cpu", "--loss", loss, *argv])
    except SystemExit as ended:
        code = ended.code
    if args is None:
        assert code in (0, 2)  # 0: an abbreviation of --help
        assert not code or ": error: " in stderr.getvalue()
    elif loss == "otco":
        assert all(option.rule.accepts(getattr(args, option.dest)) for option in OPTIONS)


def test_open_clips_parser_hands_the_flags_to_the_plugin(parse_args, capsys):
    base = ["--model", "RN10t-bert-tiny", "--device", "cpu", "--loss", "otco"]
    args = parse_args([*base, "--otco-window=3"])
    assert (args.otco_window, args.otco_epsilon) == (3, 0.03)
    with pytest.raises(SystemExit) as ended:
        parse_args([*base, "--otco-window", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: argument --otco-window: must be at least 1, got 0\n")


@pytest.mark.parametrize(
    ("open_clip", "message"),
    [
        ({"model": "coca_ViT-B-32"}, "CoCa"),
        ({"distill_model": "ViT-B-32"}, "distill"),
        ({"device": "mps"}, "argument --device: mps has no float64, which --loss otco needs; use cpu or cuda"),
        ({"horovod": True}, "argument --horovod: not supported by --loss otco"),
        ({"train_data": "nowhere/{0..3}.tar"}, "none of the 4 shards"),
    ],
)
def test_runs_that_cannot_train_end_with_one_line_and_code_2(parse, capsys, open_clip, message):
    with pytest.raises(SystemExit) as ended:
        parse(**open_clip)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_shards_without_captions_end_before_training(parse, capsys, tmp_path):
    shard = write_shard(tmp_path / "a.tar", ["a.jpg", "a.json"])
    with pytest.raises(SystemExit) as ended:
        parse(train_data=shard)
    assert ended.value.code == 2
    assert "argument --train-data: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(val_data=shard)
    assert "argument --val-data: " in capsys.readouterr().err


@pytest.mark.parametrize("data", ["pairs.csv", "cc.tar.d/pairs.csv", None])
def test_what_open_clip_takes_for_no_shards_is_not_looked_at(parse, data):
    parse(train_data=data)


def test_a_missing_bert_folder_ends_with_one_line_whatever_the_loss(parse, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENCLIP_OTCO_BERT", str(tmp_path / "nowhere"))
    register_models()
    for loss in ("otco", "clip"):
        with pytest.raises(SystemExit) as ended:
            parse(loss=loss, model="RN50-bert-base-uncased")
        assert ended.value.code == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert str(tmp_path / "nowhere") in error


def test_flags_without_the_loss_warn_and_train(parse):
    with pytest.warns(UserWarning, match="--otco-window given without --loss otco"):
        args = parse("--otco-window", "4", loss="clip")
    assert args.otco_epsilon == 0.03


def test_another_loss_is_not_our_business(parse):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(loss="clip", model="coca_ViT-B-32", distill_model="ViT-B-32", train_data="nowhere.tar")


def test_loss_and_callback_get_the_flags(plugin, parse):
    args = parse(
        "--otco-confidence", "3", "--otco-transport-weight", "0.25", "--otco-divergence-weight", "0.5",
        "--otco-epsilon", "0.07", "--otco-window", "3", "--otco-cache-size", "5", "--otco-plans-per-step", "2",
        "--otco-warmup", "0.2", "--otco-max-support", "99", "--otco-initial-plan", "emd",
        "--otco-additive-error", "0.3", "--otco-least-share", "0.4", "--otco-trust", "share",
        "--otco-max-age", "9",
    )  # fmt: skip
    loss = plugin.create_loss(args)
    assert isinstance(loss, OTCOLoss)
    assert (loss.confidence, loss.transport_weight, loss.divergence_weight, loss.epsilon) == (3, 0.25, 0.5, 0.07)
    assert loss.local_loss
    assert (loss.least_share, loss.trust) == (0.4, "share")
    (callback,) = plugin.create_callbacks(args, loss)
    assert (callback.window.steps, callback.window.max_support, callback.cache.size) == (3, 99, 5)
    assert (callback.plans_per_step, callback.warmup, callback.max_age, callback.log.every) == (2, 0.2, 9, 10)
    solver = callback.solver
    assert (solver.epsilon, solver.initial_plan, solver.additive_error, solver.seed) == (0.07, "emd", 0.3, 3)
    assert callback.exchange is loss.exchange


def test_other_losses_get_no_callback(plugin, parse):
    assert plugin.create_callbacks(parse(loss="clip"), loss=object()) == []
