"""Export to the graph of another runtime, with the low-rank layers as they are.

What was written is run by its own runtime before the folder appears, and compared with the model.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.output import OutputOptions, check_output, copy_companions, output_config
from lrsurgery.checkpoints.source import Source, SourceOptions
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.export.graphs.feed import MASK, Feed, feed_of
from lrsurgery.export.graphs.runtimes import EXECUTORCH, ONNX, OPENVINO, Runtime, export_transformers
from lrsurgery.files.json import json_text
from lrsurgery.files.writing import staged, write_text
from lrsurgery.progress import Listener
from lrsurgery.report.card import graph_card

TOLERANCE = 1e-3  # of the largest output: sums in another order stay far below, a wrong graph is far above
SHOWN = 300  # characters of another library's reason


def to_graph(
    runtime: Runtime,
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    listener: Listener,
) -> None:
    """Write a factorised checkpoint as the graph of a runtime, in fp32, with its tokenizer or processor.

    Raises SurgeryError if a package is missing, if the exporter cannot convert the model (with its reason), or if the
    runtime computes something else than the model.
    """
    source = source_options.resolve(reference)
    if not source.is_factorised:
        raise SourceError(f"{reference}: not a factorised checkpoint, so there is nothing to export")
    check_output(output, source, options.overwrite)
    _check_packages(runtime, source)
    trust = source_options.trust_remote_code
    model = load_source(source, dtype=torch.float32, trust_remote_code=trust).requires_grad_(False)
    feed = feed_of(source, model, trust_remote_code=trust)
    with staged(output, overwrite=options.overwrite) as stage:
        listener.progress("conversion", 0, 2)
        copy_companions(source, stage)
        with _faults(runtime, reference, model), _quiet():
            if source.library == "timm":
                runtime.convert(model, feed, stage)
            else:
                export_transformers(runtime, model, feed, stage)
        listener.progress("check", 1, 2)
        with _quiet():
            check_graph(runtime, stage, model, feed, reference)
        config = output_config(source, model, {}, torch.float32)
        write_text(stage / "config.json", json_text(config))
        usage = runtime.usage.format(folder=json.dumps(output.name), inputs=_inputs_text(feed))
        card = graph_card(source, output.name, config, runtime.title, usage, options.command)
        write_text(stage / "README.md", card)
        listener.progress("check", 2, 2)


def to_gguf(
    reference: str, output: Path, source_options: SourceOptions, options: OutputOptions, listener: Listener
) -> None:
    """Raise SurgeryError with the two commands that make a GGUF file, which has no layers of low rank."""
    dense = shlex.quote(f"{str(output).removesuffix('.gguf')}-dense")
    raise SurgeryError(
        "--to gguf: GGUF has no low-rank layers, and llama.cpp's own converter writes it from dense ones:"
        f" lrsurgery export {shlex.quote(reference)} --to dense --output {dense} &&"
        f" python convert_hf_to_gguf.py {dense}"
    )


to_onnx, to_openvino, to_executorch = (partial(to_graph, each) for each in (ONNX, OPENVINO, EXECUTORCH))


def check_graph(runtime: Runtime, folder: Path, model: nn.Module, feed: Feed, reference: str) -> None:
    """Run the graph in a folder on inputs of another batch size and length than it was traced with.

    Raises SurgeryError if it cannot run, or if an output is another than the model's.
    """
    inputs = feed.random(3 if runtime.batches else 1, 11, 1)
    real = None
    if MASK in inputs and runtime.batches and inputs[MASK].shape[1] > 2:
        inputs[MASK][0, -2:] = 0  # padded on the right; what is computed at padding is nobody's business
        real = inputs[MASK].bool()
    quiet: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with torch.no_grad():
        wanted = tree_leaves(model(*inputs.values()) if feed.image else model(**inputs, **quiet))
    expected = [each for each in wanted if isinstance(each, Tensor)]
    try:
        found = runtime.run(folder, inputs)
    except Exception as e:  # a runtime raises anything for what it does not support
        raise SurgeryError(f"{reference}: {runtime.title} cannot run what was exported: {_reason(e)}") from e
    if len(found) != len(expected):
        raise SurgeryError(f"{reference}: {runtime.title} gives {len(found)} outputs, the model {len(expected)}")
    for theirs, ours in zip(found, expected, strict=True):
        error = _error(theirs, ours, real)
        if not error <= TOLERANCE:
            raise SurgeryError(
                f"{reference}: {runtime.title} computes another output than the model (relative error {error:.1e}, at"
                f" most {TOLERANCE:.0e}), so nothing is written; try another version of {runtime.packages[0]}"
            )


def _error(theirs: Tensor, ours: Tensor, real: Tensor | None) -> float:
    """The largest difference, relative to the largest output, at the positions that are no padding."""
    if theirs.shape != ours.shape:
        return float("inf")
    if real is not None and ours.shape[:2] == real.shape:
        theirs, ours = theirs[real], ours[real]
    return float((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-12))


def _check_packages(runtime: Runtime, source: Source) -> None:
    """Raise SurgeryError if a package is missing, or if transformers is older than its exporters."""
    lacking = [name for name in runtime.packages if find_spec(name) is None]
    if lacking:
        raise SurgeryError(
            f"--to {runtime.name} needs {' and '.join(lacking)}: pip install 'lrsurgery[{runtime.name}]'"
        )
    if source.library != "timm":
        import transformers

        if find_spec("transformers.exporters") is None:
            raise SurgeryError(
                f"--to {runtime.name} of a transformers model needs transformers 5.24 or newer, for its exporters;"
                f" installed: {transformers.__version__} (pip install -U transformers)"
            )


@contextlib.contextmanager
def _faults(runtime: Runtime, reference: str, model: nn.Module) -> Iterator[None]:
    """Turn what an exporter raises into one line. Raises SurgeryError."""
    try:
        yield
    except (SurgeryError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # of any type, by what the model does
        name = type(model).__name__
        raise SurgeryError(
            f"{reference}: {name} cannot be exported to {runtime.title}: {_reason(e)}; --to dense writes a folder for"
            " exporters of your own (--debug shows where it fails)"
        ) from e


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:SHOWN]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the steps and warnings that exporters print off the screen, where stdout is for one JSON object."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


def _inputs_text(feed: Feed) -> str:
    """The inputs as Python writes them, each an array of its own name."""
    return "{" + ", ".join(f'"{name}": {name}' for name in feed.names) + "}"
