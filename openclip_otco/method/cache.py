"""The cache: it keeps the last plans, and each step draws some of them."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from openclip_otco.method.plan import TransportPlan
from openclip_otco.rules import AT_LEAST_ONE


class PlanCache:
    """A dictionary from step to plan. When it is full, a new plan replaces the oldest one.

    Args:
        size: plans kept, at least 1.
        seed: seed of the draws. With the same plans, a draw depends on seed and step alone. So a resumed run draws the
            same plans as an uninterrupted run.

    Raises:
        ValueError: `size` below one.
    """

    def __init__(self, size: int = 4, seed: int = 0) -> None:
        AT_LEAST_ONE.check(size=size)
        self.size, self.seed = size, seed
        self._plans: OrderedDict[int, TransportPlan] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[int]:
        return iter(self._plans)

    def __getitem__(self, step: int) -> TransportPlan:
        return self._plans[step]

    @property
    def newest(self) -> TransportPlan | None:
        """The newest plan; `None`: the cache is empty."""
        return next(reversed(self._plans.values()), None)

    def add(self, plan: TransportPlan) -> None:
        """Keeps `plan` under its step; drops the oldest ones beyond `size`."""
        self._plans[plan.step] = plan
        self._plans.move_to_end(plan.step)
        while len(self) > self.size:
            self._plans.popitem(last=False)

    def drop_before(self, step: int) -> None:
        """Drops the plans of earlier steps."""
        for old in [at for at in self._plans if at < step]:
            del self._plans[old]

    def shift(self, steps: int) -> None:
        """Counts the steps of all plans anew, `steps` later; ages stay."""
        plans = [replace(plan, step=plan.step + steps) for plan in self._plans.values()] if steps else []
        for plan in plans:
            del self._plans[plan.step - steps]
        for plan in plans:
            self.add(plan)

    def clear(self) -> None:
        """Takes all plans out."""
        self._plans.clear()

    def draw(self, count: int, step: int) -> tuple[TransportPlan, ...]:
        """`count` different plans for `step`, or all where there are fewer."""
        generator = random.Random(f"{self.seed}/{step}")
        return tuple(generator.sample(list(self._plans.values()), min(count, len(self))))

    def digest(self) -> str:
        """A hash of the plans. It is equal on two ranks only if their plans are equal to the bit."""
        plans = [f"{plan.step} {plan.epsilon} {plan.coupled} {plan.digest()}" for plan in self._plans.values()]
        return hashlib.sha256("\n".join(plans).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {"plans": [plan.state_dict() for plan in self._plans.values()]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Loads saved plans onto `device`; only the newest `size` plans where more were saved.

        Raises:
            KeyError, TypeError, ValueError: this is not the state of a cache. The cache stays as it was.
        """
        plans = [TransportPlan.from_state_dict(plan).to(device) for plan in state["plans"]]
        if len({plan.image_features.shape[1] for plan in plans}) > 1:
            raise ValueError("plans of different widths")
        self._plans.clear()
        for plan in plans:
            self.add(plan)
