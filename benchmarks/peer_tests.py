"""Judges the solvers by the tests of their peers: POT's of Sinkhorn and exact transport, geomloss's of `ot.solve*`.

    git clone https://github.com/PythonOT/POT; git clone --branch v0.3.1 https://github.com/jeanfeydy/geomloss
    pip install pytest pytest-check
    python benchmarks/peer_tests.py --pot POT --geomloss geomloss --out docs/results/peer-tests.jsonl

The peers' test files are run as they are. Plugins of pytest (`peer_pot.py`, `peer_geomloss.py`) put this package in the
place of the functions under test: for all calls, and, as many of POT's tests compare its functions with one another, in
turns with POT. POT itself is the installed one; geomloss is taken from the checkout, its dependencies are installed.

Each line of the result is one test function: `passed`, `failed` with the first message, or `not applicable` with what
this package does not have.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

_BARYCENTER = "barycenters are not in our API"
_NO_GRADIENT = "a matrix or masses get no gradient; only features do, by sinkhorn_divergence"
_SPARSE = "costs with missing entries are not in our API"
_NAMES = "asks for names of POT's algorithms, of which this package has one"
_PART_WAY = "exact_plan neither returns unfinished plans nor starts from given duals"

# Tests that ask for what this package does not have, by the pattern of their name; the first that fits counts.
NOT_APPLICABLE = {
    "POT": {
        "*barycenter*": _BARYCENTER,
        "test_wasserstein_bary*": _BARYCENTER,
        "test_not_implemented_method": _NAMES,
        "test_implemented_methods": _NAMES,
        "test_nan_warning*": "epsilon = 0 is an error here, not a warning",
        "test_emd_sparse_warmstart": _PART_WAY,
        "test_emd_sparse*": _SPARSE,
        "test_emd2_sparse*": _SPARSE,
        "*lazy_warmstart": _PART_WAY,
        "test_emd__dual_warmstart": _PART_WAY,
        "test_warnings": _PART_WAY,
        "*gradient*": _NO_GRADIENT,
        "*_tf": "TensorFlow is not a backend of this package",
        "test_unmix": "unmixing is not in our API",
        "test_screenkhorn": "screening is not in our API",
        "test_geomloss_solver": "judges POT's call of geomloss, which geomloss's own tests cover here",
        "test_convolutional*": _BARYCENTER,
        "test_clean_discrete_measure": "helper of POT's barycenters",
        "test_to_int_array": "helper of POT's barycenters",
    },
    "geomloss": {},
}
# Why tests fail that ask for more than a function promises. A test that fails and is not here has pytest's first line.
_OPTIMUM = "asks for the optimum to seven digits; the plan promises an additive error, here 0.001 of the cost's range"
_COLD = "from zero, 2,000 iterations are too few for an epsilon of 1/1000 of the cost's range and less"
REASONS = {
    "combinatorial_plan": dict.fromkeys(
        ("test_emd_emd2", "test_emd_empty", "test_emd2_multi", "test_dual_variables"), _OPTIMUM
    ),
    "sinkhorn from zero": dict.fromkeys(
        ("test_correct_values_random", "test_correct_values_convex_gradients", "test_correct_values_gaussians"), _COLD
    ),
}
UNANSWERED = "calls none of the functions that this package stands in for"
FILES = {
    "POT": {"ot": "test/test_ot.py", "bregman": "test/test_bregman.py"},
    "geomloss": {"solve": "tests/test_ot_solve_matrix.py", "solve_sample": "tests/test_ot_solve_sample.py"},
}
PASSED, FAILED, OTHER = "passed", "failed", "not applicable"


@dataclass(frozen=True)
class Case:
    """One case of a test, as pytest tells it.

    Attributes:
        test: name of the test function.
        outcome: `passed`, `failed` or `not applicable`.
        why: first line of what failed, or of what is missing.
        calls: calls that this package answered.
        given_up: problems whose error was still above the tolerance after the most iterations (geomloss's tests alone).
    """

    test: str
    outcome: str
    why: str
    calls: int
    given_up: int = 0


@dataclass(frozen=True)
class Line:
    """One test function of a peer, over all its cases. `file` names its file in `FILES`, `ours` the function of this
    package that it judges, `answers` the share of the calls that this package answers."""

    peer: str
    file: str
    ours: str
    answers: str
    test: str
    outcome: str
    why: str
    cases: int
    calls: int
    given_up: int
    versions: str


@dataclass(frozen=True)
class Judgement:
    """One run of a peer's test file."""

    peer: str
    file: str
    ours: str
    plugin: str
    every: int
    planner: str = "exact_plan"

    @property
    def answers(self) -> str:
        return "every call" if self.every == 1 else "every other call"


JUDGEMENTS = (
    Judgement("POT", "ot", "exact_plan", "peer_pot", 1, "exact_plan"),
    Judgement("POT", "ot", "exact_plan", "peer_pot", 2, "exact_plan"),
    Judgement("POT", "ot", "combinatorial_plan", "peer_pot", 1, "combinatorial_plan"),
    Judgement("POT", "bregman", "sinkhorn", "peer_pot", 1),
    Judgement("POT", "bregman", "sinkhorn", "peer_pot", 2),
    Judgement("geomloss", "solve", "sinkhorn from zero", "peer_geomloss", 1, "none"),
    Judgement("geomloss", "solve", "sinkhorn from exact_plan", "peer_geomloss", 1, "exact_plan"),
    Judgement("geomloss", "solve_sample", "sinkhorn from zero", "peer_geomloss", 1, "none"),
    Judgement("geomloss", "solve_sample", "sinkhorn from exact_plan", "peer_geomloss", 1, "exact_plan"),
)


def missing(peer: str, test: str) -> str | None:
    """What this package does not have that the test asks for; `None` where it has all."""
    return next((why for pattern, why in NOT_APPLICABLE[peer].items() if fnmatch(test, pattern)), None)


def cases_of(report: str) -> list[Case]:
    """The cases of a JUnit report."""
    return [_case(element) for element in ElementTree.fromstring(report).iter("testcase")]


def _case(element: ElementTree.Element) -> Case:
    test = str(element.get("name")).split("[")[0]
    calls, given_up = (
        sum(int(str(p.get("value"))) for p in element.iter("property") if p.get("name") == name)
        for name in ("calls", "given_up")
    )
    for tag, outcome in (("error", FAILED), ("failure", FAILED), ("skipped", OTHER)):
        found = element.find(tag)
        if found is not None:
            return Case(test, outcome, first_line(str(found.get("message"))), calls, given_up)
    return Case(test, PASSED, "", calls, given_up) if calls else Case(test, OTHER, UNANSWERED, 0)


def first_line(message: str) -> str:
    """The first line of a message that says something, without the name of this machine's folders."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    # NumPy's and hypothesis's messages begin with a bare name of the error.
    telling = [line for line in lines if not line.endswith(("Error:", "Error"))]
    return (telling or lines or [""])[0][:200]


def summed(cases: Iterable[Case], judged: Judgement, versions: str) -> list[Line]:
    """One line a test function: failed where a case failed, not applicable where none ran."""
    by_test: dict[str, list[Case]] = {}
    for case in cases:
        by_test.setdefault(case.test, []).append(case)
    lines = []
    for test, group in by_test.items():
        worst = min(group, key=lambda case: (FAILED, PASSED, OTHER).index(case.outcome))
        why = REASONS.get(judged.ours, {}).get(test, worst.why) if worst.outcome == FAILED else worst.why
        lines.append(
            Line(judged.peer, judged.file, judged.ours, judged.answers, test, worst.outcome, why, len(group),
                 sum(case.calls for case in group), sum(case.given_up for case in group), versions)
        )  # fmt: skip
    return lines


def run(judged: Judgement, checkout: Path, versions: str) -> list[Line]:
    """Runs one file of the peer's tests in a process of its own.

    Raises:
        SystemExit: pytest could not run it.
    """
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [str(here), str(here.parent), *((str(checkout / "src"),) if judged.peer == "geomloss" else ())]
        environment = os.environ | {
            "PEER": judged.peer,
            "PEER_EVERY": str(judged.every),
            "PEER_PLANNER": judged.planner,
            # This package takes arrays of NumPy and torch; another benchmark installs JAX, and POT would test with it.
            "POT_BACKEND_DISABLE_JAX": "1",
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            # The same examples and no files beside the checkout's.
            "HYPOTHESIS_STORAGE_DIRECTORY": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(checkout),
            "-p", "no:cacheprovider", "-p", "peer_tests", "-p", judged.plugin,
            "--junitxml", str(report), "--tb", "line",
            str(checkout / FILES[judged.peer][judged.file]),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest could not run {command[-1]}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return summed(cases_of(report.read_text(encoding="utf-8")), judged, versions)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """This file is a plugin, too: it skips the tests that ask for what this package does not have."""
    for item in items:
        why = missing(os.environ["PEER"], item.originalname)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


def versions_of(peer: str, checkout: Path) -> str:
    """What was judged and by what: the commit of the tests, the installed libraries."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False
    )
    tests = told.stdout.strip() or "no git checkout"
    libraries = ("torch", "numpy", "POT") if peer == "POT" else ("torch", "numpy", "hypothesis")
    return ", ".join([f"tests {tests}", *(f"{name} {importlib.metadata.version(name)}" for name in libraries)])


