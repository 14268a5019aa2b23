"""The processes that share one job under torchrun, as its environment variables tell."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from lrsurgery.errors import SurgeryError


@dataclass(frozen=True)
class Team:
    """This process among those of the job; a single process is a team of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def of_environment() -> Team:
        """As torchrun and accelerate tell each process. Raises SurgeryError where they tell half of it."""
        rank, size, local_rank = (int(os.environ.get(name) or default) for name, default in _VARIABLES)
        if size == 1:
            return Team()
        if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT"):
            raise SurgeryError(f"WORLD_SIZE is {size} and there is no MASTER_ADDR and MASTER_PORT; start with torchrun")
        return Team(rank, size, local_rank)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def meet(self, name: str) -> None:
        """Waits until every process has come to the meeting of this name.

        Looks again and again instead of blocking, so that a signal ends the wait: that is how torchrun stops the rest
        when a process is lost.
        """
        if self.size == 1:
            return
        store = _store(self)
        name = f"lrsurgery/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
        for stage in ("come", "seen"):  # whoever holds the store leaves last
            store.add(f"{name}/{stage}", 1)
            while (stage == "come" or self.leads) and store.add(f"{name}/{stage}", 0) < self.size:
                time.sleep(0.02)


_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


@cache
def _store(team: Team) -> Any:
    """The store that the launcher's agent holds, or the first process where the agent holds none."""
    import torch.distributed as dist

    ours = team.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch's stubs leave it out
    return store(host, port, None, ours, timeout=timedelta(minutes=10))
