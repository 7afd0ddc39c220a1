"""What OTCO costs in addition to CLIP, as a function of B, W, Δ, d and N; `scaling.py` compares it with counts.

Operations are the floating-point multiplications and additions of matrix products, per rank. Bytes on the wire are
those that a rank hands to collectives; an all-reduce moves up to twice as many, for any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
DRIFT_SUPPORT = 256


@dataclass(frozen=True)
class Run:
    """A training: local batch `B`, ranks `W`, window `Δ`, width `d`, largest support, plans kept, plans in a step."""

    batch: int
    ranks: int
    window: int = 8
    width: int = 512
    max_support: int = 8192
    cache_size: int = 4
    plans_per_step: int = 1

    @property
    def support(self) -> int:
        """`N = min(Δ·B·W, cap)`."""
        return min(self.window * self.batch * self.ranks, self.max_support)

    def plan_floats(self, iterations: int) -> int:
        """Floats handed to collectives for one warm-started plan.

        Initial plan (N + 1), previous potentials (N), the two starts compared (2N), the kernel's duals (N), first
        half-step (N), one sum (N + 1) an iteration, potentials (N); then diagnostics (3 in double precision) and drift
        (2). Before each of these, and at the end of three attempts, one word of whether a rank has failed.
        """
        n = self.support
        return 0 if self.ranks == 1 else 7 * n + 1 + iterations * (n + 1) + 8 + (9 + iterations) + 3

    def plan_operations(self, first: bool = False) -> float:
        """Operations of the products of images with texts, for one warm-started plan.

        The first rank computes the whole cost for the initial plan, and the drift: a divergence of three terms for each
        modality, of 512 points at most. Each other rank computes its rows and its columns of the cost. Every rank
        computes its share of the last plan's potentials.
        """
        product = 2.0 * self.support**2 * self.width
        drift = 6 * 2.0 * min(self.support, DRIFT_SUPPORT) ** 2 * self.width
        return product / self.ranks + (product + drift if first else 2 * product / self.ranks)

    def kernel_operations(self, iterations: int) -> float:
        """Operations of the matrix-vector products: two in each iteration, with this rank's columns of the kernel."""
        return (2 * iterations + 1) * 2.0 * self.support**2 / self.ranks

    def confidence_operations(self) -> float:
        """Operations of confidence in a step: two potentials of each local pair."""
        return 2 * 2.0 * self.batch * self.support * self.width

    def confidence_floats(self) -> int:
        """Floats that a step gathers for confidence: trust and two potentials for negatives, of each local pair."""
        return 0 if self.ranks == 1 else 3 * self.batch

    def transport_floats(self) -> int:
        """Floats that a step with λ > 0 gathers: both transported views of each local pair, for each plan drawn."""
        return 0 if self.ranks == 1 else self.plans_per_step * 2 * self.batch * self.width

    def transport_operations(self) -> float:
        """Forward operations of a step with λ > 0, for each plan drawn: potentials, and attention over the support."""
        padded = -(-(self.width + 2) // 8) * 8
        support = self.support + 1
        attention = 2 * 2 * 2.0 * self.batch * support * padded
        return self.plans_per_step * (self.confidence_operations() + attention)

    def clip_operations(self) -> float:
        """Forward operations of CLIP's own logits with `--local-loss`, to compare with."""
        return 2 * 2.0 * self.batch * self.batch * self.ranks * self.width

    def clip_floats(self) -> int:
        """Floats that CLIP itself gathers: its features."""
        return 0 if self.ranks == 1 else 2 * self.batch * self.width

    def memory(self) -> int:
        """Bytes that stay allocated: the kept plans, and the window."""
        features = 2 * self.support * self.width
        return FLOAT * (self.cache_size * (features + 2 * self.support) + features)

    def working_memory(self) -> int:
        """Bytes while a plan is made: this rank's columns of the kernel, and rows and columns of the cost."""
        return 3 * FLOAT * self.support * -(-self.support // self.ranks)
