"""`openclip-otco train` and `patch --status`: no way is left in which `--loss otco` trains CLIP without a word."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from hook_fixtures import VERSION, Lab, copy_package

from openclip_otco import cli
from openclip_otco.patch import installation
from openclip_otco.train import launch

OTCO = "otco = openclip_otco.train.plugin:OTCOPlugin"


def python(lab: Lab, script: Path, folder: Path, *words: str, entry_points: str = OTCO) -> tuple[int, str, str]:
    """Exit code and output of a process that finds this copy of the script, started in this folder."""
    command = [sys.executable, *words]
    environment = lab.environment(script, entry_points)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def checkout(original: Path, tmp_path: Path) -> Path:
    """The folder `src` of a checkout of OpenCLIP, whose `open_clip_train` has no plugin point."""
    (tmp_path / "src").mkdir()
    return copy_package(original, tmp_path / "src")


def test_without_the_plugin_point_the_loss_is_taken_for_another_flag(lab: Lab, original: Path) -> None:
    """What all this is about: OpenCLIP's own script takes `--loss otco`, and trains CLIP."""
    code, parsed, _ = lab.parse(original, OTCO, "--loss", "otco")
    assert code == 0
    assert "loss" not in parsed
    assert parsed["loss_dist_impl"] == "otco"


def test_a_script_without_the_plugin_point_is_not_started(lab: Lab, original: Path, tmp_path: Path) -> None:
    code, out, err = python(lab, original, tmp_path, "-m", "openclip_otco.train", "--loss", "otco", "--logs", "logs")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"openclip-otco train: open_clip_train in {original} (unpatched) would train CLIP")
    assert f"openclip-otco patch --target {original} --version {VERSION}" in line
    assert not list(tmp_path.iterdir())


def test_a_half_patched_script_is_not_started(lab: Lab, patched: Path, original: Path, tmp_path: Path) -> None:
    """As a kill of `patch` may leave it: `--loss` is known, and nobody asks for it."""
    copy = copy_package(patched, tmp_path)
    main = "open_clip_train/main.py"
    (copy / main).write_bytes((original / main).read_bytes())
    code, _, err = python(lab, copy, tmp_path, "-m", "openclip_otco.train", "--loss", "otco")
    assert code == 2
    assert f"{copy} (partial) would train CLIP" in err


@pytest.mark.parametrize("name", ["cwd", "installed"])
def test_the_copy_that_is_checked_is_the_one_that_trains(lab: Lab, patched: Path, checkout: Path, name: str) -> None:
    """`python -m` looks into the working directory first, the command does not."""
    command = ["-m", "openclip_otco.train"] if name == "cwd" else ["-c", COMMAND]
    code, out, err = python(lab, patched, checkout, *command, "--help")
    if name == "cwd":
        assert code == 2
        assert f"{checkout} (unpatched) would train CLIP" in err
        assert "it lies in this folder: start from another one" in err
    else:
        assert code == 0, err
        assert "--otco-window" in out


# What pip writes into `bin/openclip-otco`; a script there does not see the working directory.
COMMAND = (
    "import sys; sys.path.remove(''); from openclip_otco.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
)


def test_status_tells_of_the_copy_in_the_working_directory(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["patch", "--status"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.chdir(checkout)
    assert cli.main(["patch", "--status"]) == 1
    first, second, note = capsys.readouterr().out.splitlines()
    assert first.startswith(f"patched: open_clip_torch {VERSION} in ")
    assert second == f"unpatched: open_clip_torch {VERSION} in {checkout}"
    assert "python -m open_clip_train.main takes the second one" in note
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # then Python does not look there
    assert cli.main(["patch", "--status"]) == 0
    monkeypatch.delenv("PYTHONSAFEPATH")
    installation.apply(checkout, VERSION)
    assert cli.main(["patch", "--status"]) == 0


def point(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, launch.GROUP)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "OpenCLIP does not find the plugin otco"),
        ([point("otco", "no_such_module:Plugin")], "OpenCLIP cannot load the plugin otco (no_such_module:Plugin)"),
        ([point("otco", "collections:Counter")], "OpenCLIP would load another plugin otco (collections:Counter)"),
        ([point("otco", "openclip_otco.train.plugin:OTCOPlugin")], None),
    ],
)
def test_a_plugin_that_openclip_would_not_load(
    monkeypatch: pytest.MonkeyPatch, points: list[importlib.metadata.EntryPoint], message: str | None
) -> None:
    monkeypatch.setattr(launch, "entry_points", lambda group, name: points)
    found = launch.problem()
    assert found is None if message is None else found is not None and found.startswith(message)


def test_options_of_the_command_itself_come_before(capsys: pytest.CaptureFixture) -> None:
    for words, code in ((["--version", "train"], 0), (["--nonsense", "train"], 2)):
        with pytest.raises(SystemExit) as done:
            cli.main(words)
        assert done.value.code == code
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(("result", "code"), [(None, 0), (-1, 1)])
def test_the_script_gets_the_same_arguments_and_its_failure_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, result: int | None, code: int
) -> None:
    import open_clip_train.main

    given: list[list[str]] = []

    def main(arguments: list[str]) -> int | None:
        given.append(arguments)
        return result

    monkeypatch.setattr(open_clip_train.main, "main", main)
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = ["--loss", "otco", "--otco-window", "3", "--help"]
    assert cli.main(["train", *words]) == code
    assert given == [words]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (installation.State.UNSUPPORTED, "there is no patch for version 9.9.9: install open_clip_torch"),
        (installation.State.MODIFIED, "openclip-otco patch --status says what to do"),
        (installation.State.NOT_INSTALLED, "is not installed: pip install 'open_clip_torch[training]'"),
    ],
)
def test_what_cannot_be_patched_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, state: installation.State, message: str
) -> None:
    monkeypatch.setattr(installation, "status", lambda: installation.Status(state, "9.9.9", Path("/nowhere"), {}))
    found = launch.problem()
    assert found is not None
    assert message in found


@pytest.mark.training
def test_torchrun_trains_as_the_script_does(lab: Lab, patched: Path) -> None:
    words = ("--loss", "otco", "--otco-window", "2", "--otco-warmup", "0")
    both = [
        lab.start(f"launch-{name}", patched, OTCO, *words, ranks=2, torchrun=True, module=module).wait()
        for name, module in (("ours", "openclip_otco.train"), ("theirs", "open_clip_train.main"))
    ]
    assert "Loss: otco (plugin otco)" in both[0].output
    assert "OTCO Plan: " in both[0].output
    assert both[0].steps == both[1].steps
