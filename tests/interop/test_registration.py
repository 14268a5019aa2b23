"""Factorised folders load where lrsurgery is installed and nobody imports it; a broken install breaks nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from support import tiny
from support.installed import ROOT, beside_the_package, environment, python
from support.interop import in_its_job

import lrsurgery

pytestmark = [pytest.mark.process, in_its_job]

LOAD = """
import sys, torch, transformers as tf
model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
"""
LOADED = "print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'lrsurgery'))"
KNOWN = "print('lrsurgery' in sys.modules['transformers.quantizers.auto'].AUTO_QUANTIZER_MAPPING)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factorised GPT-2 and its dense export."""
    folder = tmp_path_factory.mktemp("gpt2")
    lrsurgery.factorise_checkpoint(tiny.save_gpt2(folder / "source"), folder / "half", rank=0.5)
    lrsurgery.export_dense(folder / "half", folder / "dense")
    return folder


def test_a_folder_loads_with_no_import(folders: Path, tmp_path: Path) -> None:
    done = python(environment(tmp_path), "-c", LOAD, folders / "half", tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    dense = tf.AutoModelForCausalLM.from_pretrained(folders / "dense").eval()
    with torch.no_grad():
        wanted = dense(torch.arange(12)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits"), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("switch", "value"), [("LRSURGERY_AUTOLOAD", "0"), ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")], ids=["ours", "torch's"]
)
def test_a_switch_turns_it_off_and_the_load_fails_loudly(
    folders: Path, tmp_path: Path, switch: str, value: str
) -> None:
    done = python({**environment(tmp_path), switch: value}, "-c", LOAD, folders / "half", tmp_path / "logits")
    assert done.returncode == 1
    assert "size mismatch" in done.stderr or "ignore_mismatched_sizes" in done.stderr
    assert "lrsurgery/" not in done.stderr  # no file of ours in the traceback


def test_only_the_quantizer_base_is_imported_until_a_folder_is_loaded(tmp_path: Path) -> None:
    code = f"import sys; {LOADED}; import torch; {LOADED}; import transformers.modeling_utils; {LOADED}"
    done = python(environment(tmp_path), "-c", code)
    at_start, with_torch, with_transformers = done.stdout.split("\n")[:3]
    assert (at_start, with_torch) == ("", "")
    names = ("", "", ".format", ".pretrained", ".pretrained.classes", ".quantizer", ".quantizer.method")
    names = (names[0], *(f".checkpoints{name}" for name in names[1:]))
    assert with_transformers.split() == [f"lrsurgery{name}" for name in names]


@pytest.mark.parametrize(
    "code",
    [
        "import lrsurgery.hf; import transformers.modeling_utils",
        "import transformers.modeling_utils; import lrsurgery.hf",
        "import transformers.modeling_utils, _lrsurgery_autoload as a; a.install(); import lrsurgery.hf",
    ],
    ids=["import first", "autoload first", "installed late"],
)
def test_import_and_autoload_agree_in_any_order(tmp_path: Path, code: str) -> None:
    found = "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING['lrsurgery']"
    done = python(environment(tmp_path), "-c", f"{code}; print({found} is lrsurgery.hf.LowRankQuantizer)")
    assert done.stdout.strip() == "True", done.stderr


def test_a_late_install_registers_at_once(tmp_path: Path) -> None:
    code = "import sys, os; os.environ['LRSURGERY_AUTOLOAD'] = '0'; import transformers.modeling_utils;" + KNOWN
    code += (
        "; del os.environ['LRSURGERY_AUTOLOAD']; import _lrsurgery_autoload as a; a.install(); a.install(); " + KNOWN
    )
    assert python(environment(tmp_path), "-c", code).stdout.split() == ["False", "True"]


FINE = "import torch, transformers.modeling_utils; print('fine')"
BROKEN = {
    "raises": {"__init__.py": "raise RuntimeError('half an upgrade')"},
    "does not parse": {"__init__.py": "def"},
    "an older version": {"__init__.py": "", "hf.py": ""},
}


def said(errors: str) -> list[str]:
    """Lines on stderr, but for torch's log, which torchao fills where it is installed."""
    return [line for line in errors.splitlines() if not re.match(r"[IW]\d{4} ", line)]


@pytest.mark.parametrize("files", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_package_breaks_neither_torch_nor_transformers(tmp_path: Path, files: dict[str, str]) -> None:
    package = tmp_path / "broken" / "lrsurgery"
    package.mkdir(parents=True)
    for name, text in files.items():
        (package / name).write_text(text)
    done = python(environment(tmp_path, package.parent), "-c", FINE)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr
    (line,) = said(done.stderr)
    assert line.endswith("install it again, or set LRSURGERY_AUTOLOAD=0")


@pytest.mark.parametrize("missing", sorted(beside_the_package()))
def test_half_of_an_install_breaks_nothing_and_says_nothing(tmp_path: Path, missing: str) -> None:
    done = python(environment(tmp_path, without=(missing,)), "-c", FINE)
    assert (done.returncode, done.stdout.strip(), said(done.stderr)) == (0, "fine", [])


def test_a_checkout_in_front_of_the_installed_package_wins(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout" / "lrsurgery"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").write_text("mine = True")
    code = f"import sys; sys.path.insert(0, {str(checkout.parent)!r}); import torch, lrsurgery; print(lrsurgery.mine)"
    assert python(environment(tmp_path), "-c", code).stdout.strip() == "True"


def test_the_wheel_has_the_hook_beside_the_package() -> None:
    found = beside_the_package()
    assert all(file.is_file() for file in found.values())
    (line,) = found["lrsurgery_autoload.pth"].read_text().splitlines()
    assert line.startswith("import ")  # or site takes it for a path
    assert f"{ROOT}{os.sep}" in f"{found['_lrsurgery_autoload.py']}"


def test_timm_alone_says_one_line(tmp_path: Path) -> None:
    model = lrsurgery.load_model(tiny.save_timm(tmp_path / "dense"))
    lrsurgery.factorise_(model, rank=0.5)
    lrsurgery.save_model(model, tmp_path / "low")
    code = "import sys, timm; timm.create_model('local-dir:' + sys.argv[1], pretrained=True)"
    done = python(environment(tmp_path), "-c", code, tmp_path / "low")
    assert done.returncode == 1
    assert "has low-rank layers, which timm alone does not build; run its scripts" in done.stderr.splitlines()[-1]
