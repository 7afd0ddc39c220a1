"""OpenCLIP's own tests, with the patch and the plugin as without: each test must end in the same way.

    python benchmarks/compatibility.py CHECKOUT --out docs/results/compatibility.jsonl

CHECKOUT is a clone of OpenCLIP. Each version that there is a patch for is taken from it (`git archive`), and the files
of its tests that need no network are run twice. A line of the output is one file of one version:

- `passed`, `failed`, `skipped`: how many tests ended so with the patch;
- `failed_without`: how many fail without it;
- `differ`: the tests that end in another way with the patch than without.

A file whose line is there is not run again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from openclip_otco.patch import installation

# Those of OpenCLIP's files of tests that need no network, of any version. Of the rest some need weights from a hub.
FILES = (
    "test_data_csv",
    "test_eval_task",
    "test_factory_task",
    "test_loss",
    "test_num_shards",
    "test_params",
    "test_retrieval_metrics",
    "test_siglip_chunked_loss",
    "test_task_base_unit",
    "test_task_checkpoint",
    "test_task_compile",
    "test_task_fsdp_unit",
    "test_task_specific_unit",
    "test_training_simple",
    "test_wds",
)
# A file that takes longer counts as one skipped test: some train large models, for which a CPU is too slow.
_SECONDS = 300


def commit(version: str) -> str:
    """What git calls a version of OpenCLIP."""
    return installation.COMMITS.get(version, f"v{version}")


def outcomes(report: Path) -> dict[str, str]:
    """How each test of a JUnit report ended: passed, failed or skipped."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


def compare(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, object]:
    """Counts of the outcomes with the patch, `ours`, and the tests that end otherwise without it, `theirs`."""
    counts = Counter(ours.values())
    differ = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return {
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "failed_without": Counter(theirs.values())["failed"],
        "differ": differ,
    }


def extract(checkout: Path, version: str, folder: Path) -> Path:
    """Sources and tests of a version, in a folder."""
    command = ["git", "-C", str(checkout), "archive", commit(version), "src", "tests", "pytest.ini"]
    content = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(folder: Path, file: str) -> dict[str, str]:
    """How the tests of a file end in a folder of sources and tests."""
    report = folder / f"{file}.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        f"tests/{file}.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {f"stopped after {_SECONDS} s": "skipped"}
    return outcomes(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of OpenCLIP")
    parser.add_argument("--version", action="append", choices=installation.supported_versions(), help="default: all")
    parser.add_argument("--file", action="append", choices=FILES, help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines; what is there is kept")
    args = parser.parse_args()
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    done = {(line["openclip"], line["file"]) for line in map(json.loads, lines)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "timm", "webdataset")}
    for version in args.version or installation.supported_versions():
        with tempfile.TemporaryDirectory() as name:
            theirs = extract(args.checkout, version, Path(name, "theirs"))
            ours = extract(args.checkout, version, Path(name, "ours"))
            installation.apply(ours / "src", version)
            for file in args.file or FILES:
                if (version, file) in done or not (ours / "tests" / f"{file}.py").exists():
                    continue
                found = compare(run(ours, file), run(theirs, file))
                line = {"openclip": version, "file": file, **found, "python": platform.python_version(), **versions}
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
