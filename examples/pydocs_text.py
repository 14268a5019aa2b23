"""Write text that every Python carries, split into training and validation: no download is needed.

    python examples/pydocs_text.py --output pydocs-text [--model DIR]

The text is pydoc's language topics and the docstrings of the standard library. `examples/pydocs-gpt2` was trained on it
by `examples/pydocs-gpt2.yaml`; `--model` makes its config and its tokenizer anew. Another Python version has slightly
other documentation, and so gives slightly other files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2Tokenizer

EOT = "<|endoftext|>"
SEPARATOR = f"\n{EOT}"  # spelled out between documents: whoever tokenises valid.txt gets the tokens trained on
VOCAB = 2048
LENGTH = 256  # tokens of a sequence
VALID_PERCENT = 5
VALID_BYTES = 120_000
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
    wrapped: Any = GPT2Tokenizer(tokenizer_object=tokenizer, model_max_length=LENGTH)
    return wrapped


def make_config(tokenizer: Any) -> Any:
    """About 1.6 million parameters: folder sizes stay friendly to a git repository."""
    eot = tokenizer.eos_token_id
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=160,
        n_layer=4,
        n_head=5,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=eot,
        eos_token_id=eot,
        architectures=["GPT2LMHeadModel"],
    )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Write Python's own documentation as training and validation text.")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.txt and valid.txt")
    parser.add_argument("--model", type=Path, help="folder for a config and a tokenizer to train from")
    args = parser.parse_args()

    train_documents, valid_documents = make_split()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train_documents), ("valid", valid_documents)):
        text = SEPARATOR.join(documents).encode()
        (args.output / f"{name}.txt").write_bytes(text)
        print(f"{args.output / name}.txt: {len(documents)} documents, {len(text):,} bytes")
    if args.model is not None:
        tokenizer = make_tokenizer(train_documents)
        tokenizer.save_pretrained(args.model)
        make_config(tokenizer).save_pretrained(args.model)
        print(f"{args.model}: a tokenizer of {len(tokenizer)} tokens and a config")


if __name__ == "__main__":
    main()
