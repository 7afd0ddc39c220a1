"""Which pairs stay in the clean data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from openclip_otco.audit import table
from openclip_otco.audit.settings import CleanSettings
from openclip_otco.audit.two_groups import WrongShare
from openclip_otco.errors import UserError

Keep = Callable[[table.Row], bool]


def keep_rule(
    clean: CleanSettings,
    ranking: table.Ranking,
    pairs: int,
    wrong: WrongShare,
    marked: Mapping[table.Place, bool],
) -> Keep:
    """The rule by which a row of a part stays: a person's mark if there is one, else the models' judgement.

    Args:
        clean: what is asked for.
        ranking: of all pairs.
        pairs: how many there are.
        wrong: the estimated share of wrong ones.
        marked: whether marked pairs are kept, by their place in the data.

    Raises:
        UserError: all pairs seem wrong, and nobody said how many to drop.
    """
    judged = _by_judgement(clean, ranking, pairs, wrong)
    return lambda row: marked.get(table.place(row), judged(row))


def _by_judgement(clean: CleanSettings, ranking: table.Ranking, pairs: int, wrong: WrongShare) -> Keep:
    if clean.threshold is not None:
        threshold = clean.threshold
        return lambda row: bool(row["probability"] >= threshold)
    dropped = round((wrong.value if clean.drop is None else clean.drop) * pairs)
    if dropped == 0:
        return lambda row: True
    if dropped == pairs and clean.drop is None:
        raise UserError(
            "--write-clean: to these models no pair seems right; give others, or say by --drop or --threshold "
            "what to leave out"
        )
    last_dropped = table.order(ranking.first(1, dropped - 1)[0])
    return lambda row: table.order(row) > last_dropped
