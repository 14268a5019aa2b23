"""Train a small GPT-2 from scratch on text that every Python carries, and write it as a Hugging Face checkpoint.

    python examples/train_pydocs_gpt2.py --output examples/pydocs-gpt2

The text is pydoc's language topics and the docstrings of the standard library: no download is needed. The result is a
small but real checkpoint (trained weights, tokenizer, held-out text) to try lrsurgery on. It runs in float32, on a GPU
if torch sees one; the same command on the same machine gives the same model, and another machine, Python version or
number of threads gives a very similar one.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import platform
import re
import sysconfig
import tempfile
import textwrap
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from perplexity import encode, measure, read_text  # the folder of this script comes first on sys.path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, Trainer, TrainingArguments, set_seed

EOT = "<|endoftext|>"
SEPARATOR = f"\n{EOT}"  # spelled out between documents: whoever tokenises valid.txt gets the tokens trained on
VOCAB = 2048
BLOCK = 256
STRIDE = 64  # training blocks overlap, so that a token is not always seen at the same position: less overfitting
BATCH = 8  # small: with this little computing, many small steps learn faster than few large ones
LEARNING_RATE = 2e-3
VALID_PERCENT = 5
VALID_BYTES = 120_000
LOG_STEPS = 200
# Not documentation of the library: tests, an application, a test-like package, and whatever was installed later.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "_bundled"}


def stdlib_documents() -> dict[str, str]:
    """One document per module of the standard library: its docstrings in source order, each said only once."""
    root = Path(sysconfig.get_path("stdlib"))
    documents, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # Folders such as lib-dynload or config-3.11-... are not packages; generated _sysconfigdata differs by machine.
        if SKIPPED & set(parts) or not all(p.isidentifier() for p in parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        tree = ast.parse(path.read_bytes())  # parsed, never imported: modules such as `this` or `antigravity` act
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        pieces = []
        for node in [tree, *sorted(nodes, key=lambda n: n.lineno)]:
            doc = ast.get_docstring(node)
            if not doc or doc in seen:
                continue
            seen.add(doc)
            if isinstance(node, ast.ClassDef):
                pieces.append(f"class {node.name}")
            elif not isinstance(node, ast.Module):
                pieces.append(f"{node.name}({ast.unparse(node.args)})")
            pieces.append(doc)
        if pieces:
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            documents[name] = "\n\n".join([f"module {name}", *pieces])
    return documents


def rank(key: str) -> int:
    """A stable pseudo-random number for a name: the same on every machine and every Python, whatever else exists."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def paragraphs(document: str) -> list[tuple[str, str]]:
    """The paragraphs of a document, each with a form that ignores layout, to compare by; short ones compare as ''."""
    split = re.split(r"\n\s*\n", document)
    plain = [" ".join(p.split()) for p in split]
    return [(p, q if len(q) >= 40 else "") for p, q in zip(split, plain, strict=True)]


def make_split() -> tuple[list[str], list[str]]:
    """The training and the validation documents, decided for each topic and module by a hash of its name."""
    named = {f"topic {name}": text.strip() for name, text in topics.items()}
    named |= {f"module {name}": text.strip() for name, text in stdlib_documents().items()}
    held_out = {key for key in named if rank(key) % 100 < VALID_PERCENT}
    valid, used = [], 0
    # A small file: whole documents, in an order that depends on names only. Those left over go in neither split.
    for key in sorted(held_out, key=rank):
        size = len((named[key] + SEPARATOR).encode())
        if used + size <= VALID_BYTES:
            used += size
            valid.append(named[key])
    # pydoc's topics quote one another (`compound` holds all of `while`) and docstrings get copied between modules:
    # a paragraph of the validation text that stayed in the training text would make the perplexity look too good.
    leaked = {plain for document in valid for _, plain in paragraphs(document)} - {""}
    train = []
    for key in sorted(set(named) - held_out):
        kept = [paragraph for paragraph, plain in paragraphs(named[key]) if plain not in leaked]
        if kept:
            train.append("\n\n".join(kept))
    return train, valid


