"""What `factorise` can be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lrsurgery.budget import parse_budget
from lrsurgery.calibrate import Calibration
from lrsurgery.errors import RankError, SurgeryError
from lrsurgery.inits import WITHOUT_DIRECTIONS, get_init
from lrsurgery.linalg import check_engine
from lrsurgery.plan import Plan, find_heads, make_plan
from lrsurgery.ranks import READABLE, RankLike, RankSpec, parse_rank
from lrsurgery.speed import SpeedTable, refusal
from lrsurgery.tensors import parse_size

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What `factorise` can be asked for; the CLI's options of the same names say more."""

    rank: RankLike | None = None  # or a budget
    init: str = "spectral"
    conv: str = "channel"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    allow_larger: bool = False
    multiple_of: int = 1
    seed: int = 0
    from_scratch: bool = False
    device: str = "auto"
    dtype: str = "keep"
    shard_size: str = "5GB"
    revision: str | None = None
    architecture: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    command: str | None = field(default=None, compare=False)
    min_speedup: float | None = None
    svd: str = "auto"
    jobs: int | None = None  # layers at once; None: as threads and memory allow
    resume: bool = False
    cache: bool = True
    keep_vectors: bool = False
    budget: str | float | None = None
    budget_of: str = "layers"
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def spec(self) -> RankSpec:
        """The ranks that are asked for. Raises RankError, BudgetError."""
        if self.budget is None:
            if self.rank is None:
                raise RankError(f"no rank and no budget is given; write --rank with {READABLE}, or --budget 0.5")
            return parse_rank(self.rank, self.multiple_of)
        if self.rank is not None:
            raise RankError("rank and budget are both given; a budget chooses every rank, so leave one out")
        return RankSpec(parse_budget(str(self.budget), self.budget_of), (), self.multiple_of)

    def plan_for(self, model: nn.Module, tied: dict[str, str] | None = None) -> Plan:
        refuse = None
        if self.min_speedup is not None:
            device = pick_device(self.device)
            refuse = refusal(model, self.conv, self.min_speedup, device, SpeedTable(device, DTYPES[self.dtype]))
        return make_plan(
            model, self.spec, conv=self.conv, include=self.include, exclude=self.exclude,
            allow_larger=self.allow_larger, heads=find_heads(model), tied=tied, refuse=refuse,
        )  # fmt: skip

    def check(self) -> None:
        """Raises SurgeryError for a value that no model could make right."""
        spec = self.spec
        get_init(self.init)
        self.calibration.check()
        if self.calibration.wanted and self.init in WITHOUT_DIRECTIONS:
            raise SurgeryError(f"init {self.init} keeps nothing of the weights, so --calibration would change nothing")
        if self.calibration.wanted and self.from_scratch:
            raise SurgeryError("--from-scratch has no pretrained weights to calibrate; leave --calibration out")
        if self.calibration.wanted and self.svd == "fast":
            raise SurgeryError("--svd fast looks at weights alone; leave it out with --calibration")
        if self.budget is not None:
            for name, given in (("--min-speedup", self.min_speedup), ("--allow-larger", self.allow_larger or None)):
                if given is not None:
                    raise SurgeryError(
                        f"{name} and --budget are both given: a budget shares out ranks that save parameters"
                    )
        elif self.budget_of != "layers":
            raise RankError(f"--budget-of {self.budget_of}: say with --budget how much of it is kept")
        assert spec is not None
        check_engine(self.svd)
        pick_device(self.device)
        parse_size(self.shard_size)
        if self.dtype not in DTYPES:
            raise SurgeryError(f"unknown dtype '{self.dtype}'; known: {', '.join(DTYPES)}")
        if self.min_speedup is not None and not 0 < self.min_speedup < math.inf:
            raise SurgeryError(f"min speedup {self.min_speedup}: write a number above 0, such as 1.0")
        if self.jobs is not None and self.jobs < 1:
            raise SurgeryError(f"jobs {self.jobs}: write an integer of at least 1")
        if self.keep_vectors and not self.cache:
            raise SurgeryError("--keep-vectors keeps them in the cache; leave --no-cache out")
        if self.seed < 0:
            raise SurgeryError(f"seed {self.seed}: write an integer of at least 0")

    def recorded(self) -> dict[str, Any]:
        """The options that decide the result, as JSON."""
        return {
            "rank": None if self.budget is not None else str(self.spec),
            "budget": None if self.budget is None else str(self.spec),
            "init": self.init, "conv": self.conv, "include": list(self.include),
            "exclude": list(self.exclude), "allow_larger": self.allow_larger, "multiple_of": self.multiple_of,
            "seed": self.seed, "from_scratch": self.from_scratch, "dtype": self.dtype,
            "min_speedup": self.min_speedup, "svd": self.svd, "calibration": self.calibration.recorded(),
        }  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:1". Raises SurgeryError where this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise SurgeryError(f"unknown device '{name}'; write auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise SurgeryError(f"device '{name}': this machine has {count} CUDA devices")
    return torch.device(name)
