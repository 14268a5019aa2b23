"""Unfinished jobs: killed, resumed, shared by processes; and the cache of spectra. Always the same bytes in the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import tiny
from support.warm import program

import lrsurgery
from lrsurgery.checkpoints.mapping import Entry
from lrsurgery.checkpoints.spectra import SpectrumCache, cache_limit
from lrsurgery.errors import OutputError, SurgeryError, WeightError
from lrsurgery.factorise.work import jobs
from lrsurgery.factorise.work.folder import WorkFolder
from lrsurgery.factorise.work.jobs import Job, schedule
from lrsurgery.files.locks import locked
from lrsurgery.files.pieces import Piece, load_piece, save_piece
from lrsurgery.linalg import svd as linalg
from lrsurgery.runtime import POOL_BYTES, in_order, layers_at_once
from lrsurgery.surgery.apply import decomposition_bytes, decomposition_cost
from lrsurgery.surgery.rows import Replacement

# a process that does something to itself once, when it is about to keep its nth piece
RIGGED = """
import os, signal, sys
from lrsurgery.cli import app as cli
from lrsurgery.factorise.work import jobs
nth, only_rank = int(sys.argv[1]), sys.argv[2]
sys.argv = ["lrsurgery", *sys.argv[3:]]
real, calls = jobs.save_piece, 0
def rigged(*arguments):
    global calls
    calls += 1
    if calls == nth and only_rank in ("all", os.environ.get("RANK")):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
