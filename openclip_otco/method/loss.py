"""OTCO loss: InfoNCE weighted by plan confidence, with transported pairs beside the real ones."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, gather_features
from torch import Tensor

from openclip_otco.method.exchange import PlanExchange
from openclip_otco.method.features import Features
from openclip_otco.method.plan import Potentials, TransportPlan
from openclip_otco.method.posterior import log_posterior, matched_share
from openclip_otco.method.weights import NEGATIVES, log_negative_weights, tempered
from openclip_otco.ot import sinkhorn_divergence
from openclip_otco.ot.defaults import EPSILON
from openclip_otco.rules import NOT_NEGATIVE, POSITIVE, SHARE, one_of

# What trust in a pair is: the probability that it is matched, or the method's plan confidence.
TRUSTS = ("posterior", "share")


class Asked(NamedTuple):
    """What the newest plan says of the global batch.

    Args:
        log_trust: `(n,)`, of the pairs: the logarithm of their density, or of their confidence. None: not asked.
        potentials: of their images and texts, `(n,)` each, as members of the support. None: not asked.
    """

    log_trust: Tensor | None = None
    potentials: Potentials | None = None


class OTCOLoss(ClipLoss):
    """`ClipLoss` with cached transport plans at work (method, section 4).

        L = Σ_i c_i · InfoNCE(v_i, t_i)
          + λ/K · Σ_k Σ_i c_i · [InfoNCE(v'_i, t_i) + InfoNCE(v_i, t'_i)]
          + μ · S_ε(V, T)

    In the first term `log w_ij` is added to the logit of the negative `(i, j)` (`method/weights.py`). `v'` is
    compared among texts and `t'` among images, never across. Until plans are set (`exchange.set_plans`), and
    with `λ = γ = μ = β = 0`, it is `ClipLoss` to the bit.

    Args:
        confidence: `γ >= 0`, the power of the plan confidence that makes the weights `c_i`; 0 switches them off.
        trust: what is raised to that power. `posterior`: the probability that the pair is matched, with the share of
            matched pairs estimated from the batch (`posterior.matched_share`): on clean captions nearly all weights are
            1. `share`: the own pair's shares of its row and column of the plan, as the method has it.
        least_share: in `[0, 1]`, the least effective share of the batch that confidence leaves to carry the loss; a
            step that would fall below takes a smaller power (`tempered`). 0 sets no limit. A young model's confidence
            rests on a few pairs; without a limit the model learns those alone, and training can collapse. With
            `posterior`, a step whose estimated share of matched pairs is smaller weighs all pairs alike.
        negatives: what weighs negatives: `plan`, its density at them; `similarity`, their cosine alone, to compare
            with; `none`.
        negative_power: `β >= 0`, the power of that density; of the similarity, `β/ε` is the factor.
        transport_weight: `λ >= 0`, of the transported pairs.
        own_pair: whether a pair's own partner is in the support that transports it. Without it `v'` is made of other
            samples alone, and `(v', t)` is no positive pair; to compare with.
        divergence_weight: `μ >= 0`, of the Sinkhorn divergence between the batch's images and texts.
        epsilon: `ε` of that divergence, in units of the cost.
        clip_options: `local_loss`, `gather_with_grad`, `cache_labels`, `rank`, `world_size`, as in
            `open_clip.ClipLoss`.

    Attributes:
        exchange: where plans are set, and where the loss says what it found in a step (`PlanExchange`).

    Raises:
        ValueError: a setting out of its range, or a name for `trust` or `negatives` that there is not.

    Example:
        ```python
        loss = OTCOLoss()
        loss.exchange.set_plans([plan], newest=plan)
        losses = loss(image_features, text_features, logit_scale, output_dict=True)
        sum(losses.values()).backward()
        ```
    """

    def __init__(
        self,
        confidence: float = 2.0,
        transport_weight: float = 0.0,
        divergence_weight: float = 0.0,
        epsilon: float = EPSILON,
        least_share: float = 0.25,
        own_pair: bool = True,
        trust: str = "posterior",
        negatives: str = "plan",
        negative_power: float = 0.6,
        **clip_options: Any,
    ) -> None:
        super().__init__(**clip_options)
        NOT_NEGATIVE.check(
            confidence=confidence,
            transport_weight=transport_weight,
            divergence_weight=divergence_weight,
            negative_power=negative_power,
        )
        POSITIVE.check(epsilon=epsilon)
        SHARE.check(least_share=least_share)
        one_of(TRUSTS).check(trust=trust)
        one_of(NEGATIVES).check(negatives=negatives)
        self.confidence = confidence
        self.trust = trust
        self.negatives, self.negative_power = negatives, negative_power
        self.least_share = least_share
        self.transport_weight = transport_weight
        self.own_pair = own_pair
        self.divergence_weight = divergence_weight
        self.epsilon = epsilon
        self.exchange = PlanExchange()

    @property
    def _weighs_negatives(self) -> bool:
        return bool(self.negatives != "none" and self.negative_power)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """The loss of `(B, d)` unit-norm image and text features; row `i` of both is one pair.

        Args:
            image_features, text_features: this rank's.
            logit_scale: factor of the cosines, a scalar.
            logit_bias: added to the logits, a scalar; `None`: nothing.
            output_dict: whether to return a dict.

        Returns:
            The sum, or with `output_dict` its weighted terms: `contrastive_loss`, and where they act `transport_loss`
            and `divergence_loss`. Whoever trains adds the entries up, so nothing else may stand among them.

        Raises:
            ValueError: the plans are of features of another width.
        """
        for plan in self.exchange.plans():
            if plan.image_features.shape[1] != image_features.shape[1]:
                raise ValueError(
                    f"the plan of step {plan.step} couples features of width {plan.image_features.shape[1]}, the model "
                    f"makes features of width {image_features.shape[1]}; resume from a checkpoint of this model"
                )
        local = Features(image_features, text_features)
        everyone = self._gather(local)
        # The window is fed from here: no second collective.
        self.exchange.keep(everyone)
        rows = local if self.local_loss else everyone
        asked = self._ask(local)
        weights = self._weights(asked)
        transports = bool(self.transport_weight and self.exchange.drawn)
        self.exchange.plans_acted = transports or weights is not None or (asked is not None and self._weighs_negatives)
        losses = {"contrastive_loss": self._info_nce(rows, everyone, logit_scale, logit_bias, weights, asked)}
        if transports:
            total = torch.zeros((), device=image_features.device)
            for plan in self.exchange.drawn:
                moved = self._transported(plan, local)
                moved_everyone = self._gather(moved)
                moved = moved if self.local_loss else moved_everyone
                for x, all_x in (
                    (Features(moved.images, rows.texts), Features(moved_everyone.images, everyone.texts)),
                    (Features(rows.images, moved.texts), Features(everyone.images, moved_everyone.texts)),
                ):
                    total = total + self._info_nce(x, all_x, logit_scale, None, weights)
            losses["transport_loss"] = self.transport_weight / len(self.exchange.drawn) * total
        if self.divergence_weight:
            losses["divergence_loss"] = self.divergence_weight * self._divergence(local, everyone)
        return losses if output_dict else reduce(torch.add, losses.values())

    def _gather(self, local: Features) -> Features:
        if self.world_size == 1:
            return local
        return Features(
            *gather_features(
                local.images,
                local.texts,
                local_loss=self.local_loss,
                gather_with_grad=self.gather_with_grad,
                rank=self.rank,
                world_size=self.world_size,
            )
        )

    def _divergence(self, local: Features, everyone: Features) -> Tensor:
        """`S_ε` between all images and all texts."""
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            # What was gathered has no gradient then; this rank's own rows do.
            images, texts = ([*x.chunk(self.world_size)] for x in everyone)
            images[self.rank], texts[self.rank] = local
            everyone = Features(torch.cat(images), torch.cat(texts))
        total = everyone.images.sum() + everyone.texts.sum()
        if not bool(torch.isfinite(total)):
            return total * torch.nan  # the training loop's to find, as it is with ClipLoss
        with torch.autocast(total.device.type, enabled=False):
            return sinkhorn_divergence(everyone.images.float(), everyone.texts.float(), self.epsilon)

    def _ask(self, local: Features) -> Asked | None:
        """What the newest plan says of the global batch, as far as it is used; `None` without a plan."""
        plan = self.exchange.newest
        if plan is None:
            return None
        wants_potentials = self._weighs_negatives and self.negatives == "plan"
        if not (self.confidence or wants_potentials):
            return Asked()
        # Each rank asks the plan about its own pairs: that, unlike a gather of numbers, would not get less with ranks.
        potentials = plan.potentials(*local)
        log_trust = plan.log_mass if self.trust == "posterior" else plan.log_confidence
        numbers = [log_trust(*local, potentials)]
        if wants_potentials:
            numbers += map(plan.own, potentials)
        trust, *of_all = self._gather_numbers(torch.stack(numbers))
        return Asked(trust, Potentials(*of_all) if wants_potentials else None)

    def _weights(self, asked: Asked | None) -> Tensor | None:
        """`c_i` of the rows of the logits, `(rows,)`, mean 1 over the global batch; `None` where all are 1."""
        exchange = self.exchange
        exchange.effective_share = exchange.matched_share = None
        if not self.confidence or asked is None or asked.log_trust is None:
            return None
        log_trust = asked.log_trust
        if self.trust == "posterior":
            exchange.matched_share = matched_share(log_trust)
            log_trust = log_posterior(log_trust, exchange.matched_share)
            # So few matched pairs say that the plan is a young model's, and not that the captions are wrong.
            log_trust = torch.where(exchange.matched_share < self.least_share, 0.0, log_trust)
        weights, exchange.effective_share = tempered(log_trust, self.confidence, self.least_share)
        if self.local_loss and self.world_size > 1:
            weights = weights.chunk(self.world_size)[self.rank]
        return weights

    def _gather_numbers(self, local: Tensor) -> Tensor:
        """Some numbers for each pair of the global batch, `(k, W·B)`, from each rank's, `(k, B)`; without gradient."""
        if self.world_size == 1:
            return local
        everyone = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(everyone, local)
        return torch.cat(everyone, dim=1)

    def _info_nce(
        self,
        rows: Features,
        everyone: Features,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        weights: Tensor | None,
        asked: Asked | None = None,
    ) -> Tensor:
        """Symmetric InfoNCE of `rows` against `everyone`; the operations and their order are `ClipLoss`'s own.

        Args:
            weights: of the rows, or `None` for ones.
            asked: what the newest plan says of everyone, by which negatives are weighted; `None` for equal weights.
        """
        logits_per_image = logit_scale * rows.images @ everyone.texts.T
        if self.world_size > 1 and not self.local_loss:
            logits_per_text = logits_per_image.T
        else:
            logits_per_text = logit_scale * rows.texts @ everyone.images.T
        labels = self.get_ground_truth(logits_per_image.device, logits_per_image.shape[0])
        if asked is not None and self._weighs_negatives:
            f, g = asked.potentials or (None, None)
            logits_per_image = logits_per_image + self._log_weights(logits_per_image, logit_scale, labels, g)
            logits_per_text = logits_per_text + self._log_weights(logits_per_text, logit_scale, labels, f)
        if logit_bias is not None:
            logits_per_image += logit_bias
            logits_per_text += logit_bias
        if weights is None:
            return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2
        per_pair = F.cross_entropy(logits_per_image, labels, reduction="none")
        per_pair = per_pair + F.cross_entropy(logits_per_text, labels, reduction="none")
        return (weights * per_pair).mean() / 2

    def _log_weights(self, logits: Tensor, scale: Tensor, own: Tensor, potential: Tensor | None) -> Tensor:
        """`log w_ij` of the negatives in these logits, in which no bias is yet."""
        assert self.exchange.newest is not None
        similarity = logits.detach() / scale.detach()
        return log_negative_weights(similarity, own, self.negative_power / self.exchange.newest.epsilon, potential)

    def _transported(self, plan: TransportPlan, pairs: Features) -> Features:
        """`v'` and `t'` of the pairs. `v'` lives among texts and `t'` among images."""
        own = pairs if self.own_pair else (None, None)
        return Features(
            plan.transport_image(pairs.images, own[1]).to(pairs.images.dtype),
            plan.transport_text(pairs.texts, own[0]).to(pairs.texts.dtype),
        )
