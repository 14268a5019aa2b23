"""Where the leading directions alone are cheaper than all of them: the crossovers in `lrsurgery.linalg.LEADING_PAYS`.

For each short side and rank: milliseconds of the whole eigendecomposition of the Gram matrix, of its eigenvalues alone,
and of the block Krylov method to both of its bounds. The cheaper way for each of the three cases stands beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import finish, in_turn, parser

from lrsurgery.linalg.krylov import krylov


def gram_of(side: int) -> torch.Tensor:
    """The Gram matrix (side, side) of a square matrix with a power-law spectrum on a floor of noise."""
    generator = torch.Generator().manual_seed(0)
    values = torch.arange(1, side + 1) ** -0.7
    weight = (torch.randn(side, side, generator=generator) * values) @ torch.randn(side, side, generator=generator)
    weight = weight / side + 0.02 * torch.randn(side, side, generator=generator) / side**0.5
    gram: torch.Tensor = weight @ weight.T
    return gram


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--sides", type=int, nargs="+", default=[512, 768, 1024, 2048, 4096])
    made.add_argument("--threads", type=int, default=1, help="as factorise gives each of several layers")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for side in arguments.sides:
        gram = gram_of(side)
        values = torch.linalg.eigvalsh(gram).flip(0).double()
        energy = float(values.sum())
        for share in (32, 16, 8, 4):
            rank = side // share
            best = float(values[:rank].sum())
            seconds = in_turn(
                {
                    "all": lambda gram=gram: torch.linalg.eigh(gram),  # type: ignore[misc]
                    "values": lambda gram=gram: torch.linalg.eigvalsh(gram),  # type: ignore[misc]
                    "exact": lambda g=gram, r=rank, e=energy, b=best: krylov(g, r, energy=e, best=b),  # type: ignore[misc]
                    "fast": lambda g=gram, r=rank, e=energy: krylov(g, r, energy=e),  # type: ignore[misc]
                },
                arguments.repeats,
            )
            ms = {name: 1000 * min(times) for name, times in seconds.items()}
            rows.append(
                {
                    "short side": side,
                    "rank": rank,
                    "all, ms": ms["all"],
                    "values, ms": ms["values"],
                    "leading 1e-5, ms": ms["exact"],
                    "leading 1%, ms": ms["fast"],
                    "auto": "leading" if ms["values"] + ms["exact"] < ms["all"] else "all",
                    "known": "leading" if ms["exact"] < ms["all"] else "all",
                    "fast": "leading" if ms["fast"] < ms["all"] else "all",
                }
            )
    finish("ladder", rows, arguments)


if __name__ == "__main__":
    main()
