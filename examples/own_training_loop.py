"""lrsurgery as a library: your own training loop around a factorised network, with Frobenius decay of its layers.

    python examples/own_training_loop.py --output own

A timm vision transformer learns to tell a few patterns apart, low rank from its first step. Nothing of lrsurgery's own
training is used: its layers are modules like any other, and the decay hooks into whichever optimizer there is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lrsurgery

SIZE, CLASSES = 32, 8  # pixels, patterns
STRENGTH = 0.3


def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noisy waves (count, 3, SIZE, SIZE) of random phase, and the direction of each as its class (count,)."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle, phase = labels * torch.pi / CLASSES, torch.rand(count, generator=generator) * 2 * torch.pi
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    waves = (along * 0.8 + phase[:, None, None]).sin()[:, None].expand(-1, 3, -1, -1)
    return waves + torch.randn(waves.shape, generator=generator), labels


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Measure the accuracy on images that training does not see."""
    pixels, labels = batch(400, torch.Generator().manual_seed(1))
    return float(model.eval()(pixels).argmax(-1).eq(labels).float().mean())


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Train a factorised network in a loop of one's own.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--steps", type=int, default=90, help="(default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=3, embed_dim=96, num_classes=CLASSES
    )
    lrsurgery.factorise_(model, rank=0.25, exclude=("patch_embed.*",))  # in place, before the optimizer is built

    # the factors decay as products, by FrobeniusDecay; give them no decay of the optimizer's own besides
    factors = [p for name, p in model.named_parameters() if name.endswith((".u.weight", ".u.bias", ".v.weight"))]
    others = [p for p in model.parameters() if all(p is not factor for factor in factors)]
    groups: list[dict[str, Any]] = [{"params": factors, "weight_decay": 0.0}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    decay = lrsurgery.FrobeniusDecay(model, STRENGTH).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.steps):
        pixels, labels = batch(32, generator)
        loss = cross_entropy(model.train()(pixels), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    decay.detach()

    low_rank = accuracy(model)
    print(f"{'layer':24}{'rank':>6}{'nuclear':>9}{'entropy':>9}{'stable':>9}")
    for row in lrsurgery.rank_report(model).factorised:
        assert row.after is not None
        print(f"{row.name:24}{row.rank:>6}{row.after.nuclear:>9.2f}{row.after.entropy:>9.2f}{row.after.stable:>9.2f}")

    low_rank_size = sum(p.numel() for p in model.parameters())
    lrsurgery.densify_(model)  # ordinary layers again, for whatever takes over from here
    dense_size = sum(p.numel() for p in model.parameters())
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.output / "dense.safetensors")
    print(f"\n{'':12}{'parameters':>12}{'accuracy':>10}")
    print(f"{'low rank':12}{low_rank_size:>12,}{low_rank:>10.3f}")
    print(f"{'densified':12}{dense_size:>12,}{accuracy(model):>10.3f}")


if __name__ == "__main__":
    main()
