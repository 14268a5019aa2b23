"""Shrink a timm network that tells letters apart to a quarter of its parameters, and heal it.

    python examples/heal_timm_cnn.py --output letters

The images are drawn by examples/letters.py: no download is needed. The network learns
them first, dense; then it is factorised, and healed under Frobenius decay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from letters import LETTERS, SIZE, write
from timm.models import save_for_hf

import lrsurgery

STRENGTH = 0.01  # of the decay


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Shrink a timm network and heal it.")
    parser.add_argument("--output", type=Path, required=True, help="folder for images and models")
    parser.add_argument("--rank", default="params:0.25", help="(default: %(default)s)")
    parser.add_argument("--conv", default="channel", help="or spatial (default: %(default)s)")
    parser.add_argument("--images", type=int, default=50, help="of a letter, to learn from (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=8, help="of learning them, dense (default: %(default)s)")
    args = parser.parse_args()

    data = args.output / "images"
    write(data, args.images)

    # a ResNet of 10 layers, narrow and untrained, as a folder that timm and lrsurgery both read
    torch.manual_seed(0)
    narrow = {"channels": (16, 32, 64, 128), "stem_width": 16}
    expects = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0, "label_names": [*LETTERS]}
    network = timm.create_model("resnet10t", num_classes=len(LETTERS), pretrained_cfg_overlay=expects, **narrow)
    save_for_hf(network, args.output / "new", model_args=narrow, safe_serialization=True)

    # no augmentation, as mirrored letters are other ones; measured before and after, not on the way
    common = {"data": str(data), "eval_split": "test", "augment": False, "batch_size": 25, "eval_steps": 10_000}
    common |= {"schedule": "linear"}
    dense, small, healed = (args.output / name for name in ("dense", "factorised", "healed"))
    settings = {
        "model": str(args.output / "new"),
        "dense": True,
        "lr": 3e-3,
        "schedule": "linear",
        "epochs": args.epochs,
    }
    trained = lrsurgery.finetune({**common, **settings}, dense, overwrite=True)
    factorised = lrsurgery.factorise_checkpoint(dense, small, rank=args.rank, conv=args.conv, overwrite=True)
    settings = {"model": str(small), "decay": "frobenius", "decay_strength": STRENGTH, "lr": 5e-3, "epochs": 5}
    outcome = lrsurgery.finetune({**common, **settings}, healed, overwrite=True)

    rows = (
        (dense, trained.report, trained.stages["trained"]),
        (small, factorised, outcome.stages["factorised"]),
        (healed, outcome.report, outcome.stages["healed"]),
    )
    print(f"{'':14}{'parameters':>12}{'bytes':>12}{'accuracy':>10}")
    for folder, report, quality in rows:
        size = (folder / "model.safetensors").stat().st_size
        print(f"{folder.name:14}{report.parameters_after:>12,}{size:>12,}{quality['top1']:>10.3f}")


if __name__ == "__main__":
    main()
