"""The exchange between the loss and the callback that makes its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from openclip_otco.method.features import Features
from openclip_otco.method.plan import TransportPlan


@dataclass
class PlanExchange:
    """A part of the loss. The callback sets the plans before a step; the loss adds what it found in the step.

    Attributes:
        drawn: the plans that generate the transported pairs.
        newest: the plan that measures trust and weighs negatives; `None`: there is none yet.
        keeps_features: whether the loss keeps the features of the global batch here until `take_features`.
        features: the features of the global batch of the last call, without gradient; `None`: not kept, or taken.
        plans_acted: whether the last call used plans, in a weight of a pair or of a negative, or in a transported pair.
        effective_share: the effective share of the batch in the last loss, a scalar; `None`: all pairs weigh alike.
        matched_share: the share of matched pairs that the plan found, a scalar; `None`: not estimated.

    Example::

        loss = OTCOLoss()
        loss.exchange.set_plans([plan], newest=plan)
        loss(image_features, text_features, logit_scale).backward()
        print(loss.exchange.matched_share)
    """

    drawn: tuple[TransportPlan, ...] = ()
    newest: TransportPlan | None = None
    keeps_features: bool = False
    features: Features | None = None
    plans_acted: bool = False
    effective_share: Tensor | None = None
    matched_share: Tensor | None = None

    def set_plans(self, drawn: Sequence[TransportPlan], newest: TransportPlan | None) -> None:
        """Sets the plans of the coming steps.

        Args:
            drawn: those that generate transported pairs.
            newest: the one that measures trust and weighs negatives; `None`: there is none.
        """
        self.drawn, self.newest = tuple(drawn), newest

    def plans(self) -> tuple[TransportPlan, ...]:
        """All plans that the coming step may use."""
        return self.drawn if self.newest is None else (*self.drawn, self.newest)

    def keep(self, features: Features) -> None:
        """Keeps the features of the global batch if somebody wants them."""
        if self.keeps_features:
            self.features = features.detach()

    def take_features(self) -> Features | None:
        """Returns the features that were kept, and forgets them, so that their memory can be freed."""
        features, self.features = self.features, None
        return features
