"""The command that measures speed and memory: `bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from lrsurgery.cli.arguments import (
    MACHINE,
    OUTPUT,
    ArchitectureOption,
    DebugOption,
    DeviceOption,
    DtypeName,
    JsonOption,
    ModelArgument,
    QuietOption,
    Task,
    TrustOption,
    command_line,
    make_screen,
    option,
)

if TYPE_CHECKING:
    from lrsurgery.report.bench import Bench

RUN, PRECISION = "What to run", "How precisely"  # panels of help


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        option("--against", panel=RUN, metavar="DENSE", text="Second model, run in turn with it.", default=False),
    ] = None,
    batch: Annotated[
        str, option("--batch", panel=RUN, metavar="N,N", text="Batch sizes, in sequences or images.")
    ] = "1,8",
    length: Annotated[
        str | None,
        option(
            "--length",
            panel=RUN,
            metavar="N,N",
            text="Lengths in tokens; 128,512, or the model's maximum.",
            default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        option("--new-tokens", panel=RUN, metavar="N", text="Tokens at the end to decode; 0 for no decode."),
    ] = 32,
    layers: Annotated[
        bool, option("--layers", panel=RUN, text="Each factorised layer against its dense form too, on its own input.")
    ] = False,
    task: Annotated[
        Task | None, option("--task", panel=RUN, text="Purpose of the model; from its architecture.", default=False)
    ] = None,
    precision: Annotated[
        float,
        option(
            "--precision",
            panel=PRECISION,
            metavar="X",
            text="Relative half width of a speedup's 95% interval to reach.",
        ),
    ] = 0.03,
    seconds: Annotated[
        float, option("--seconds", panel=PRECISION, metavar="S", text="Longest time for each setting.")
    ] = 20.0,
    seed: Annotated[int, option("--seed", panel=PRECISION, text="Seed of the random input.")] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[DtypeName, option("--dtype", panel=MACHINE, text="Dtype of weights and input.")] = "keep",
    threads: Annotated[
        int | None,
        option("--threads", panel=MACHINE, metavar="N", text="Threads of the CPU; torch's default.", default=False),
    ] = None,
    compiled: Annotated[bool, option("--compile", panel=MACHINE, text="Models through torch.compile.")] = False,
    prepare: Annotated[
        bool, option("--prepare", panel=MACHINE, text="Weights as a CPU decodes fastest (prepare_for_inference_).")
    ] = False,
    architecture: ArchitectureOption = None,
    trust_remote_code: TrustOption = False,
    save: Annotated[bool, option("--save", panel=OUTPUT, text="bench.json in MODEL's folder too.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model's latency, throughput, peak memory and FLOPs, beside another one's.

    The input is random: only its shape decides speed. Language models prefill whole sequences, then decode the last
    --new-tokens with a KV cache. Both models run in turn, so that other load on the machine slows both alike. A speedup
    stands with its 95% confidence interval; ideal is the ratio of FLOPs.

    [bold]Examples[/bold]

      lrsurgery bench gpt2-rank-0.5 --against gpt2

      lrsurgery bench gpt2-rank-0.5 --against gpt2 --batch 1 --length 1024 --layers --save

      lrsurgery bench resnet50-half --against timm:resnet50 --threads 1 --json | jq '.runs[].speedup'
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.measure.bench import BenchOptions
    from lrsurgery.measure.bench import bench as measure
    from lrsurgery.report.views.speed import bench_layer_table, size_table, slower_lines, speed_table

    options = BenchOptions(
        batch=_numbers("--batch", batch),
        length=None if length is None else _numbers("--length", length),
        new_tokens=new_tokens,
        precision=precision,
        seconds=seconds,
        layers=layers,
        device=device,
        dtype=str(dtype),
        threads=threads,
        compile=compiled,
        prepare=prepare,
        seed=seed,
        task=None if task is None else str(task),
        trust_remote_code=trust_remote_code,
        architecture=architecture,
    )
    with screen.follow("bench") as listener:
        found = measure(model, against, options, command=command_line(), save=save, listener=listener)
    screen.emit({**found})
    screen.show(size_table(found), "", speed_table(found))
    if found["layers"]:
        screen.show("", bench_layer_table(found), *slower_lines(found))
    for note in [*found["notes"], *_unsure_notes(found, precision)]:
        screen.say(f"Note: {note}")
    if save:
        screen.say(f"Written to {model}/bench.json")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from lrsurgery.errors import SurgeryError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise SurgeryError(f"{name} {text}: write integers with commas, such as 1,8") from e


def _unsure_notes(found: Bench, asked: float) -> list[str]:
    measured = [*(run["reached"] for run in found["runs"]), *(row["reached"] for row in found["layers"])]
    missed = measured.count(False)
    if not missed:
        return []
    return [
        f"{missed} of {len(measured)} measurements, marked ?, did not get within {asked:g} in their time;"
        " raise --seconds, or leave the machine to it"
    ]
