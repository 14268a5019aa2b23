"""What data makes of surgery: plain SVD, activation scaling, whitening, and lrsurgery's metrics and budget.

One model, the same calibration samples, the same number of parameters for every method; right after surgery and healed.
Then how many samples it takes, and how well the predicted loss agrees with the measured one, over plans and layers.

The published ways stand as their papers have them: scaling by the root mean square of each input to the power alpha
(ASVD, Yuan et al. 2023, arXiv:2312.05821), and whitening by the Cholesky factor of C, the second moment of the inputs
(SVD-LLM, Wang et al. 2024, arXiv:2403.07378), lifted by its lowest eigenvalue where it is singular.

    python examples/pydocs_text.py --output pydocs-text
    python examples/benchmarks/calibration.py --save
    python examples/benchmarks/calibration.py --only refinement --steps 100 --shares 0.5 0.25 --name refinement --save
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, TypeAlias

import torch
from harness import RESULTS, finish, parser, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lrsurgery
from lrsurgery.calibration.collect import call
from lrsurgery.calibration.loss import TEMPERATURE, logits_of
from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.examples import (
    calibration_examples,
    evaluation_examples,
    open_rows,
    prepare_subject,
    training_examples,
)
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject, task_of
from lrsurgery.linalg import Factors, balance, truncated_svd
from lrsurgery.linalg.weighted import Metric, second_order, weighted_factors, weighted_values
from lrsurgery.refine.reconstruction import HELD_OUT
from lrsurgery.surgery.layers import factor_weights

BATCH = {True: 8, False: 64}  # sequences, images
Batch: TypeAlias = "dict[str, Tensor]"
Truncate: TypeAlias = "Callable[[Tensor, int, lrsurgery.Statistics, str], Factors]"


@dataclass(frozen=True)
class Case:
    """A model and its data."""

    subject: Subject
    language: bool
    heldout: list[Batch]
    calibration: Callable[[int, int], list[Batch]]  # samples, seed
    training: Callable[[int], Iterator[Batch]]  # steps


def plain_svd(weight: Tensor, rank: int, statistics: lrsurgery.Statistics, name: str) -> Factors:
    return truncated_svd(weight, rank)


def scale_inputs(weight: Tensor, rank: int, statistics: lrsurgery.Statistics, name: str, *, alpha: float) -> Factors:
    scale = statistics.moments(name).inputs.diagonal().clamp(min=0).pow(alpha / 2) + 1e-6
    u, v = truncated_svd(weight * scale, rank)
    return balance(Factors(u, v / scale))


def whiten(weight: Tensor, rank: int, statistics: lrsurgery.Statistics, name: str) -> Factors:
    moment = statistics.moments(name).inputs.double()
    root, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        lift = 1e-6 - float(torch.linalg.eigvalsh(moment)[0])
        root = torch.linalg.cholesky(moment + lift * torch.eye(len(moment), dtype=moment.dtype))
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    v = torch.linalg.solve_triangular(root, s[:rank, None] * vh[:rank], upper=False, left=False)
    return balance(Factors(u[:, :rank].to(weight), v.to(weight)))


def use_metric(weight: Tensor, rank: int, statistics: lrsurgery.Statistics, name: str) -> Factors:
    metric = statistics.metric(name)
    assert isinstance(metric, Metric)
    return weighted_factors(weight, rank, metric).factors


METHODS: dict[str, Truncate] = {
    "plain SVD": plain_svd,
    "scaling, alpha 0.5 (ASVD)": functools.partial(scale_inputs, alpha=0.5),
    "scaling, alpha 1": functools.partial(scale_inputs, alpha=1.0),
    "whitening (SVD-LLM)": whiten,
    "lrsurgery, activations": use_metric,
    "lrsurgery, fisher": use_metric,
}
BUDGET = "lrsurgery, fisher, one budget"


def surgery(dense: nn.Module, method: str, share: float, statistics: lrsurgery.Statistics) -> nn.Module:
    """A copy of the model with so large a share of the parameters of its layers, as `--rank params:SHARE` leaves it.

    A budget is the parameters that this leaves in all, so that no method has more than another.
    """
    model = copy.deepcopy(dense)
    lrsurgery.factorise_(model, rank=f"params:{share}")
    if method == BUDGET:
        taken = lrsurgery.factorised_layers(model)  # statistics also know tables and heads, which stay
        able = sum(dense.get_submodule(name).weight.numel() for name in taken)  # type: ignore[union-attr,operator,misc]
        kept = 1 - (size_of(dense) - size_of(model)) / able
        model = copy.deepcopy(dense)
        # in two factors, as the published ways have them: the pivoted form would have more rank for its parameters
        lrsurgery.factorise_(model, budget=kept, statistics=statistics, form="balanced")
        return model
    known = statistics.without_gradients() if method.endswith("activations") else statistics
    for name, layer in lrsurgery.factorised_layers(model).items():
        weight: Tensor = dense.get_submodule(name).weight.detach()  # type: ignore[assignment,union-attr,operator]
        factors = METHODS[method](layer.layout.to_matrix(weight), layer.rank, known, name)
        stored = factor_weights(layer.layout, weight, factors)
        layer.u.weight.data, layer.v.weight.data = stored.u, stored.v
    return model


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def predict_increase(dense: nn.Module, model: nn.Module, statistics: lrsurgery.Statistics) -> dict[str, float]:
    """What each factorised layer adds to the loss, by the second order of its metric."""
    found = {}
    for name, layer in lrsurgery.factorised_layers(model).items():
        metric = statistics.metric(name)
        assert metric is not None
        weight: Tensor = dense.get_submodule(name).weight.detach()  # type: ignore[assignment,union-attr,operator]
        values = weighted_values(layer.layout.to_matrix(weight), metric)
        found[name] = second_order(values, layer.rank)
    return found


@torch.no_grad()
def measure(model: nn.Module, case: Case) -> dict[str, float]:
    """Loss (nats) and top-1 on all that is held out."""
    total, right, count = 0.0, 0, 0
    model.eval()
    for batch in case.heldout:
        logits, answers = align_answers(model, batch, case)
        total += float(cross_entropy(logits, answers, reduction="sum"))
        right += int((logits.argmax(-1) == answers).sum())
        count += len(answers)
    return {"loss": total / count, "top-1": right / count}


def align_answers(model: nn.Module, batch: Batch, case: Case) -> tuple[Tensor, Tensor]:
    """The logits (n, classes) of all that is scored in a batch, and what is right."""
    logits, labels = logits_of(run(model, batch, case)).float(), batch["labels"]
    if case.language:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels >= 0
    return logits[counted], labels[counted]


def run(model: nn.Module, batch: Batch, case: Case) -> Any:
    return call(model, batch if case.subject.source.library == "transformers" else batch["pixel_values"])


def heal(model: nn.Module, case: Case, steps: int, lr: float) -> nn.Module:
    """Trained for so many steps, the learning rate going down to 0."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in case.training(steps):
        loss = cross_entropy(*align_answers(model, batch, case))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def prepare(arguments: argparse.Namespace) -> Case:
    options = DataOptions(block_size=arguments.block_size, image_size=arguments.image_size)
    source = resolve(arguments.model)
    kind = task_of(source)
    rows = open_rows(arguments.data, kind, options, split=arguments.split)
    other = open_rows(arguments.eval_data, kind, options, split=arguments.eval_split)
    subject = prepare_subject(source, options, rows)
    language = TASKS[kind].is_language
    size = BATCH[language]
    subject.model.eval()

    def batches(examples: Any, chosen: Sequence[int]) -> list[Batch]:
        return [
            dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
            for at in range(0, len(chosen), size)
        ]

    heldout = evaluation_examples(subject, other, options)
    train = training_examples(subject, rows, options, seed=0, augment=False)

    def calibration(samples: int, seed: int) -> list[Batch]:
        examples, chosen = calibration_examples(subject, rows, options, samples, seed)
        return batches(examples, chosen)

    def training(steps: int) -> Iterator[Batch]:
        generator, size = torch.Generator().manual_seed(0), arguments.batch_size
        order: list[int] = []
        for _ in range(steps):
            while len(order) < size:
                order += torch.randperm(len(train.dataset), generator=generator).tolist()
            yield dict(train.collate([train.dataset[i] for i in order[:size]]))
            order = order[size:]

    return Case(subject, language, batches(heldout, range(len(heldout.dataset))), calibration, training)


