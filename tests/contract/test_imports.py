"""Who may import whom, and what: the layers of DESIGN.md, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("client", "medmamba", "server", "simulation", "strategies")

MAY_IMPORT = {
    "client": {"medmamba", "strategies"},
    "server": {"medmamba", "strategies"},
    "simulation": {"client", "medmamba", "server", "strategies"},
    "strategies": set(),
    "medmamba": set(),
}

# The packages that stand alone say what they need; elsewhere any dependency will do.
THIRD_PARTIES = {
    "strategies": {"cryptography", "flwr", "numpy", "pydantic", "rich", "safetensors", "tenseal"},
    "medmamba": {"hatchling", "mamba_ssm", "numpy", "safetensors", "torch", "triton"},
}
ONLY_UNDER = {
    "hatchling": "medmamba/scan/native/build.py",  # the build hook runs in its environment alone
    "opacus": "client/",
    "monai": "client/",
    "pydicom": "client/",
    "tenseal": "strategies/encryption/",
    "ray": "simulation/",
}
# medmnist imports torchvision, and a CPU torch has no torchvision that fits it.
NOWHERE = {"medmnist", "tests", "torchvision"}

PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
MAY_USE_PRIVATE_FLOWER = {
    "client/flower_runtime.py",
    "client/supernode.py",
    "server/flower_control.py",
    "server/flower_grid.py",
    "server/flower_runs.py",
    "server/flower_runtime.py",
    "simulation/grid.py",
}


def imports(path: str, source: str) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it, by statement or by function."""
    folder = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else None
            function = node.func.id if isinstance(node.func, ast.Name) else function
            argument = node.args[0]
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def violations(path: str, source: str) -> list[str]:
    """What a file imports against the rules, each as ``path imports name``."""
    package = path.split("/")[0]
    found = []
    for name in imports(path, source):
        top = name.split(".")[0]
        standard = top in sys.stdlib_module_names
        ours = top in PACKAGES
        private_flower = top == "flwr" and not f"{name}.".startswith(
            tuple(f"{public}." for public in PUBLIC_FLOWER)
        )
        if (
            top in NOWHERE
            or (ours and top != package and top not in MAY_IMPORT[package])
            or (top in ONLY_UNDER and not path.startswith(ONLY_UNDER[top]))
            or (private_flower and path not in MAY_USE_PRIVATE_FLOWER)
            or not (standard or ours or top in THIRD_PARTIES.get(package, {top}))
        ):
            found.append(f"{path} imports {name}")
    return found


def files(repository: Path) -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted((repository / package).rglob("*.py")):
            yield path.relative_to(repository).as_posix(), path.read_text(encoding="utf-8")


def test_every_file_keeps_to_the_rules(repository):
    found = [line for path, source in files(repository) for line in violations(path, source)]
    assert found == []


def test_ray_is_in_one_file_at_most(repository):
    users = [
        path
        for path, source in files(repository)
        if any(name.split(".")[0] == "ray" for name in imports(path, source))
    ]
    assert len(users) <= 1


def test_the_files_that_may_use_private_flower_names_exist(repository):
    for path in MAY_USE_PRIVATE_FLOWER:
        assert (repository / path).is_file()


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("client/x.py", "import server"),
        ("client/x.py", "from simulation.grid import LocalGrid"),
        ("server/x.py", "import client.app"),
        ("server/x.py", "def f():\n    from client import app"),
        ("strategies/x.py", "from medmamba import MedMamba"),
        ("strategies/x.py", "import torch"),
        ("strategies/x.py", "from torch import nn"),
        ("strategies/x.py", "import importlib\nimportlib.import_module('torch')"),
        ("strategies/x.py", "__import__('torch.nn')"),
        ("strategies/x.py", "import tenseal"),
        ("strategies/x.py", "import httpx"),
        ("medmamba/x.py", "import strategies.errors"),
        ("medmamba/x.py", "import flwr.app"),
        ("medmamba/x.py", "import pydantic"),
        ("server/x.py", "import opacus"),
        ("server/x.py", "from monai import transforms"),
        ("simulation/x.py", "import pydicom"),
        ("client/x.py", "import tenseal as ts"),
        ("server/x.py", "import ray"),
        ("client/x.py", "import medmnist"),
        ("client/x.py", "import torchvision.transforms"),
        ("client/x.py", "from tests import conftest"),
        ("client/x.py", "import flwr"),
        ("client/x.py", "from flwr import common"),
        ("client/x.py", "from flwr.common import Context"),
        ("client/x.py", "import flwr.application"),
        ("server/x.py", "from flwr.proto.fab_pb2 import Fab"),
        ("simulation/x.py", "import flwr.supercore.run"),
    ],
)
def test_the_rules_notice(path, line):
    assert len(violations(path, line)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("client/x.py", "import monai, opacus, pydicom, torch, medmamba.config"),
        ("client/data/x.py", "from . import manifest\nfrom .. import site"),
        ("client/x.py", "from flwr.app import Context"),
        ("client/flower_runtime.py", "from flwr.supernode import runtime"),
        ("server/flower_runtime.py", "from flwr.cli.build import build_fab_from_files"),
        ("simulation/x.py", "import client, server, medmamba, strategies, ray"),
        ("strategies/encryption/x.py", "import tenseal, numpy\nfrom strategies import errors"),
        ("medmamba/scan/x.py", "import torch, triton, json\nfrom medmamba import config"),
    ],
)
def test_the_rules_allow(path, line):
    assert violations(path, line) == []


PROBE = """
import sys
import client, server, strategies, medmamba, simulation
for package in (client, medmamba, server, simulation, strategies):
    print(package.__file__)
print(sorted({"torch", "flwr", "numpy", "pydantic"} & sys.modules.keys()))
"""


def test_the_packages_are_ours_and_cost_nothing_to_import(repository, tmp_path):
    # From another folder: what counts is the installation, not where one happens to stand.
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *paths, heavy = result.stdout.splitlines()
    assert paths == [str(repository / package / "__init__.py") for package in PACKAGES]
    assert heavy == "[]"


def test_no_file_in_simulation_hides_a_standard_module(repository):
    # `python simulation/run.py` puts that folder first on the path.
    stems = {path.stem for path in (repository / "simulation").iterdir()}
    assert stems & set(sys.stdlib_module_names) == set()


def test_there_is_no_package_below_tests(repository):
    # An __init__.py in tests/server/ would make `import server` find that folder.
    assert list((repository / "tests").rglob("__init__.py")) == []