def checkout_of(given: Path | None, variable: str, peer: str) -> Path | None:
    """The peer's checkout, from the flag or the variable.

    Raises:
        SystemExit: it holds no such tests.
    """
    folder = given or (Path(os.environ[variable]) if variable in os.environ else None)
    if folder is None:
        return None
    for name in FILES[peer].values():
        if not (folder / name).is_file():
            raise SystemExit(f"{folder} holds no {name}: give a checkout of {peer} (--{peer.lower()} or {variable})")
    return folder.resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--pot", type=Path, help="checkout of POT (or POT_CHECKOUT)")
    parser.add_argument("--geomloss", type=Path, help="checkout of geomloss (or GEOMLOSS_CHECKOUT)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/peer-tests.jsonl"), help="%(default)s")
    args = parser.parse_args(arguments)
    checkouts = {
        "POT": checkout_of(args.pot, "POT_CHECKOUT", "POT"),
        "geomloss": checkout_of(args.geomloss, "GEOMLOSS_CHECKOUT", "geomloss"),
    }
    if not any(checkouts.values()):
        parser.error("give a checkout of a peer: --pot or --geomloss")
    lines: list[Line] = []
    for judged in JUDGEMENTS:
        checkout = checkouts[judged.peer]
        if checkout is None:
            continue
        found = run(judged, checkout, versions_of(judged.peer, checkout))
        counts = {outcome: sum(line.outcome == outcome for line in found) for outcome in (PASSED, FAILED, OTHER)}
        print(judged.peer, judged.ours, judged.answers, counts, flush=True)
        lines += found
    args.out.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
