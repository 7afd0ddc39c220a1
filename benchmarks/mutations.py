"""Breaks one important line at a time, and checks that a test fails each time.

`python benchmarks/mutations.py [--only WORD]` works on a copy of the files that git knows, two mutants at a time, and
prints a table in Markdown: the file, what was broken, the test that fails. It exits with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
JOBS = 2


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, is replaced by `new`; one of `tests` has to fail."""

    file: str
    what: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("ot/half_steps.py", "the c-transform forgets the masses", "bias = g / epsilon + log_b", "bias = g / epsilon",
           "tests/ot/test_sinkhorn.py"),
    Mutant("ot/sinkhorn.py", "it stops at a hundred times the tolerance", "while best.error > tol and",
           "while best.error > 100 * tol and", "tests/ot/test_sinkhorn.py"),
    Mutant("ot/combinatorial.py", "the plan is taken before its error is proven",
           "plan = _best_plan(auction, additive_error)",
           "additive_error *= 3\n    plan = _best_plan(auction, additive_error)", "tests/ot/test_combinatorial.py"),
    Mutant("ot/marginals.py", "masses are not scaled to one", "return row_mass / total_a, col_mass / total_b",
           "return row_mass, col_mass", "tests/ot"),
    Mutant("ot/divergence.py", "the entropic bias stays in", "- (terms[1] + terms[2]) / 2", "- terms[1]",
           "tests/ot/test_divergence.py"),
    Mutant("method/plan.py", "a share forgets that support points weigh 1/N",
           "F.logsigmoid(mass - math.log(len(self)))",
           "F.logsigmoid(mass)", "tests/test_plan.py"),
    Mutant("method/plan.py", "the own pair's share goes to nobody",
           "out[:, :d] + out[:, d : d + 1] * own", "out[:, :d]",
           "tests/test_plan.py"),
    Mutant("method/plan.py", "the digest leaves out a potential",
           "self.text_features, self.f, self.g):\n            digest",
           "self.text_features, self.f):\n            digest", "tests/test_plan.py"),
    Mutant("method/posterior.py", "the share stops at the wrong end",
           "(1 - 1 / ratio).sum() >= 0, torch.ones_like(share)",
           "(1 - 1 / ratio).sum() >= 0, torch.zeros_like(share)", "tests/test_posterior.py"),
    Mutant("evaluate/ranks.py", "a tie counts for the model", "scores >= best - TIE", "scores > best + TIE",
           "tests/test_evaluate.py"),
    Mutant("baselines/key_queue.py", "the queue keeps the oldest keys", "side[-self.size :].clone()",
           "side[: self.size].clone()", "tests/test_baselines.py"),
    Mutant("baselines/key_queue.py", "a key that is not finite gets in", "new = Features(*(side[finite]",
           "new = Features(*(side", "tests/test_baselines.py"),
    Mutant("baselines/momentum.py", "momentum encoders take gradients", ".requires_grad_(False).train()", ".train()",
           "tests/test_baselines.py"),
    Mutant("baselines/otter.py", "own pairs stay in the soft targets", "similarity -= _DIAGONAL", "similarity -= 0.0",
           "tests/test_baselines.py"),
    Mutant("frozen/memory.py", "only the first half of an input makes its key", "hashlib.sha256(row).digest()",
           "hashlib.sha256(row[: len(row) // 2]).digest()", "tests/test_frozen.py"),
    Mutant("scenes/mismatch.py", "a picture may get its own caption", "takers[step:] + takers[:step]", "takers",
           "tests/test_scenes.py"),
    Mutant("study/table.py", "intervals are normal, not Student's", "float(student_t.ppf(0.975, len(values) - 1))",
           "1.96", "tests/test_study_table.py"),
    Mutant("files.py", "results are written in place", "os.replace(part, path)",
           'path.write_text(text, encoding="utf-8")', "tests/test_compare.py tests/test_pages.py"),
    Mutant("pages/page.py", "captions are not escaped", "autoescape=True", "autoescape=False", "tests/test_pages.py"),
    Mutant("ot/anderson.py", "steps that hardly differ may ask for any share", "_LARGEST_SHARE = 1e4",
           "_LARGEST_SHARE = torch.inf", "tests/ot/test_sinkhorn.py"),
    Mutant("ot/group.py", "the least overwrites what it is given",
           "self._reduced(part.clone(memory_format=torch.contiguous_format), dist.ReduceOp.MIN)",
           "self._reduced(part, dist.ReduceOp.MIN)", "tests/test_group.py"),
    Mutant("method/window.py", "each step has the same subsample",
           "self.seed * 1_000_003 + step", "self.seed * 1_000_003",
           "tests/test_cache.py"),
    Mutant("train/callback.py", "plans act in the warm-up", "if step < self.warmup_steps:", "if step < 0:",
           "tests/test_callback.py"),
    Mutant("train/callback.py", "a plan acts for ever",
           "self.cache.drop_before(step - self.max_age * self.window.steps)",
           "self.cache.drop_before(-1)", "tests/test_callback.py"),
    Mutant("method/weights.py", "tempering stops at a lower share", ".where(shares >= least_share, 0)",
           ".where(shares >= 0.9 * least_share, 0)", "tests/test_loss.py"),
    Mutant("method/exchange.py", "the window gets features with their graphs", "self.features = features.detach()",
           "self.features = features", "tests/test_loss.py"),
    Mutant("audit/pairs.py", "smaller batches after a stop judge pairs twice", "skip = max(0, skip - len(pairs))",
           "skip = 0", "tests/test_audit.py"),
    Mutant("audit/clean.py", "clean data of other data are written", "kept.check_all_found()", "pass",
           "tests/test_audit.py"),
    Mutant("frozen/data.py", "ranks with other features train", "if len(set(digests)) > 1:", "if False:",
           "tests/test_feature_tables.py"),
    Mutant("patch/installation.py", "two processes patch at once", "fcntl.flock(file, fcntl.LOCK_EX)", "pass",
           "tests/test_patching.py"),
]  # fmt: skip


def run(mutant: Mutant, tree: Path) -> str | None:
    """The first test that fails; `None` if all pass.

    Raises:
        ValueError: the line is not in the file, or is there twice.
    """
    file = tree / "openclip_otco" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times, not once")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *mutant.tests.split(),
        ]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return None
    red = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if red is None:
        raise RuntimeError(f"{mutant.file}: {mutant.what}: no test ran\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return red[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="mutants whose file or description has it")
    args = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if args.only in f"{mutant.file} {mutant.what}"]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(JOBS) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(JOBS):
            for name in files:
                target = Path(folder, str(job), name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
            trees.put(Path(folder, str(job)))

        def tried(mutant: Mutant) -> str | None:
            tree = trees.get()
            try:
                return run(mutant, tree)
            finally:
                trees.put(tree)

        print("| file | what was broken | test that goes red |\n| --- | --- | --- |")
        survivors = 0
        for mutant, red in zip(mutants, pool.map(tried, mutants), strict=True):
            name = "**none**" if red is None else f"`{red.removeprefix('tests/').partition('[')[0]}`"
            print(f"| `{mutant.file}` | {mutant.what} | {name} |", flush=True)
            survivors += red is None
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
