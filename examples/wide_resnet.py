"""Wide residual networks for images of 32 pixels (Zagoruyko & Komodakis 2016, arXiv:1605.07146), for timm to build.

timm has none of this kind: its networks halve a 32-pixel image five times. With this file imported they are timm models
like any other, in Python (`timm.create_model("wide_resnet28_10")`) and on the command line:

    python examples/wide_resnet.py --name wide_resnet28_10 --classes 100 --output wrn   # its config, no weights
    lrsurgery --import examples/wide_resnet.py finetune wrn --from-scratch --rank 0.3 --data cifar100/ --output wrn-low

WideResNet-28-10 is the paper's for CIFAR-100; -16-2 trains in a minute on a laptop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

EXPECTS = {"input_size": (3, 32, 32), "num_classes": 10, "crop_pct": 1.0, "classifier": "fc", "first_conv": "conv1"}
SIZES = {"wide_resnet28_10": (28, 10), "wide_resnet16_4": (16, 4), "wide_resnet16_2": (16, 2)}  # depth, width
default_cfgs = dict.fromkeys(SIZES, EXPECTS)  # where timm looks


class Block(nn.Module):
    """Two 3x3 convolutions, each after its norm and ReLU, beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        opened = self.bn1(x).relu()
        branch: Tensor = self.conv2(self.bn2(self.conv1(opened)).relu())
        return branch + (x if self.shortcut is None else self.shortcut(opened))


class WideResNet(nn.Module):
    """(batch, 3, 32, 32) -> (batch, classes): three groups of (depth - 4) / 6 blocks, 16, 32, 64 times width wide."""

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_chans: int = 3, **_: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        for group in range(3):
            for i in range((depth - 4) // 6):
                first = i == 0
                before = widths[group] if first else widths[group + 1]
                blocks.append(Block(before, widths[group + 1], 2 if first and group else 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.fc.in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.norm(self.blocks(self.conv1(x))).relu().mean((2, 3)))
        return found


def _build(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    depth, width = SIZES[name]
    made: nn.Module = build_model_with_cfg(WideResNet, name, pretrained, depth=depth, width=width, **options)
    return made


@register_model  # type: ignore[untyped-decorator]
def wide_resnet28_10(pretrained: bool = False, **options: Any) -> nn.Module:
    """36.5 M parameters: the paper's, for CIFAR."""
    return _build("wide_resnet28_10", pretrained, options)


@register_model  # type: ignore[untyped-decorator]
def wide_resnet16_4(pretrained: bool = False, **options: Any) -> nn.Module:
    """2.7 M parameters."""
    return _build("wide_resnet16_4", pretrained, options)


@register_model  # type: ignore[untyped-decorator]
def wide_resnet16_2(pretrained: bool = False, **options: Any) -> nn.Module:
    """0.7 M parameters."""
    return _build("wide_resnet16_2", pretrained, options)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Write the config of a wide residual network, to train from scratch.")
    parser.add_argument("--name", choices=default_cfgs, default="wide_resnet28_10")
    parser.add_argument("--classes", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for config.json")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    expects = {**EXPECTS, "num_classes": args.classes, "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"architecture": args.name, "num_classes": args.classes, "pretrained_cfg": expects}
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with torch.device("meta"):  # only the count is wanted
        count = sum(p.numel() for p in WideResNet(*SIZES[args.name], num_classes=args.classes).parameters())
    print(f"{args.output}: {args.name}, {count:,} parameters")


if __name__ == "__main__":
    main()
