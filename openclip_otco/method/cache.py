"""What is kept between steps: the window of features that the next plan is made of, and the plans themselves."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from openclip_otco.method.plan import TransportPlan


class FeatureWindow:
    """The image and text features of the last optimizer steps, at most `max_support` pairs of them.

    Args:
        steps: `Δ >= 1`, the steps that make a window.
        max_support: cap on the pairs kept; above it each step gives a seeded subsample of its share, so that memory
            stays `O(max_support · d)` whatever the batch.
        seed: of the subsample; with the same seed all ranks choose the same pairs.

    Raises:
        ValueError: `steps` or `max_support` below one.
    """

    def __init__(self, steps: int = 8, max_support: int = 8192, seed: int = 0) -> None:
        if steps < 1 or max_support < 1:
            raise ValueError(f"steps and max_support must be at least 1; got {steps} and {max_support}")
        self.steps, self.max_support, self.seed = steps, max_support, seed
        self._batches: list[tuple[Tensor, Tensor]] = []
        self.dropped = 0

    def __len__(self) -> int:
        """Steps in the window."""
        return len(self._batches)

    @property
    def full(self) -> bool:
        return len(self) >= self.steps

    def add(self, image_features: Tensor, text_features: Tensor, step: int) -> None:
        """Takes the `(B, d)` features of one step."""
        images, texts = image_features.detach().float(), text_features.detach().float()
        # The k-th step gets the k-th part of the cap, so that the parts add up to it exactly.
        k = len(self)
        quota = self.max_support * (k + 1) // self.steps - self.max_support * k // self.steps
        if len(images) > quota:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            chosen = torch.randperm(len(images), generator=generator)[:quota].sort().values.to(images.device)
            images, texts = images[chosen], texts[chosen]
        self._batches.append((images.clone(), texts.clone()))

    def skip(self) -> None:
        """Counts a step that gave nothing, so that windows of all ranks fill up at the same step."""
        self._batches.append((torch.zeros(0, 1), torch.zeros(0, 1)))

    def features(self) -> tuple[Tensor, Tensor]:
        """Image and text features, `(N, d)` each, of the whole window; pairs with a NaN or an infinity are left out
        and counted in `dropped`.

        Raises:
            ValueError: there are none.
        """
        if not self._batches:
            raise ValueError("the window is empty")
        batches = [batch for batch in self._batches if len(batch[0])] or self._batches[:1]
        images, texts = (torch.cat(features) for features in zip(*batches, strict=True))
        # Here and not in `add`: a GPU would have to be waited for at every step.
        finite = torch.isfinite(images).all(dim=1) & torch.isfinite(texts).all(dim=1)
        left = int(finite.sum())
        self.dropped += len(finite) - left
        if not left:
            raise ValueError("the window holds no finite features")
        return images[finite], texts[finite]

    def clear(self) -> None:
        self._batches.clear()

    def digest(self) -> str:
        """A hash of the features: equal on two ranks only if they are, to the bit."""
        digest = hashlib.sha256()
        for images, texts in self._batches:
            digest.update(str(tuple(images.shape)).encode())
            for side in (images, texts):
                digest.update(side.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": [list(batch) for batch in self._batches], "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Takes up a saved window; of a longer or larger one, what this window has room for.

        Raises:
            KeyError, TypeError, ValueError: the state is none. The window is empty then.
        """
        self.clear()
        try:
            room = self.steps - 1  # a full window has become a plan before it is saved
            for index, (images, texts) in enumerate(state["batches"][-room:] if room else []):
                if not images.is_floating_point() or images.ndim != 2 or images.shape != texts.shape:
                    raise ValueError("a window's features must be pairs of (B, d) tensors")
                self.add(images.to(device), texts.to(device), step=index)
            if len({images.shape[1] for images, _ in self._batches if len(images)}) > 1:
                raise ValueError("a window's features must have one width")
            self.dropped = int(state["dropped"])
        except Exception:
            self.clear()
            raise


class PlanCache:
    """A bounded dictionary from step to plan, oldest out first.

    Args:
        size: plans kept, at least 1.
        seed: of the draws. A draw depends on seed and step alone, so a resumed run draws as an uninterrupted one.

    Raises:
        ValueError: `size` below one.
    """

    def __init__(self, size: int = 4, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"a plan cache must keep at least 1 plan; got {size}")
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

    def clear(self) -> None:
        self._plans.clear()

    def draw(self, count: int, step: int) -> tuple[TransportPlan, ...]:
        """`count` different plans for `step`, or all where there are fewer."""
        generator = random.Random(f"{self.seed}/{step}")
        return tuple(generator.sample(list(self._plans.values()), min(count, len(self))))

    def digest(self) -> str:
        """A hash of the plans: equal on two ranks only if they are, to the bit."""
        plans = [f"{plan.step} {plan.epsilon} {plan.coupled} {plan.digest()}" for plan in self._plans.values()]
        return hashlib.sha256("\n".join(plans).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {"plans": [plan.state_dict() for plan in self._plans.values()]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Takes up saved plans, the newest ones where there are more than `size`.

        Raises:
            KeyError, TypeError, ValueError: the state is none. The cache is as it was then.
        """
        plans = [TransportPlan.from_state_dict(plan).to(device) for plan in state["plans"]]
        if len({plan.image_features.shape[1] for plan in plans}) > 1:
            raise ValueError("plans of different widths")
        self._plans.clear()
        for plan in plans:
            self.add(plan)
