"""Other people's programs load a factorised folder as they load any other: nothing of ours is imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import tiny
from support.installed import environment, python
from support.interop import in_its_job, need

import lrsurgery

pytestmark = pytest.mark.process

TASK = """\
task: local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
TRAINED_BY_NOBODY = """
import sys, torch, accelerate, transformers as tf
model = accelerate.Accelerator(cpu=True).prepare(tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]))
ids = torch.arange(12)[None]
print(f"{float(model(ids, labels=ids).loss):.4f}")
"""
EMBEDDED = """
import sys, sentence_transformers
vectors = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu").encode(["one sentence", "and another"])
print(*(f"{value:.4f}" for value in vectors.flatten()[:40]))
"""
PIPELINES = """
import sys, transformers as tf
labels = tf.pipeline("image-classification", sys.argv[1], device="cpu")(sys.argv[2], top_k=None)
print(*sorted(f"{each['label']} {each['score']:.4f}" for each in labels))
"""


def _pair(folder: Path, source: Path) -> tuple[Path, Path]:
    """A factorised folder and its dense export."""
    lrsurgery.factorise_checkpoint(source, folder / "half", rank=0.5)
    lrsurgery.export_dense(folder / "half", folder / "dense")
    return folder / "half", folder / "dense"


def test_lm_eval_prints_the_figures_of_the_dense_export(tmp_path: Path) -> None:
    need("lm_eval")
    pair = _pair(tmp_path, tiny.save_gpt2(tmp_path / "source"))
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"page": document}) + "\n" for document in tiny.documents()))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    variables = environment(tmp_path / "python")
    tables = []
    for folder in pair:
        arguments = ("--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", "local")
        arguments += ("--include_path", str(tmp_path), "--device", "cpu")
        done = python(variables, "-m", "lm_eval", *arguments)
        assert done.returncode == 0, done.stderr
        tables.append([line for line in done.stdout.splitlines() if "perplexity" in line or "bits_per_byte" in line])
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]


def _same(tmp_path: Path, pair: tuple[Path, Path], *words: object, last: tuple[object, ...] = ()) -> None:
    variables = environment(tmp_path / "python")
    low_rank, dense = (python(variables, *words, folder, *last) for folder in pair)
    assert low_rank.returncode == 0, low_rank.stderr
    assert low_rank.stdout.strip()
    assert low_rank.stdout == dense.stdout


def test_sentence_transformers_embeds_alike(tmp_path: Path) -> None:
    need("sentence_transformers")
    source = tiny.save_bert(tmp_path / "source", "BertModel")
    _same(tmp_path, _pair(tmp_path, source), "-c", EMBEDDED)


@in_its_job
def test_a_script_that_accelerate_launches_has_the_same_loss(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAINED_BY_NOBODY)
    pair = _pair(tmp_path, tiny.save_gpt2(tmp_path / "source"))
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no")
    _same(tmp_path, pair, *launch, "--num_machines", "1", "--dynamo_backend", "no", tmp_path / "script.py")


@in_its_job
def test_an_image_pipeline_gives_the_same_scores(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images")
    image = next(file for file in sorted(images.rglob("*")) if file.is_file() and file.suffix in (".png", ".jpg"))
    _same(tmp_path, _pair(tmp_path, tiny.save_vit(tmp_path / "source")), "-c", PIPELINES, last=(image,))
