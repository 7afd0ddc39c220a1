"""OTCO loss: InfoNCE whose pairs and negatives are weighted by transport plans; transported pairs are optional."""

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

# The measure of trust in a pair: `posterior`, the probability that it is matched; `share`, the plan confidence.
TRUSTS = ("posterior", "share")


class Asked(NamedTuple):
    """What the newest plan says of the global batch.

    Args:
        log_trust: `(n,)`, of each pair: its `log_posterior`, or the logarithm of its confidence. None: not asked.
        potentials: the potentials of the images and texts, `(n,)` each, if they were in the support. None: not asked.
        share: of the pairs that are matched, a scalar. None: not estimated.
    """

    log_trust: Tensor | None = None
    potentials: Potentials | None = None
    share: Tensor | None = None


class OTCOLoss(ClipLoss):
    """`ClipLoss` that uses cached transport plans (method, section 4).

        L = mean_i c_i · InfoNCE(v_i, t_i)
          + λ/K · Σ_k mean_i c_i · [InfoNCE(v'_i, t_i) + InfoNCE(v_i, t'_i)]
          + μ · S_ε(V, T)

    The means are over the pairs of the global batch, and the weights `c_i` have mean 1 over them.

    In the first term `log w_ij` is added to the logit of the negative `(i, j)` (`method/weights.py`). A transported
    image `v'` is compared with texts only, and a transported text `t'` with images only. With `λ = γ = μ = β = 0`,
    the loss is `ClipLoss` to the bit. The same holds with `μ = 0` until plans are set (`exchange.set_plans`).

    Args:
        confidence: `γ >= 0`, the power of the trust in a pair that makes the weights `c_i`; 0 switches them off.
        trust: the quantity that is raised to that power. `posterior`: the probability that the pair is matched; the
            share of matched pairs is estimated from the batch (`posterior.matched_share`), so on clean captions nearly
            all weights are 1. `share`: the product of the pair's shares of its row and of its column of the plan.
        least_share: in `[0, 1]`, the smallest effective share of the batch that the weights `c_i` may have; a step
            whose share would be smaller takes a smaller power (`tempered`). 0 sets no limit. A model that has just
            begun to learn trusts only a few pairs; without a limit it learns these alone, and training can collapse.
            With `posterior`, all pairs have weight 1 in a step whose estimated share of matched pairs is below this.
        negatives: what decides the weight of a negative. `price`: its cosine, and the plan's price of its caption or
            image. `none`: all weights are 1. For comparison only: `plan`, the plan's density at the negative, and
            `similarity`, its cosine alone.
        negative_power: `β >= 0`, the power of these weights; `β/ε` is the factor of the cosine.
        negative_price: `η >= 0`, how much a price counts beside the cosine, in weights by `price`.
        transport_weight: `λ >= 0`, of the transported pairs.
        own_pair: whether the support that transports an image or a text holds its own partner. `False` is for
            comparison only: `v'` is then made of other samples alone, so `(v', t)` is not a positive pair.
        divergence_weight: `μ >= 0`, of the Sinkhorn divergence between the batch's images and texts.
        epsilon: `ε` of that divergence, in units of the cost.
        clip_options: `local_loss`, `gather_with_grad`, `cache_labels`, `rank`, `world_size`, as in
            `open_clip.ClipLoss`.

    Attributes:
        exchange: where plans are set, and where the loss says what it found in a step (`PlanExchange`).

    Raises:
        ValueError: a setting is out of its range, or `trust` or `negatives` is an unknown name.

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
        negatives: str = "price",
        negative_power: float = 0.6,
        negative_price: float = 1.0,
        **clip_options: Any,
    ) -> None:
        super().__init__(**clip_options)
        NOT_NEGATIVE.check(
            confidence=confidence,
            transport_weight=transport_weight,
            divergence_weight=divergence_weight,
            negative_power=negative_power,
            negative_price=negative_price,
        )
        POSITIVE.check(epsilon=epsilon)
        SHARE.check(least_share=least_share)
        one_of(TRUSTS).check(trust=trust)
        one_of(NEGATIVES).check(negatives=negatives)
        self.confidence = confidence
        self.trust = trust
        self.negatives, self.negative_power, self.negative_price = negatives, negative_power, negative_price
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
            The sum, or with `output_dict` its weighted terms: `contrastive_loss`, and `transport_loss` and
            `divergence_loss` where they are used. The training loop adds up all entries, so there are no others.

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
        # The window of the next plan takes its features from here, so that they are gathered only once.
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
        local_rows_alone = self.world_size > 1 and self.local_loss and not self.gather_with_grad
        if local_rows_alone:
            # In this case the gathered rows have no gradient. This rank's own rows, which have one, replace its part.
            images, texts = ([*x.chunk(self.world_size)] for x in everyone)
            images[self.rank], texts[self.rank] = local
            everyone = Features(torch.cat(images), torch.cat(texts))
        total = everyone.images.sum(dtype=torch.float32) + everyone.texts.sum(dtype=torch.float32)  # fp16 overflows
        if not bool(torch.isfinite(total)):
            return total * torch.nan  # the training loop has to notice it, as with ClipLoss
        with torch.autocast(total.device.type, enabled=False):
            value = sinkhorn_divergence(everyone.images.float(), everyone.texts.float(), self.epsilon)
        if local_rows_alone:
            # DDP divides by the number of ranks. The contrastive term makes up for it, as its mean is over local rows.
            value = value + (self.world_size - 1) * (value - value.detach())
        return value

    def _ask(self, local: Features) -> Asked | None:
        """What the newest plan says of the global batch, as far as it is used; `None` without a plan."""
        plan = self.exchange.newest
        if plan is None:
            return None
        wants_potentials = self._weighs_negatives and self.negatives in ("price", "plan")
        if not (self.confidence or wants_potentials):
            return Asked()
        # Each rank asks the plan about its own pairs only, and the answers are gathered, which is cheap. If each rank
        # asked about the global batch, more ranks would not make this work smaller.
        potentials = plan.potentials(*local)
        log_trust = plan.log_mass if self.trust == "posterior" else plan.log_confidence
        numbers = [log_trust(*local, potentials)]
        if wants_potentials:
            # Prices are asked of a plan that does not couple as well, to compare with: those after one half-step.
            numbers += potentials if self.negatives == "price" else map(plan.own, potentials)
        trust, *of_all = self._gather_numbers(torch.stack(numbers))
        share = None
        if self.trust == "posterior":
            share = matched_share(trust)
            trust = log_posterior(trust, share)
        return Asked(trust, Potentials(*of_all) if wants_potentials else None, share)

    def _weights(self, asked: Asked | None) -> Tensor | None:
        """`c_i` of the rows of the logits, `(rows,)`, mean 1 over the global batch; `None` where all are 1."""
        exchange = self.exchange
        exchange.effective_share = exchange.matched_share = None
        if not self.confidence or asked is None or asked.log_trust is None:
            return None
        log_trust = asked.log_trust
        if asked.share is not None:
            exchange.matched_share = asked.share
            # Such a small share does not mean that the captions are wrong: the model is still too young for its plan
            # to tell pairs apart. So all pairs get the same weight.
            log_trust = torch.where(asked.share < self.least_share, 0.0, log_trust)
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
            f, g = self._bonus(asked)
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

    def _bonus(self, asked: Asked) -> tuple[Tensor | None, Tensor | None]:
        """`p` of `log_negative_weights` for the images and for the texts of the global batch, `(n,)` each."""
        if asked.potentials is None:
            return None, None
        if self.negatives != "price":
            return asked.potentials
        # A hub has a low potential. Its price is the negative of the potential, so a hub has a high price.
        prices = (potential.mean() - potential for potential in asked.potentials)
        # A pair that is not trusted is only pushed away, by all others. With a price on it as well it would be pushed
        # so far that it is never trusted again, and the model lost right pairs in this way.
        trusted: Tensor | float = 1.0
        if asked.log_trust is not None and asked.share is not None:
            trusted = (asked.log_trust + asked.share.log()).exp()
        image, text = (self.negative_price * trusted * price for price in prices)
        return image, text

    def _log_weights(self, logits: Tensor, scale: Tensor, own: Tensor, bonus: Tensor | None) -> Tensor:
        """`log w_ij` of the negatives in these logits; the bias must not have been added to them yet."""
        assert self.exchange.newest is not None
        similarity = logits.detach() / scale.detach()
        return log_negative_weights(similarity, own, self.negative_power / self.exchange.newest.epsilon, bonus)

    def _transported(self, plan: TransportPlan, pairs: Features) -> Features:
        """`v'` and `t'` of the pairs: `v'` is a normalized mean of texts, and `t'` of images."""
        own = pairs if self.own_pair else (None, None)
        return Features(
            plan.transport_image(pairs.images, own[1]).to(pairs.images.dtype),
            plan.transport_text(pairs.texts, own[0]).to(pairs.texts.dtype),
        )
