"""What share of popular models' parameters can be factorised, from configurations that the libraries know.

Models are built on the meta device: of transformers, a configuration's default values, which are those of the model
that its class was written for; of timm, the named architecture. No weight exists and none is downloaded.

    python examples/benchmarks/reach.py [--only NAME ...] [--json]
"""

from __future__ import annotations

from typing import Any

import harness
import torch

from lrsurgery.report.dense.reach import VECTORS, reach_of

CAUSAL = (
    *("gpt2", "llama", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "opt", "bloom", "falcon", "mamba"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe", "granitemoe", "jamba", "phimoe"),
)
OTHERS = (
    *("bert", "modernbert", "roberta", "xlm-roberta", "deberta-v2", "electra", "distilbert", "t5", "mt5", "bart"),
    *("whisper", "wav2vec2", "hubert", "encodec", "vits", "clip", "siglip", "vit", "swin", "convnext", "segformer"),
)
TIMM = (
    *("resnet50", "resnext50_32x4d", "regnety_032", "resnest50d", "mobilenetv3_large_100", "efficientnet_b0"),
    *("convnext_tiny", "vit_base_patch16_224", "resnetv2_50x1_bit", "nf_resnet50", "dm_nfnet_f0"),
)


def build(name: str) -> Any:
    if name in TIMM:
        import timm

        with torch.device("meta"):
            return timm.create_model(name)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(name)
    with torch.device("meta"):
        return (AutoModelForCausalLM if name in CAUSAL else AutoModel).from_config(config)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[*CAUSAL, *OTHERS, *TIMM])
    given = parser.parse_args()
    rows = []
    for name in given.only:
        found = reach_of(build(name))
        by_what = {part.what.partition(" ")[0]: part.parameters / found.parameters for part in found.within}
        rest = [part for part in found.rest if part.what != VECTORS][:2]
        rows.append(
            {
                "model": name,
                "parameters, M": found.parameters / 1e6,
                "within reach": found.share,
                "layers": by_what.get("layers", 0.0),
                "tables": by_what.get("tables", 0.0),
                "heads": by_what.get("output", 0.0),
                "not": "; ".join(f"{part.what} {part.parameters / found.parameters:.1%}" for part in rest),
            }
        )
    harness.finish("reach", rows, given)


if __name__ == "__main__":
    main()
