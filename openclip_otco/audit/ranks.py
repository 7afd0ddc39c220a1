"""Ranks: of several processes that share an audit, the first one waits for the others."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence

from openclip_otco.audit.folder import AuditFolder
from openclip_otco.errors import UserError

_SECONDS_BETWEEN_LOOKS = 1.0
_LOOKS_A_MINUTE = 60


def wait_for_ranks(folder: AuditFolder) -> None:
    """Wait until all ranks have judged their share, and say at once and then every minute which ones are missing.

    A rank that failed has left a note in its folder. Notes are read after each minute, and not before: a rank that was
    started again needs some time until it takes its old note away.

    Raises:
        UserError: a rank has failed.
    """
    for look in itertools.count():
        missing = [rank for rank in folder.of_ranks() if not rank.progress()[1]]
        if not missing:
            return
        if look % _LOOKS_A_MINUTE == 0:
            if look:
                _check_none_failed(missing)
            names = ", ".join(str(rank.rank) for rank in missing)
            print(
                f"openclip-otco audit: rank {folder.rank} waits for these ranks: {names}. "
                "If one of them no longer runs, start it again; what it has done is kept",
                file=sys.stderr,
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _check_none_failed(missing: Sequence[AuditFolder]) -> None:
    failures = [(rank.rank, failure) for rank in missing if (failure := rank.failure()) is not None]
    if failures:
        reasons = "; ".join(f"rank {rank} failed: {failure}" for rank, failure in failures)
        names = ", ".join(str(rank) for rank, _ in failures)
        raise UserError(
            f"{reasons}. When this is mended, start rank {names} and then rank 0 again; what is done is kept"
        )
