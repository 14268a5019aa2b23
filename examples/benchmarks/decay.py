"""What Frobenius decay costs: beside a training step of a GPT-2-small-shaped model, and beside forming the product.

The decay runs in a hook of the optimizer, so its own seconds over those of the step without it say what it adds, more
finely than the difference of two noisy steps; that difference is shown too. Beside it, on the same factors, the two
published ways: autograd through 0.5 ||U V||_F^2, and (U V) V^T, U^T (U V). Last, many small layers: in batches of one
shape, and one by one.

    python examples/benchmarks/decay.py [--rank 0.25] [--batch 8] [--tokens 256] [--bf16] [--save]
"""

from __future__ import annotations

from statistics import median
from typing import Any

import harness
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lrsurgery
from lrsurgery.surgery import decay as module

STRENGTH = 1e-8  # too small to change the factors over many rounds
SMALL = ((48, 32, 8), (48, 64, 16), (48, 192, 48), (48, 768, 192))  # layers, width, rank


@torch.no_grad()
def by_product(layers: list[lrsurgery.layers.FactorisedLayer]) -> None:
    for layer in layers:
        u, v = layer.u.weight, layer.v.weight
        product = u @ v
        of_u, of_v = product @ v.T, u.T @ product
        u.add_(of_u, alpha=-STRENGTH)
        v.add_(of_v, alpha=-STRENGTH)


def by_autograd(layers: list[lrsurgery.layers.FactorisedLayer]) -> None:
    for layer in layers:
        u, v = layer.u.weight, layer.v.weight
        of_u, of_v = torch.autograd.grad(0.5 * (u @ v).square().sum(), (u, v))
        with torch.no_grad():
            u.add_(of_u, alpha=-STRENGTH)
            v.add_(of_v, alpha=-STRENGTH)


def whole_step(rank: str, batch: int, tokens: int, bf16: bool, repeats: int, device: str) -> list[dict[str, Any]]:
    """Rows of the GPT-2-small-shaped model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).train()
    lrsurgery.factorise_(model, rank=rank, init="he")
    model.to(device)
    layers = list(lrsurgery.factorised_layers(model).values())
    x = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    frobenius = lrsurgery.FrobeniusDecay(model, STRENGTH)

    def forward_and_backward() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss: Tensor = model(x, labels=x).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def without() -> None:
        frobenius.detach()
        forward_and_backward()
        optimizer.step()

    def with_decay() -> None:
        frobenius.attach(optimizer)
        forward_and_backward()
        optimizer.step()

    seconds = harness.in_turn(
        {
            "step": without,
            "step with decay": with_decay,
            "decay alone": lambda: frobenius._before_step(optimizer, (), {}),
            "product": lambda: by_product(layers),
            "autograd of the product": lambda: by_autograd(layers),
        },
        repeats,
    )
    rows = []
    for name, taken in seconds.items():
        over_step, over_decay = (harness.ratio(taken, seconds[base]) for base in ("step", "decay alone"))
        rows.append(
            {
                "what": name,
                "ms": 1e3 * median(taken),
                "% of a step": 100 * over_step["median"],
                "min": 100 * over_step["min"],
                "max": 100 * over_step["max"],
                "times the decay": over_decay["median"],
                # on a machine with other work, the fastest round of each was disturbed least
                "fastest, ms": 1e3 * min(taken),
                "% of the fastest step": 100 * min(taken) / min(seconds["step"]),
                "times the fastest decay": min(taken) / min(seconds["decay alone"]),
            }
        )
    return rows


def small_layers(repeats: int, device: str) -> list[dict[str, Any]]:
    """Microseconds a layer, in batches of one shape and one by one."""
    rows = []
    for count, width, rank in SMALL:
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
        lrsurgery.factorise_(model, rank=rank, init="he", allow_larger=True)
        model.to(device)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
        frobenius = lrsurgery.FrobeniusDecay(model, STRENGTH)

        def run(grouped: int, frobenius: lrsurgery.FrobeniusDecay = frobenius, optimizer: Any = optimizer) -> None:
            kept, module.GROUPED = module.GROUPED, grouped
            frobenius._before_step(optimizer, (), {})
            module.GROUPED = kept

        ways = {"in batches": lambda run=run: run(10**9), "one by one": lambda run=run: run(0)}
        seconds = harness.in_turn(ways, 10 * repeats)
        chosen = "in batches" if 2 * width * rank <= module.GROUPED else "one by one"
        rows.append(
            {
                "layers": f"{count} of {width} x {width}, rank {rank}",
                **{f"{name}, us a layer": 1e6 * median(taken) / count for name, taken in seconds.items()},
                "one by one / in batches": harness.ratio(seconds["one by one"], seconds["in batches"])["median"],
                "chosen": chosen,
            }
        )
    return rows


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--rank", default="0.25", help="as the CLI reads it")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--bf16", action="store_true", help="forward and backward under autocast")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = small_layers(given.repeats, device)
    if not given.json:
        print(harness.table(small), end="\n\n")
    rows = whole_step(given.rank, given.batch, given.tokens, given.bf16, given.repeats, device)
    harness.finish("decay", rows, given, small=small, rank=given.rank, batch=given.batch, tokens=given.tokens)


if __name__ == "__main__":
    main()
