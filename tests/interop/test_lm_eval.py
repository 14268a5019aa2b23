"""`evaluate --protocol lm-eval` against lm_eval itself, on the embedded model, with a task of local files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tiny
from support.interop import need
from support.warm import program

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "pydocs-gpt2"
MARKED = (  # each of WikiText's marks, and what else its task rewrites
    "It 's a test @-@ case of 3 @,@ 400 m at 21 ° C ( about 70 @.@ 5 ) , \" quoted \" ; the boys ' own : N \n"
    " = = Heading = = \n [ a ] { b } ! = = = Below = = = ? x ' y ' and /' 3/ . \n"
)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: {target}
process_results: !function preprocess_wikitext.process_results
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("protocol", "target"),
    [("lm-eval", "!function preprocess_wikitext.wikitext_detokenizer"), ("lm-eval-plain", '"{{page}}"')],
)
def test_figures_are_those_of_lm_eval(tmp_path: Path, protocol: str, target: str) -> None:
    lm_eval = need("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    text = (MODEL / "valid.txt").read_text()
    # of several windows, of less than one, of exactly one token, and of every mark
    documents = [text[:30_000], text[30_000:30_200], "a", MARKED * 3, text[30_200:60_000]]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"page": document}) + "\n" for document in documents))
    shutil.copy(Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "preprocess_wikitext.py", tmp_path)
    (tmp_path / "task.yaml").write_text(TASK.format(name="local", data=data, target=target))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=4),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["local"]
    ours = json.loads(
        program(*tiny.PROGRAM, "evaluate", MODEL, "--data", data, "--protocol", protocol, "--json").stdout
    )
    values = ours["models"][0]["values"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert values[name] == pytest.approx(found[f"{name},none"], rel=1e-4)
