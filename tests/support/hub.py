"""A hub's cache on the disk, as huggingface_hub lays it out, for tests that name models by their ids."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that huggingface_hub looks into."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, hub_id: str, commit: str, folder: Path, refs: tuple[str, ...] = ()) -> None:
    """Blobs by hash, snapshots of links to them, refs that name a commit."""
    from huggingface_hub.file_download import repo_folder_name

    home = cache / repo_folder_name(repo_id=hub_id, repo_type="model")
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (home / part).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = home / "blobs" / f"{commit[:4]}{file.name.encode().hex()}"
        shutil.copyfile(file, blob)
        (home / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, home / "snapshots" / commit))
    for ref in refs:
        (home / "refs" / ref).write_text(commit)
