"""The wheel holds what it needs, and the library works where triton is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("focalkern", "csrc_triton")
USE_IT = """
import sys, torch
import focalkern
hidden = torch.randn(2, 5, 16, requires_grad=True)
weight = torch.randn(130, 16, requires_grad=True)
loss_fn = focalkern.FusedFocalPOLoss(reference_free=True)
loss_fn(hidden, weight, torch.randint(130, (2, 5))).loss.backward()
assert hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0
print(focalkern.__file__)
"""


def run_python(code: str, directory: Path, **environment: str) -> str:
    """Run code away from the repository, so that only what is on the given path can be imported."""
    env = {**os.environ, **environment}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: setuptools would reuse what an earlier build left in the checkout.
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(source)], check=True, timeout=300)
    (path,) = directory.glob("focalkern-*.whl")
    return path


def test_wheel_holds_both_packages_their_types_and_the_licence(wheel):
    files = zipfile.ZipFile(wheel)
    names = set(files.namelist())
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules | {"focalkern/py.typed"}
    assert any(name.endswith("LICENSE") for name in names)
    (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "focalkern = focalkern.cli.main:main" in files.read(scripts).decode()


def test_the_unpacked_wheel_imports_and_runs(wheel, tmp_path):
    """That is all that pip does with a wheel of plain Python."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert run_python(USE_IT, tmp_path, PYTHONPATH=str(site)) == str(site / "focalkern" / "__init__.py")


def test_without_triton_the_library_imports_and_uses_the_torch_backend(tmp_path):
    hide_triton = "import sys; sys.modules['triton'] = None\n"
    refused = """
try:
    focalkern.linear_logps(hidden, weight, torch.zeros(2, 5, dtype=torch.int64), backend="triton")
except ValueError as error:
    assert "backend='triton' needs the triton package" in str(error), error
else:
    raise AssertionError("backend='triton' was accepted")
"""
    run_python(hide_triton + USE_IT + refused, tmp_path, PYTHONPATH=str(ROOT))