jobs.save_piece = rigged
cli.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gpt2(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LRSURGERY_CACHE", str(folder))
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def rows(folder: Path) -> Any:
    report = json.loads((folder / "rank_report.json").read_text())
    return report["layers"], report["totals"], report["source"]


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that are decomposed in this process."""
    names: list[str] = []
    real = jobs.decompose

    def counted(row: Replacement, *arguments: Any, **options: Any) -> Any:
        names.append(row.name)
        return real(row, *arguments, **options)

    monkeypatch.setattr(jobs, "decompose", counted)
    return names


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    lrsurgery.factorise_checkpoint(model, out, rank=0.4, cache=False)
    return out


@pytest.mark.process
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_killed_and_resumed(nth: int, model: Path, reference: Path, tmp_path: Path, decomposed: list[str]) -> None:
    out = tmp_path / "out"
    killed = program(
        sys.executable, "-c", RIGGED, nth, "all", "factorise", model, "--rank", 0.4, "--output", out, "--jobs", 1
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    done = len(list((tmp_path / ".out.factorising").glob("*.safetensors")))
    assert done == nth - 1
    lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)
    assert len(decomposed) == len(lrsurgery.Report.read(out).factorised) - done
    assert weights(out) == weights(reference)
    assert rows(out) == rows(reference)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def abandoned(model: Path, out: Path) -> Path:
    """The work folder of a process that was killed when it had kept all of its pieces."""
    killed = program(
        sys.executable, "-c", RIGGED, 8, "all", "factorise", model, "--rank", 0.4, "--output", out, "--jobs", 1
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    return out.parent / f".{out.name}.factorising"


@pytest.mark.process
def test_damaged_pieces_are_made_again(model: Path, reference: Path, tmp_path: Path, decomposed: list[str]) -> None:
    out = tmp_path / "out"
    pieces = sorted(abandoned(model, out).glob("*.safetensors"))
    pieces[0].write_bytes(pieces[0].read_bytes()[:-8])
    flipped = bytearray(pieces[3].read_bytes())
    flipped[-1] ^= 1
    pieces[3].write_bytes(flipped)
    (pieces[0].parent / "00099.leftover.half").write_bytes(b"x")
    lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)
    assert len(decomposed) == 3  # these two, and the one that was never kept
    assert weights(out) == weights(reference)


@pytest.mark.process
def test_another_job_is_not_resumed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = abandoned(model, out)
    with pytest.raises(OutputError, match="had another rank; pass the same options"):
        lrsurgery.factorise_checkpoint(model, out, rank=0.3, resume=True)
    assert work.exists()
    lrsurgery.factorise_checkpoint(model, out, rank=0.3)  # without --resume the leftovers are cleared away
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.process
def test_a_changed_source_is_not_resumed(tmp_path: Path) -> None:
    model, out = tiny.save_gpt2(tmp_path / "model"), tmp_path / "out"
    abandoned(model, out)
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="another source"):
        lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)


@pytest.mark.process
def test_an_output_that_another_process_writes_is_left_alone(model: Path, tmp_path: Path) -> None:
    work = abandoned(model, tmp_path / "out")
    job = json.loads((work / "job.json").read_text())
    with locked(tmp_path / "out"):
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"process {os.getpid()} on .* is working on it"):
                lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4, resume=resume)
    (work / "job.json").write_text(json.dumps({**job, "host": "elsewhere"}))
    with pytest.raises(OutputError, match="started on elsewhere"):
        lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4)
    lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4, resume=True)


def test_nothing_to_resume_is_a_run(model: Path, reference: Path, tmp_path: Path) -> None:
    lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4, resume=True)
    assert weights(tmp_path / "out") == weights(reference)


def test_layers_at_once_change_no_byte(model: Path, reference: Path, tmp_path: Path) -> None:
    lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4, jobs=3)
    assert weights(tmp_path / "out") == weights(reference)
    assert rows(tmp_path / "out") == rows(reference)


@pytest.mark.process
def test_two_processes_write_the_same_bytes(model: Path, reference: Path, tmp_path: Path) -> None:
    for spec in ("0.4", "energy:0.9"):
        out = tmp_path / f"two-{spec[:3]}"
        done = program(*tiny.TORCHRUN, "-m", "lrsurgery", "factorise", model, "--rank", spec, "--output", out, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["output"] == str(out)  # one process speaks
        if spec == "0.4":
            assert weights(out) == weights(reference)
            assert rows(out) == rows(reference)
        else:
            lrsurgery.factorise_checkpoint(model, tmp_path / "one", rank=spec, cache=False)
            assert weights(out) == weights(tmp_path / "one")
            assert rows(out) == rows(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.process
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lost_process_is_an_error_and_resume_finishes(
    rank: str, model: Path, reference: Path, tmp_path: Path
) -> None:
    out, script = tmp_path / "out", tmp_path / "rigged.py"
    script.write_text(RIGGED)
    command = ("factorise", model, "--rank", 0.4, "--output", out, "--jobs", 1)
    lost = program(*tiny.TORCHRUN, script, 2, rank, *command)
    assert lost.returncode != 0
    assert not out.exists()
    if rank == "1":
        assert re.search(r"lrsurgery: interrupted; \d of 8 layers are kept; .* --resume to continue", lost.stderr)
    script.unlink()
    again = program(*tiny.TORCHRUN, "-m", "lrsurgery", *command, "--resume")
    assert again.returncode == 0, again.stderr
    assert weights(out) == weights(reference)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.process
def test_what_stops_one_process_stops_all(tmp_path: Path) -> None:
    model = tiny.save_gpt2(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        state[name][0, 0] = float("nan")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    done = program(*tiny.TORCHRUN, "-m", "lrsurgery", "factorise", model, "--rank", 0.4, "--output", tmp_path / "out")
    assert done.returncode != 0
    assert re.search(r"lrsurgery: .*weight holds NaN or Inf; repair the checkpoint first", done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_refusals_are_said_once(model: Path, reference: Path) -> None:
    done = program(*tiny.TORCHRUN, "-m", "lrsurgery", "factorise", model, "--rank", 0.4, "--output", reference)
    assert done.returncode != 0
    assert done.stderr.count("already exists") == 1


@pytest.mark.process
def test_half_of_a_launch_is_refused(model: Path, tmp_path: Path) -> None:
    command = (*tiny.PROGRAM, "factorise", model, "--rank", 0.4, "--output", tmp_path / "out")
    done = program(*command, WORLD_SIZE="2", RANK="1")
    assert done.returncode == 2
    assert done.stderr == (
        "lrsurgery: WORLD_SIZE is 2 but MASTER_ADDR or MASTER_PORT is not set; start with torchrun\n"
    )


def test_the_library_is_a_job_of_one_process(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training script may call it in its first process alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4)


# shares


def job(number: int, rows: int, columns: int) -> Job:
    entry = Entry("", None, torch.float32, (rows, columns), torch.Tensor, lambda: iter(()))
    return Job(
        number, Replacement(str(number), "linear", (rows, columns), rows, columns, min(rows, columns) // 2, 0), entry
    )


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), max_size=40), st.integers(1, 9))
def test_shares_are_fair(shapes: list[tuple[int, int]], processes: int) -> None:
    all_jobs = [job(number, *shape) for number, shape in enumerate(shapes)]
    shares = schedule(all_jobs, processes)
    assert sorted(j.number for share in shares for j in share) == list(range(len(shapes)))
    loads = [sum(decomposition_cost(j.row) for j in share) for share in shares]
    # Graham's bound for any greedy schedule
    largest = max((decomposition_cost(j.row) for j in all_jobs), default=0.0)
    assert max(loads) <= sum(loads) / processes + largest * (1 - 1 / processes) + 1e-6


def test_layers_at_once_fit_into_memory() -> None:
    small, large = (decomposition_bytes(job(0, *shape).row, 2) for shape in ((768, 3072), (11008, 4096)))
    assert layers_at_once([small] * 40, 2) == 2
    assert layers_at_once([small] * 40, 1) == 1
    assert layers_at_once([small], 8) == 1
    assert layers_at_once([small, large] * 20, 64) == 2
    assert layers_at_once([small] * 99, 64) * small <= POOL_BYTES
    assert layers_at_once([], 4) == 1


@given(st.lists(st.integers(), max_size=30), st.integers(1, 5))
def test_results_come_in_order_and_not_too_many_at_once(items: list[int], at_once: int) -> None:
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item) or -item, items, at_once, 1)
    for number, (item, result) in enumerate(zip(items, results, strict=True)):
        assert result == -item
        assert len(begun) <= number + 1 + at_once


# pieces


def test_a_piece_is_whole_or_none(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "00001.safetensors"
    piece = Piece({"rank": 3}, {"u": torch.arange(6.0).reshape(2, 3), "e": torch.empty(0, dtype=torch.bfloat16)})
    save_piece(file, piece)
    again = load_piece(file)
    assert again is not None
    assert again.facts == piece.facts
    assert all(torch.equal(again.tensors[k], piece.tensors[k]) for k in piece.tensors)
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        damaged = load_piece(file)
        if damaged is not None:  # a flipped space of the header's padding is no damage
            assert damaged.facts == piece.facts
            assert damaged.tensors.keys() == piece.tensors.keys()
            for key, tensor in piece.tensors.items():
                assert damaged.tensors[key].dtype == tensor.dtype
                assert torch.equal(damaged.tensors[key], tensor)
    file.write_bytes(whole[:-1])
    assert load_piece(file) is None
    assert load_piece(tmp_path / "nosuch") is None


def test_a_work_folder_that_was_not_opened_is_not_removed(tmp_path: Path) -> None:
    first, second = WorkFolder(tmp_path / "out"), WorkFolder(tmp_path / "out")
    first.open({"rank": 1}, resume=False)
    second.remove()
    assert first.path.exists()
    first.remove()
    assert not first.path.exists()


# the cache of spectra


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "spectra").glob("*/*.safetensors"))


def test_second_rank_costs_no_decomposition(
    model: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lrsurgery.factorise_checkpoint(model, tmp_path / "fresh", rank=0.25, cache=False)
    assert not entries(own_cache)
    lrsurgery.factorise_checkpoint(model, tmp_path / "first", rank=0.4, keep_vectors=True)
    assert len(entries(own_cache)) == 8
    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, None)
    lrsurgery.factorise_checkpoint(model, tmp_path / "second", rank=0.25)
    assert weights(tmp_path / "second") == weights(tmp_path / "fresh")


def test_a_plan_by_energy_costs_no_second_decomposition(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lrsurgery.factorise.decide import plan_checkpoint
    from lrsurgery.factorise.options import parse_options

    first = plan_checkpoint(str(model), parse_options(rank="energy:0.9"))
    monkeypatch.setattr(linalg, "_gram", None)
    assert plan_checkpoint(str(model), parse_options(rank="energy:0.9")) == first
    other = plan_checkpoint(str(model), parse_options(rank="energy:0.5"))
    assert (other.parameters_after or 0) < (first.parameters_after or 0)


def test_damaged_entries_are_made_again(model: Path, reference: Path, own_cache: Path, tmp_path: Path) -> None:
    lrsurgery.factorise_checkpoint(model, tmp_path / "first", rank=0.4, keep_vectors=True)
    files = entries(own_cache)
    kept = {name: tensor.clone() for name, tensor in load_file(files[1]).items()}
    whole = files[1].read_bytes()
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(whole[:-4] + b"\x00\x00\x80\x7f")
    lrsurgery.factorise_checkpoint(model, tmp_path / "second", rank=0.4, keep_vectors=True)
    assert weights(tmp_path / "second") == weights(reference)
    assert entries(own_cache) == files
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_file(files[1]).items())


def test_other_weights_have_other_entries(model: Path, own_cache: Path, tmp_path: Path) -> None:
    lrsurgery.factorise_checkpoint(model, tmp_path / "first", rank=0.4)
    changed = tiny.save_gpt2(tmp_path / "changed", seed=1)
    lrsurgery.factorise_checkpoint(changed, tmp_path / "second", rank=0.4)
    lrsurgery.factorise_checkpoint(changed, tmp_path / "third", rank=0.4, cache=False)
    assert len(entries(own_cache)) == 16
    assert weights(tmp_path / "second") == weights(tmp_path / "third")


@pytest.mark.process
def test_cache_is_bounded_and_clearable(
    model: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lrsurgery.factorise_checkpoint(model, tmp_path / "first", rank=0.4, keep_vectors=True)
    total = sum(file.stat().st_size for file in entries(own_cache))
    oldest = entries(own_cache)[5]
    os.utime(oldest, (1, 1))
    monkeypatch.setenv("LRSURGERY_CACHE_SIZE", str(total - 1))
    SpectrumCache().trim(cache_limit())
    assert len(entries(own_cache)) == 7
    assert oldest not in entries(own_cache)
    shown = program(*tiny.PROGRAM, "cache", "--json")
    assert json.loads(shown.stdout) == {
        "folder": str(own_cache / "spectra"),
        "entries": 7,
        "bytes": sum(file.stat().st_size for file in entries(own_cache)),
    }
    assert program(*tiny.PROGRAM, "cache", "--clear").returncode == 0
    assert not entries(own_cache)


def test_cache_that_cannot_be_written_is_no_fault(
    model: Path, reference: Path, own_cache: Path, tmp_path: Path
) -> None:
    (own_cache / "spectra").write_text("a file where the folder should be")  # which stops root too
    lrsurgery.factorise_checkpoint(model, tmp_path / "first", rank=0.4)
    assert weights(tmp_path / "first") == weights(reference)


def test_fast_leaves_unknown_what_it_did_not_look_at(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "LEADING_PAYS", dict.fromkeys(linalg.LEADING_PAYS, ((1, 1.0),)))
    torch.manual_seed(0)
    model = tiny.save_gpt2(tmp_path / "model")
    report = lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=2, svd="fast")
    again = lrsurgery.Report.read(tmp_path / "out")
    assert again.factorised == report.factorised
    for row in report.factorised:
        assert row.before is None
        assert row.spectral_error is None
        exact = torch.linalg.svdvals(load_file(model / "model.safetensors")[f"{row.name}.weight"].double())
        assert row.relative_error == pytest.approx(float(exact[2:].norm() / exact.norm()), rel=1e-2)
    assert not entries(own_cache)  # half of a spectrum is not kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd": "best"}, "unknown svd 'best'"),
        ({"jobs": 0}, "jobs 0"),
        ({"keep_vectors": True, "cache": False}, "no-cache"),
    ],
    ids=["engine", "jobs", "vectors without a cache"],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=message):
        lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4, **options)


def test_nan_in_what_passes_through_is_named(tmp_path: Path) -> None:
    model = tiny.save_gpt2(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["transformer.wpe.weight"][-1, -1] = float("inf")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"wpe\.weight holds NaN or Inf"):
        lrsurgery.factorise_checkpoint(model, tmp_path / "out", rank=0.4)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_pieces_of_another_layer_or_job_are_made_again(model: Path, reference: Path, tmp_path: Path) -> None:
    """Whole pieces under the names of others: renumbered, and copied from jobs with another rank and another model."""
    out = tmp_path / "out"
    work = abandoned(model, out)
    files = sorted(work.glob("*.safetensors"))
    by_shape: dict[tuple[int, ...], list[Path]] = {}
    for file in files:
        piece = load_piece(file)
        assert piece is not None
        by_shape.setdefault((*piece.tensors["u"].shape, *piece.tensors["v"].shape), []).append(file)
    one, other = next(pair for pair in by_shape.values() if len(pair) > 1)[:2]
    one.rename(work / "aside")
    other.rename(one)
    (work / "aside").rename(other)
    lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)
    assert weights(out) == weights(reference)

    for name, source in (("rank", model), ("model", tiny.save_gpt2(tmp_path / "second", seed=1))):
        mine = abandoned(model, tmp_path / f"mine-{name}")
        theirs = abandoned(source, tmp_path / f"theirs-{name}") if name == "model" else mine
        for file in sorted(theirs.glob("*.safetensors"))[:3]:
            if name == "rank":
                piece = load_piece(file)
                assert piece is not None
                cut = {"u": piece.tensors["u"][:, 1:], "v": piece.tensors["v"][1:]}
                save_piece(file, Piece({**piece.facts, "asked": piece.facts["asked"] - 1}, cut))
            else:
                shutil.copyfile(file, mine / file.name)
        lrsurgery.factorise_checkpoint(model, tmp_path / f"mine-{name}", rank=0.4, resume=True)
        assert weights(tmp_path / f"mine-{name}") == weights(reference)


def test_a_finished_job_whose_work_is_left_is_finished(model: Path, tmp_path: Path) -> None:
    """Killed after the output was whole: `--resume` clears up, and other options are still another job's."""
    out = tmp_path / "out"
    work = abandoned(model, out)
    shutil.copytree(work, tmp_path / "kept")
    lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)
    shutil.copytree(tmp_path / "kept", work)
    with pytest.raises(OutputError, match="already exists"):
        lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)
    WorkFolder(out).set_published(out)
    before = weights(out), (out / "rank_report.json").stat().st_mtime_ns
    with pytest.raises(OutputError, match="had another rank"):
        lrsurgery.factorise_checkpoint(model, out, rank=0.3, resume=True)
    lrsurgery.factorise_checkpoint(model, out, rank=0.4, resume=True)
    assert (weights(out), (out / "rank_report.json").stat().st_mtime_ns) == before
    assert not work.exists()
