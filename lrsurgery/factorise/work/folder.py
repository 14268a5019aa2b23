"""The work folder of a job: its description, the decisions, a piece per finished layer. It survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from lrsurgery.calibration.statistics import FILE_NAME as STATISTICS
from lrsurgery.errors import Interrupted, OutputError, SurgeryError
from lrsurgery.files.digests import folder_fingerprint
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, json_text, read_as, read_json
from lrsurgery.files.locks import remove_empty
from lrsurgery.files.marks import check_ours, remove_entries, write_mark
from lrsurgery.files.writing import replace_file

WORK = "work"  # what a work folder's mark says
POINTS = "points.json"  # what a search for a target has measured
PUBLISHED = "published"  # fingerprint of the whole output
SPEEDS = "speed.json"  # times of layers, for a budget of time
STAGE = "stage.json"  # the written folder that is about to be refined
REFINED = "refined"  # the folder of blocks that refinement has finished
FOLDERS = ("statistics", REFINED, "activations")
# what a job writes beside PUBLISHED; the last says what the others are
ENTRIES = ("to_do.json", "ranks.json", SPEEDS, POINTS, STAGE, "failed", *FOLDERS, "*.safetensors", "*.half", "job.json")

# of a layer: its kind and rank (None if its spectrum decides), or the reason to stay dense
# kind, rank and the layers that share one v with it; or why it stays dense
Decision: TypeAlias = tuple[str, int | None] | tuple[str, int, list[str]] | str


class WorkFolder:
    """A hidden sibling of an output folder with a description of the job and one piece per finished layer.

    Its user holds the lock of the output.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.parent / f".{output.name}.factorising"
        self._output = output
        self._made: list[Path] = []
        self.owned = False  # opened by this process, which may therefore remove it

    def open(self, task: Json, *, resume: bool) -> None:
        """Create the folder for this job, or with `resume` take over the folder of an interrupted one.

        Raises OutputError if the folder belongs to another job, or was not made by this program.
        """
        file = self.path / "job.json"
        wanted: Json = json.loads(json.dumps(dict(task)))
        check_ours(self.path, WORK)
        try:
            left = read_json(file) if self.path.exists() else None
        except SurgeryError:
            left = {}  # killed before job.json was written
        if left:
            if left.get("host") != socket.gethostname() and not resume:
                raise OutputError(
                    f"{self._output}: started on {left.get('host')}; if that job has ended, continue with --resume"
                    f" or remove {self.path}"
                )
            if resume and left.get("task") != wanted:
                was = next((k for k in wanted if (left.get("task") or {}).get(k) != wanted[k]), "")
                raise OutputError(
                    f"{self._output}: the interrupted job had another {was}; pass the same options, or remove --resume"
                    " to start over"
                )
        try:
            self._made += [p for p in (self._output.parent, *self._output.parent.parents) if not p.exists()]
            if not resume or not left:
                remove_entries(self.path, ENTRIES, PUBLISHED)
            self.path.mkdir(parents=True, exist_ok=True)
            self.owned = True
            write_mark(self.path, WORK)
            replace_file(file, json_text({"task": wanted, "host": socket.gethostname()}))
        except OSError as e:
            raise OutputError(f"{self._output}: cannot be written ({e.strerror})") from e

    @property
    def job(self) -> str:
        """Digest of all that the job's pieces depend on. Raises OutputError if the folder is not open or damaged."""
        task = read_json(self.path / "job.json", "a job's description", OutputError).get("task")
        return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()

    def set_published(self, stage: Path) -> None:
        """Note the output, which is about to be moved into its place."""
        replace_file(self.path / PUBLISHED, folder_fingerprint(stage))

    def is_published(self) -> bool:
        """Whether the output is what the job wrote: a kill left nothing but this folder."""
        file = self.path / PUBLISHED
        if not file.is_file() or not self._output.is_dir():
            return False
        return file.read_bytes() == folder_fingerprint(self._output).encode()

    def file(self, number: int) -> Path:
        return self.path / f"{number:05d}.safetensors"

    def count(self) -> int:
        """Number of pieces in the folder."""
        return sum(1 for _ in self.path.glob("*.safetensors"))

    def set_to_do(self, numbers: Sequence[int]) -> None:
        """Write the job list: the numbers of the missing pieces."""
        (self.path / "to_do.json").write_text(json.dumps(list(numbers)), encoding="utf-8")
        (self.path / "failed").unlink(missing_ok=True)

    def set_decisions(self, decisions: Mapping[str, Decision]) -> None:
        """Write the decision for each layer."""
        (self.path / "ranks.json").write_text(json.dumps(dict(decisions)), encoding="utf-8")

    def decisions(self) -> dict[str, Decision]:
        """Read the decisions of `set_decisions`."""
        return read_as(dict[str, Decision], self.path / "ranks.json", "ranks of a job", OutputError)

    def to_do(self) -> set[int]:
        """Read the job list of `set_to_do`."""
        return set(read_as(list[int], self.path / "to_do.json", "a list of jobs", OutputError))

    def set_stage(self, stage: Path) -> None:
        """Tell the other processes where the folder is that is about to be refined."""
        (self.path / STAGE).write_text(json.dumps(stage.name), encoding="utf-8")

    def stage(self) -> Path:
        """Read the folder of `set_stage`."""
        return self.path.parent / read_as(str, self.path / STAGE, "the name of a folder", OutputError)

    def fail(self, message: str) -> None:
        """Report an error to the other processes, as far as the folder can be written."""
        with contextlib.suppress(OSError):
            (self.path / "failed").write_text(message, encoding="utf-8")

    def failure(self) -> str | None:
        """The error of another process, if any."""
        file = self.path / "failed"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def kept(self, layers: int) -> str:
        """What there is to resume from, of so many layers; empty for nothing."""
        parts = ["the statistics"] if (self.path / "statistics" / STATISTICS).exists() else []
        parts += ["the measured points"] if (self.path / POINTS).exists() else []
        parts += [f"{self.count()} of {layers} layers"] if self.count() else []
        refined = sum(1 for _ in (self.path / REFINED).glob("*.safetensors"))
        parts += [f"{refined} refined blocks"] if refined else []
        return " and ".join(parts)

    def remove(self) -> None:
        """Remove the folder if this process opened it, and the parent folders made for it if there is no output."""
        if not self.owned:
            return
        remove_entries(self.path, ENTRIES, PUBLISHED)
        if not self._output.exists():
            remove_empty(self._made)


@contextmanager
def keep_work(work: WorkFolder, output: Path, layers: int) -> Iterator[None]:
    """Remove the work folder at the end, unless statistics or finished layers in it can be resumed.

    Raises Interrupted after a signal, OutputError for a disk that refuses; both say what is kept.
    """
    try:
        with disk_faults(output):
            yield
    except Interrupted:
        raise  # of a job within this one
    except (KeyboardInterrupt, SystemExit) as e:
        if kept := work.kept(layers):
            raise Interrupted(f"interrupted; {kept} are kept; run the same command with --resume to continue") from e
        work.remove()
        raise
    except OutputError as e:
        if work.owned and (kept := work.kept(layers)):
            raise OutputError(
                f"{e}; {kept} are kept; once it can be written, run the same command with --resume"
            ) from e.__cause__
        work.remove()
        if e.__cause__ is not None:  # a disk that refuses
            raise OutputError(f"{e}; nothing is kept") from e.__cause__
        raise
    except BaseException:
        work.remove()
        raise
    work.remove()
