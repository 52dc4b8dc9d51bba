"""The package as installed: its public names, its exception tree, the direction of its imports, its wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mergekit_bayes
from mergekit_bayes import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_bayes"

# A module imports from itself and from the rows below; names in one row do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("evaluate", "preview"),
    ("estimate", "finetune", "merge"),
    ("predict",),
    ("data", "model"),
    ("recipe", "checkpoint"),
    ("precision",),
    ("posterior",),
    ("errors",),
)
# These start without the heavy libraries, so that --help, a plan and a recipe error are instant.
LIGHT = ("errors", "recipe", "checkpoint", "data", "posterior", "merge/methods", "merge/registry.py", "cli")
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib")


def _sources() -> list[tuple[str, Path]]:
    """Every library file with the name of the layer it belongs to."""
    library = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]
    command = [("cli", path) for path in (ROOT / "cli").rglob("*.py")]
    return sorted(library + command, key=lambda item: str(item[1]))


def _imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, whether at the top or inside a function."""
    package = _module_name(path) if path.name == "__init__.py" else _module_name(path).rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                module = f"{parent}.{module}".rstrip(".")
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def _module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = ("mergekit_bayes", *relative.parts) if relative.parts[0] == "cli" else relative.parts
    return ".".join(part for part in parts if part != "__init__")


def test_public_names_are_sorted_importable_and_documented() -> None:
    names = mergekit_bayes.__all__
    assert list(names) == sorted(names)
    assert len(set(names)) == len(names)
    undocumented = [name for name in names if not (inspect.getdoc(getattr(mergekit_bayes, name)) or "").strip()]
    assert [name for name in undocumented if not name.startswith("__")] == []


def test_every_public_name_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in mergekit_bayes.__all__ if not re.search(rf"\b{re.escape(name)}\b", readme)]
    assert missing == []


def test_every_error_is_in_the_tree_and_under_its_root() -> None:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
    assert errors.MergekitBayesError in classes
    for error in classes:
        assert issubclass(error, errors.MergekitBayesError)
        assert re.search(rf"\b{error.__name__}\b", errors.__doc__ or ""), f"{error.__name__} is not in the tree"


def test_errors_are_raised_from_one_tree_only() -> None:
    """`except MergekitBayesError` catches all that is raised on purpose: no other module defines one."""
    strays = [
        f"{path.name}: {node.name}"
        for layer, path in _sources()
        if layer != "errors"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")  # private ones never leave their module
        and any(ast.unparse(parent).endswith(("Error", "Exception")) for parent in node.bases)
    ]
    assert strays == []


def test_imports_point_down_only() -> None:
    row = {name: index for index, names in enumerate(LAYERS) for name in names}
    wrong = []
    for layer, path in _sources():
        if layer not in row:
            assert layer in ("__init__", "__main__"), f"{path}: `{layer}` is in no layer"
            continue
        for name in _imports(path):
            parts = name.split(".")
            target = parts[1] if parts[0] == "mergekit_bayes" and len(parts) > 1 else None
            if target not in row:
                continue
            if row[target] < row[layer] or (row[target] == row[layer] and target != layer):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("place", LIGHT)
def test_light_modules_import_without_the_heavy_libraries(place: str) -> None:
    location = ROOT / "cli" if place == "cli" else PACKAGE / place
    files = sorted(location.rglob("*.py")) if location.is_dir() else [location.with_suffix(".py")]
    modules = [_module_name(path) for path in files]
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_module_imports_with_warnings_as_errors() -> None:
    modules = [_module_name(path) for _, path in _sources() if path.name != "__main__.py"]
    program = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_package_folder_is_listed_for_installation() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {_module_name(path) for _, path in _sources() if path.name == "__init__.py"}
    assert set(settings["packages"]) == on_disk


@pytest.mark.slow
def test_wheel_installs_only_the_package(tmp_path: Path) -> None:
    # a copy: building in place would leave a build folder, and an old one would leak into the wheel
    copy = tmp_path / "source"
    copy.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: cannot tell the sources from other files")
    for name in filter(None, tracked.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run([sys.executable, "-m", *command], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mergekit_bayes"}
    assert {"mergekit_bayes/py.typed", "mergekit_bayes/cli/main.py", "mergekit_bayes/errors.py"} <= set(names)
    assert not [name for name in names if "test" in name.lower()]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_command_is_installed_under_its_name() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="bayes-merge")
    assert command.value == "mergekit_bayes.cli.main:main"
    assert callable(importlib.import_module("mergekit_bayes.cli.main").main)