def collect(
    case: Case, samples: int, seed: int, importance: str = "fisher", temperature: float = TEMPERATURE
) -> lrsurgery.Statistics:
    batches: list[Any] = case.calibration(samples, seed)
    if case.subject.source.library == "timm":
        batches = [batch["pixel_values"] for batch in batches]
    body = case.subject.body
    return lrsurgery.collect_statistics(body, batches, importance=importance, seed=seed, temperature=temperature)


def over_seeds(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def compare(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each method at each share, over seeds of the calibration samples."""
    dense = case.subject.body
    seen = [collect(case, arguments.samples, seed) for seed in range(arguments.seeds)]
    rows = [row(case, "dense", 1.0, [dense], None)]
    for share in arguments.shares:
        for method in (*METHODS, BUDGET):
            seeds = seen[:1] if method == "plain SVD" else seen
            models = [surgery(dense, method, share, statistics) for statistics in seeds]
            again = None
            if arguments.steps and share == arguments.healed_share:
                again = [heal(model, case, arguments.steps, arguments.lr) for model in models]
            rows.append(row(case, method, share, models, again))
    return rows


def row(
    case: Case, method: str, share: float, models: list[nn.Module], again: list[nn.Module] | None
) -> dict[str, Any]:
    found = [measure(model, case) for model in models]
    made = {
        "share": share,
        "method": method,
        "parameters": max(size_of(m) for m in models),
        "loss": over_seeds([f["loss"] for f in found]),
        "top-1": over_seeds([f["top-1"] for f in found]),
        "healed loss": None,
        "healed top-1": None,
    }
    if again is not None:
        after = [measure(model, case) for model in again]
        made["healed loss"] = over_seeds([f["loss"] for f in after])
        made["healed top-1"] = over_seeds([f["top-1"] for f in after])
    print(".", end="", flush=True)
    return made


def by_temperature(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Inputs alone, and Fisher information at several temperatures, over seeds; the dense model's confidence first.

    Confidence is the mean probability of the likeliest class, over the calibration samples.
    """
    dense, seeds = case.subject.body, range(arguments.seeds)
    found = measure(dense, case)
    rows: list[dict[str, Any]] = [
        {"share": 1.0, "importance": f"dense, {confidence(case, arguments):.2%} confident"}
        | {f"{what}, {key}": f"{found[key]:.4f}" for what in ("uniform", "one budget") for key in ("loss", "top-1")}
    ]
    metrics = {"activations": [collect(case, arguments.samples, seed, "activations") for seed in seeds]}
    for t in arguments.temperatures:
        metrics[f"fisher, T = {t:g}"] = [collect(case, arguments.samples, seed, temperature=t) for seed in seeds]
    for share in arguments.shares:
        for name, seen in metrics.items():
            made: dict[str, Any] = {"share": share, "importance": name}
            for what, method in (("uniform", "lrsurgery, fisher"), ("one budget", BUDGET)):
                measured = [measure(surgery(dense, method, share, statistics), case) for statistics in seen]
                for key in ("loss", "top-1"):
                    made[f"{what}, {key}"] = over_seeds([each[key] for each in measured])
            rows.append(made)
            print(".", end="", flush=True)
    return rows


@torch.no_grad()
def confidence(case: Case, arguments: argparse.Namespace) -> float:
    """The mean probability that the dense model gives to its answer, over the calibration samples."""
    case.subject.body.eval()
    batches = case.calibration(arguments.samples, 0)
    highest = [logits_of(run(case.subject.body, b, case)).float().softmax(-1).amax(-1).flatten() for b in batches]
    return float(torch.cat(highest).mean())


REFINEMENTS = {
    "anchored regression": lrsurgery.Refinement(steps=0),  # AdaSVD's optimum
    "block reconstruction": lrsurgery.Refinement(anchored=False),  # AA-SVD
    "--refine": lrsurgery.Refinement(),
}


def by_refinement(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Two cuts right after surgery, and after each way of fitting them to the dense model, over seeds."""
    dense, rows = case.subject.body, [row(case, "dense", 1.0, [case.subject.body], None)]
    for share, cut in itertools.product(arguments.shares, ("plain SVD", BUDGET)):
        made: dict[str, list[nn.Module]] = {cut: []}
        for seed in range(arguments.seeds):
            statistics = collect(case, arguments.samples, seed)
            given: list[Any] = case.calibration(arguments.samples, seed)
            if case.subject.source.library == "timm":
                # as many calls as the command makes, so that an eighth is held out and no more
                images = torch.cat([batch["pixel_values"] for batch in given])
                given = list(torch.split(images, max(1, len(images) // (2 * HELD_OUT))))
            made[cut].append(surgery(dense, cut, share, statistics))
            for name, how in REFINEMENTS.items():
                model = copy.deepcopy(made[cut][-1])
                asked = dataclasses.replace(how, seed=seed, steps=how.steps and arguments.steps)
                known = statistics if cut == BUDGET else None
                lrsurgery.refine_(model, dense, given, refinement=asked, statistics=known)
                made.setdefault(f"{cut}, then {name}", []).append(model)
        rows += [row(case, name, share, models, None) for name, models in made.items()]
    return rows


def by_samples(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The loss right after surgery at one share, by the number of calibration samples."""
    share, rows = arguments.healed_share, []
    for samples in arguments.sensitivity:
        statistics = collect(case, samples, 0)
        found = {
            method: measure(surgery(case.subject.body, method, share, statistics), case)["loss"]
            for method in (*METHODS, BUDGET)
            if method != "plain SVD"
        }
        rows.append({"samples": samples, **found})
        print(".", end="", flush=True)
    return rows


def agreement(case: Case, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, list[list[float]]]]:
    """How the predicted increase of the loss and the measured one agree: over plans, and over layers one at a time."""
    dense, statistics = case.subject.body, collect(case, arguments.samples, 0)
    before = measure(dense, case)["loss"]
    points: dict[str, list[list[float]]] = {"plans": [], "layers": []}
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        for method in ("lrsurgery, fisher", BUDGET):
            model = surgery(dense, method, share, statistics)
            expected = sum(predict_increase(dense, model, statistics).values())
            points["plans"].append([expected, measure(model, case)["loss"] - before])
    whole = copy.deepcopy(dense)
    lrsurgery.factorise_(whole, rank=f"params:{arguments.healed_share}")
    for name in lrsurgery.factorised_layers(whole):
        model = copy.deepcopy(dense)
        lrsurgery.factorise_(model, rank=f"params:{arguments.healed_share}", include=[name], statistics=statistics)
        expected = sum(predict_increase(dense, model, statistics).values())
        points["layers"].append([expected, measure(model, case)["loss"] - before])
    rows = []
    for of, pairs in points.items():
        ratios = sorted(measured / expected for expected, measured in pairs if expected > 0)
        rows.append(
            {
                "of": of,
                "number": len(pairs),
                "Spearman": spearman(pairs),
                "measured / predicted, median": ratios[len(ratios) // 2] if ratios else None,
                "smallest": ratios[0] if ratios else None,
                "largest": ratios[-1] if ratios else None,
            }
        )
    return rows, points


def spearman(pairs: list[list[float]]) -> float:
    ranks = [torch.tensor(side).argsort().argsort().double() for side in zip(*pairs, strict=True)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def seconds(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What calibration takes beside the decompositions, in one process."""
    dense = case.subject.body
    statistics = collect(case, arguments.samples, 0)
    share = arguments.healed_share
    work: dict[str, Callable[[], Any]] = {
        "statistics, activations": lambda: collect(case, arguments.samples, 0, "activations"),
        "statistics, fisher": lambda: collect(case, arguments.samples, 0),
        "decompositions, plain": lambda: lrsurgery.factorise_(copy.deepcopy(dense), rank=f"params:{share}"),
        "decompositions, in the metric": lambda: lrsurgery.factorise_(
            copy.deepcopy(dense), rank=f"params:{share}", statistics=statistics
        ),
        "decompositions, one budget": lambda: lrsurgery.factorise_(
            copy.deepcopy(dense), budget=share, statistics=statistics
        ),
    }
    spent: dict[str, float] = {}
    for name, do in work.items():
        begun = time.perf_counter()
        do()
        spent[name] = time.perf_counter() - begun
    base = spent["decompositions, plain"]
    return [{"what": name, "seconds": s, "times plain decompositions": s / base} for name, s in spent.items()]


def scatter(points: dict[str, list[list[float]]], name: str) -> None:
    """Predicted against measured, in results/NAME.svg."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, (of, pairs) in zip(figure.subplots(1, 2), points.items(), strict=True):
        expected, measured = zip(*pairs, strict=True)
        axes.loglog(expected, measured, "o", markersize=4)
        ends = [min(expected), max(expected)]
        axes.loglog(ends, ends, color="grey", linewidth=0.8)
        axes.set(title=of, xlabel="predicted increase of the loss", ylabel="measured")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--model", default="examples/pydocs-gpt2")
    made.add_argument("--data", default="pydocs-text/train.txt", help="to calibrate and to heal on")
    made.add_argument("--eval-data", default="examples/pydocs-gpt2/valid.txt", help="to measure on")
    made.add_argument("--split")
    made.add_argument("--eval-split")
    made.add_argument("--block-size", type=int)
    made.add_argument("--image-size", type=int)
    made.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    made.add_argument("--healed-share", type=float, default=0.5)
    made.add_argument("--steps", type=int, default=75, help="of healing; 0 for none")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--samples", type=int, default=128)
    made.add_argument("--sensitivity", type=int, nargs="+", default=[8, 32, 128, 256])
    made.add_argument("--seeds", type=int, default=3, help="of the calibration samples")
    made.add_argument("--temperatures", type=float, nargs="+", default=[1, 2, 4], help="of Fisher information")
    made.add_argument(
        "--only", choices=("all", "samples", "temperatures", "refinement"), default="all", help="one table by itself"
    )
    made.add_argument("--name", default="calibration", help="of the results file")
    arguments = made.parse_args()
    case = prepare(arguments)
    if arguments.only != "all":
        alone = {"samples": by_samples, "temperatures": by_temperature, "refinement": by_refinement}[arguments.only]
        finish(arguments.name, alone(case, arguments), arguments)
        return
    parts = {
        "samples": by_samples(case, arguments),
        "seconds": seconds(case, arguments),
    }
    parts["agreement"], points = agreement(case, arguments)
    rows = compare(case, arguments)
    if not arguments.json:
        print()
        for name, part in parts.items():
            print(f"{name}\n{table(part)}\n")
    if arguments.save:
        scatter(points, arguments.name)
    finish(arguments.name, rows, arguments, **parts, points=points)


if __name__ == "__main__":
    main()
