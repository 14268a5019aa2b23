"""Greedy decode of factorised checkpoints in vLLM, against transformers' on the same folder.

vLLM wants a torch of its own, so LRSURGERY_VLLM names the Python of an environment that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from support import tiny

import lrsurgery

ROOT = Path(__file__).parents[2]
PROMPT, NEW = [5, 17, 33, 80], 12
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32, max_num_seqs=2)
    wanted = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    (found,) = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], wanted)
    print("TOKENS", json.dumps(list(found.outputs[0].token_ids)))
"""


def save(folder: Path, name: str) -> Path:
    """A model whose heads are of a size that vLLM's attention on CPUs takes, with far from uniform outputs."""
    torch.manual_seed(0)
    common = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=64, **common)
        )
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=128, intermediate_size=192, **heads, **common)
        )
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.process
@pytest.mark.parametrize("form", ["pivoted", "balanced"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(name: str, form: str, tmp_path: Path) -> None:
    python = os.environ.get("LRSURGERY_VLLM")
    if not python:
        pytest.skip("LRSURGERY_VLLM names no Python that has vLLM")
    low = tmp_path / "low"
    rank = {"*q_proj": 24, "*up_proj": 40, "*": 48}  # other ranks within one merged projection
    source = save(tmp_path / "dense", name)
    ranks = [f"{pattern}={value}" for pattern, value in rank.items() if pattern != "*"] if name == "llama" else []
    lrsurgery.factorise_checkpoint(source, low, rank=["48", *ranks], form=form, loss_check=False)
    model = lrsurgery.load_model(low, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )  # type: ignore[operator]
    wanted = made[0, len(PROMPT) :].tolist()
    dist = tmp_path / "site" / "lrsurgery-0.dist-info"  # as an installation has it
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: lrsurgery\nVersion: 0\n")
    (dist / "entry_points.txt").write_text("[vllm.general_plugins]\nlrsurgery = lrsurgery.serving.vllm:register\n")
    (tmp_path / "serve.py").write_text(SCRIPT)
    done = subprocess.run(
        [python, tmp_path / "serve.py", low, json.dumps(PROMPT), str(NEW)],
        env={**os.environ, "PYTHONPATH": f"{dist.parent}:{ROOT}", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    assert lines, done.stderr[-2000:]
    assert json.loads(lines[0].removeprefix("TOKENS")) == wanted
