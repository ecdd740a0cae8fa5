"""What the package needs in order to be imported is what its installation brings."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import restormer3d

_BROUGHT = {
    "llvmlite": "numba",
    "triton": "torch",  # on Linux; only where a GPU computes are these modules imported
}


def test_modules_import_nothing_that_an_installation_without_extras_lacks():
    package = Path(restormer3d.__file__).parent
    project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text())["project"]
    installed = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    known = sys.stdlib_module_names | installed | {"restormer3d"}
    lacking = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        for name in _imported(ast.parse(path.read_text(encoding="utf-8")))
        if _BROUGHT.get(name, name) not in known
    }
    assert not lacking


def _imported(module: ast.Module) -> set[str]:
    """First parts of the names that a module imports when it is imported itself."""
    names = [alias.name for node in module.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in module.body if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}