def make_tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE tokenizer like GPT-2's, trained on the training documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    # GPT-2's own class: its name in tokenizer_config.json is one that every release of transformers can load.
    wrapped: Any = GPT2Tokenizer(tokenizer_object=tokenizer, model_max_length=BLOCK)
    return wrapped


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """All blocks of BLOCK tokens of a token stream, one every STRIDE tokens; the model shifts the labels itself."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor(ids)

    def __len__(self) -> int:
        return (len(self.ids) - BLOCK) // STRIDE + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.ids[index * STRIDE : index * STRIDE + BLOCK]
        return {"input_ids": block, "labels": block}


def make_model(tokenizer: Any) -> Any:
    """About 1.6 million parameters: folder sizes stay friendly to a git repository."""
    eot = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=BLOCK, n_embd=160, n_layer=4, n_head=5,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=eot, eos_token_id=eot,
        )
    )  # fmt: skip


def train(model: Any, dataset: Blocks, steps: int, seed: int) -> float:
    """Train ``model`` in place with transformers' Trainer; the last logged loss, a mean over LOG_STEPS steps."""
    with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder even when it saves nothing into it
        arguments = TrainingArguments(
            output_dir=scratch, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_steps=min(LOG_STEPS, steps), max_steps=steps, per_device_train_batch_size=BATCH, seed=seed,
            learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=min(200, steps // 10),
            weight_decay=0.1, adam_beta2=0.95,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        trainer.train()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


CARD = """\
    ---
    language: en
    license: other
    license_name: psf-2.0
    license_link: https://docs.python.org/3/license.html
    library_name: transformers
    pipeline_tag: text-generation
    tags:
    - gpt2
    - text-generation
    - python
    - lrsurgery
    ---

    # pydocs-gpt2

    A GPT-2 of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, {block} positions, tied head),
    trained from scratch on Python's own documentation, with its own byte-level BPE tokenizer of {vocab} tokens.

    **Intended use:** a small real checkpoint to try lrsurgery on. Its weights are trained, so compressing them costs
    something that can be measured, on text it has not seen, in seconds and without a download. It writes text that
    looks like Python documentation and means nothing; it is of no use for anything else.

    ## Data

    The topics of `pydoc_data.topics` and the docstrings of the standard library, as they come with Python {python}.
    A hash of its name puts each topic and each module into one of two splits; paragraphs of the training text that
    also occur in the validation text were removed. Documents are joined by `<|endoftext|>`.

    | split | documents | tokens |
    | --- | ---: | ---: |
    | train | {train_documents} | {train_tokens:,} |
    | valid (`valid.txt`) | {valid_documents} | {valid_tokens:,} |

    ## Training

    Made with transformers' `Trainer` by

    ```
    {command}
    ```

    in {minutes:.0f} minutes on {machine}, in float32: {steps} steps of {batch} blocks of {block} tokens.

    | | |
    | --- | ---: |
    | final training loss per token (with dropout, mean of the last {log_steps} steps) | {train_loss:.4f} |
    | validation loss per token | {valid_loss:.4f} |
    | **validation perplexity** | **{perplexity:.3f}** |

    The batch size was picked by validation perplexity among four short runs, so the figure is a little optimistic.
    The validation figures are over all of `valid.txt`, in non-overlapping blocks of {block} tokens; to repeat them:

    ```
    python examples/perplexity.py examples/pydocs-gpt2/valid.txt examples/pydocs-gpt2
    ```

    ## Licence

    `valid.txt` is documentation of Python, Copyright © Python Software Foundation, under the
    [PSF License Agreement](https://docs.python.org/3/license.html) (code examples in the documentation also under the
    Zero-Clause BSD licence). The weights and the tokenizer were derived from such text alone and come under the same
    terms.
    """


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on Python's own documentation.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint into")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and dropout (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    train_documents, valid_documents = make_split()
    tokenizer = make_tokenizer(train_documents)
    train_ids = encode(tokenizer, SEPARATOR.join(train_documents))
    args.output.mkdir(parents=True, exist_ok=True)
    valid_path = args.output / "valid.txt"
    valid_path.write_bytes(SEPARATOR.join(valid_documents).encode())
    valid_ids = encode(tokenizer, read_text(valid_path))  # from the file: what perplexity.py will see
    print(f"{len(train_ids):,} training tokens, {len(valid_ids):,} validation tokens")

    set_seed(args.seed)  # before the weights are drawn; Trainer seeds the data order
    model = make_model(tokenizer)
    begin = time.monotonic()
    train_loss = train(model, Blocks(train_ids), args.steps, args.seed)
    minutes = (time.monotonic() - begin) / 60
    model.config.use_cache = True  # Trainer turned it off; generating from the saved model wants it
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    machine = f"{args.threads} CPU cores" if model.device.type == "cpu" else "one GPU"
    # Measured where perplexity.py measures by default, so that the card and the script agree to the last digit.
    valid = measure(model.cpu(), valid_ids)
    card = textwrap.dedent(CARD).format(
        parameters=valid.parameters, layers=model.config.n_layer, width=model.config.n_embd,
        heads=model.config.n_head, block=BLOCK, vocab=len(tokenizer), python=platform.python_version(),
        train_documents=len(train_documents), train_tokens=len(train_ids),
        valid_documents=len(valid_documents), valid_tokens=len(valid_ids),
        command=f"python examples/train_pydocs_gpt2.py --output {args.output.as_posix()} "
        f"--steps {args.steps} --seed {args.seed} --threads {args.threads}",
        minutes=minutes, machine=machine, steps=args.steps, batch=BATCH, log_steps=min(LOG_STEPS, args.steps),
        train_loss=train_loss, valid_loss=valid.loss, perplexity=valid.perplexity,
    )  # fmt: skip
    (args.output / "README.md").write_text(card, encoding="utf-8", newline="\n")
    print(f"train loss {train_loss:.4f}, validation perplexity {valid.perplexity:.3f}, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
