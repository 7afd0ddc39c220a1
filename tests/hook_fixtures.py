"""A laboratory for OpenCLIP's training script: copies of it with and without the plugin point, a tiny model, data.

The installed script is left alone.
"""

import csv
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import PATIENCE, Fork, Forks
from PIL import Image

from openclip_otco.patch import diff, installation

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
VERSION = importlib.metadata.version(installation.DISTRIBUTION)


def copy_package(source: Path, folder: Path) -> Path:
    """Copies the package from one folder into another, and returns that."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / diff.PACKAGE, folder / diff.PACKAGE, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package as OpenCLIP made it."""
    installed = installation.status()
    assert installed.folder is not None
    folder = copy_package(installed.folder, tmp_path_factory.mktemp("original"))
    installation.revert(folder, VERSION)
    return folder


@pytest.fixture(scope="session")
def patched(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched package."""
    folder = copy_package(original, tmp_path_factory.mktemp("patched"))
    installation.apply(folder, VERSION)
    return folder


Process = Forks | subprocess.Popen[bytes]


@dataclass(frozen=True)
class Run:
    """A training run; `wait` for it before looking at what it left. `log` takes all that it prints."""

    process: Process
    folder: Path
    log: Path

    def wait(self, fails: bool = False) -> "Run":
        code = self.process.wait(timeout=PATIENCE)
        assert (code != 0) == fails, self.output[-5000:]
        return self

    def until(self, reached: Callable[[str], bool]) -> "Run":
        """Waits, as long as it runs, until its log satisfies `reached`."""
        while not reached(self.output):
            assert self.process.poll() is None, f"ended before:\n{self.output[-5000:]}"
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=PATIENCE)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def steps(self) -> list[str]:
        """The logged steps, without the times."""
        lines = (self.folder / "out.log").read_text().splitlines()
        return [re.sub(r".*(Train Epoch.*)Data .* (LR.*)", r"\1\2", line) for line in lines if "Train Epoch" in line]

    def checkpoint(self, epoch: int) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
        return loaded

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"record.{rank}").read_text().splitlines()]


@dataclass(frozen=True)
class Lab:
    """A folder with a tiny model, data and plugins, where the training script runs."""

    folder: Path

    def environment(self, script: Path, entry_points: str | None) -> dict[str, str]:
        """Of a process outside the checkout that finds this copy of the script and these plugins, no other ones."""
        installed = self.folder / f"plugins-{abs(hash(entry_points))}"
        installed.mkdir(exist_ok=True)
        for module in ("hook_plugin.py", "parse_arguments.py"):
            shutil.copy(Path(__file__).with_name(module), installed)
        # The first distribution of a name counts, so that this package's own plugin is not there.
        for name, points in (("hook_plugin", entry_points or ""), ("openclip_otco", "")):
            info = installed / f"{name}-1.0.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[open_clip_train.plugins]\n{points}\n")
        paths = os.pathsep.join([str(script), str(installed)])
        return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(
        self,
        name: str,
        script: Path,
        entry_points: str | None,
        *options: str,
        ranks: int = 1,
        torchrun: bool = False,
        file_size: int | None = None,
        module: str = "open_clip_train.main",
    ) -> Run:
        """Starts a run of one or several ranks, with `torchrun` or with what it tells its ranks.

        `module` is what `python -m` would be told. With `file_size`, no file that it writes can grow beyond so many
        bytes, as on a full disk.
        """
        defaults = {
            "model": f"local-dir:{self.folder}",
            "logs": f"{self.folder / name}",
            "name": "run",
            "train-data": f"{self.folder / 'small.csv'}",
            "dataset-type": "csv",
            "csv-separator": ",",
            "batch-size": "8",
            "epochs": "1",
            "workers": "0",
            "warmup": "5",
            "log-every-n-steps": "1",
            "device": "cpu",
            "precision": "fp32",
        }
        words = [part for option, value in defaults.items() for part in (f"--{option}", value)]
        words += [option.replace("RUN", str(self.folder / name / "run")) for option in options]
        environment = self.environment(script, entry_points)
        log = self.folder / f"{name}.txt"
        log.unlink(missing_ok=True)
        process: Process
        if torchrun:
            # Without the two dashes torchrun would take --logs for an abbreviation of its own options.
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
            command = [sys.executable, "-m", *launcher, module, *words]
            with log.open("wb") as file:
                process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=file, stderr=file)
        else:
            store = self.folder / f"{name}.store"
            store.unlink(missing_ok=True)
            forks = []
            for rank in range(ranks):
                told, url = {}, []
                if ranks > 1:
                    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    # A port could be taken by another test; a file cannot.
                    url = ["--dist-url", f"file://{store}?rank={rank}&world_size={ranks}"]
                forks.append(Fork(module, words + url, self.folder, {**environment, **told}, log, file_size))
            process = Forks(forks)
        return Run(process, self.folder / name / "run", log)

    def parse(self, script: Path, entry_points: str | None, *options: str) -> tuple[int, dict[str, Any], str]:
        """Only parses arguments: exit code, arguments as strings, everything printed."""
        environment = {**self.environment(script, entry_points), "COLUMNS": "200"}
        output, parsed = self.folder / "parsed.txt", self.folder / "parsed.json"
        for file in (output, parsed):
            file.unlink(missing_ok=True)
        code = Fork("parse_arguments", [str(parsed), *options], self.folder, environment, output).wait()
        return code, json.loads(parsed.read_text()) if parsed.exists() else {}, output.read_text()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    generator = np.random.default_rng(0)
    rows = []
    for i in range(32):
        path = folder / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        rows.append((path, f"picture number {i}"))
    for name, data in (("small", rows), ("large", (rows * 13)[:400])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), *data])
    return Lab(folder)


def assert_equal(ours: Any, theirs: Any) -> None:
    """To the bit, whatever is nested in it."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs
