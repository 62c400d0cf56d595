"""What each folder may import, read from the source: a breach fails here and not on an edge box."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

ROLES = ("trainer", "aggregator", "export", "edge", "fleet")
PACKAGES = ("edgeflame", "fitting", *ROLES, "boards", "cli")
MAY_IMPORT = {
    "edgeflame": set(), "boards": {"edgeflame"}, "fitting": {"edgeflame"}, "aggregator": {"edgeflame", "boards"},
    "export": {"edgeflame"}, "fleet": {"edgeflame"}, "trainer": {"edgeflame", "fitting"},
    "edge": {"edgeflame", "fitting", "boards"}, "cli": set(PACKAGES),
}  # fmt: skip
"""Of our packages, when a module is loaded; roles never import one another."""
ENTRY_POINT = REPOSITORY / "edgeflame" / "__main__.py"
"""``python -m edgeflame``: hands over to the command line, and is imported by nobody."""
LEARNING_LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "sklearn")
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    path: Path
    line: int
    module: str
    is_lazy: bool
    """Inside a function, so that it happens on use."""

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def in_command_line(self) -> bool:
        return self.path.is_relative_to(REPOSITORY / "cli")

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def sources(*packages: str) -> list[Path]:
    files = [path for package in packages for path in sorted((REPOSITORY / package).rglob("*.py"))]
    assert files
    return files


def imports_of(path: Path) -> Iterator[Import]:
    """Imports that run; those for the type checker alone do not."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # Relative imports stay within their package, whatever their depth here.
                package = path.relative_to(REPOSITORY).with_suffix("").parts[: -node.level]
                yield Import(path, node.lineno, ".".join((*package, node.module or "")), lazy)
            else:
                yield Import(path, node.lineno, node.module or "", lazy)
        inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text()), lazy=False)


def all_imports(*packages: str) -> list[Import]:
    return [found for path in sources(*packages) for found in imports_of(path)]


def report(breaches: list[Import]) -> str:
    return "\n".join(map(str, breaches))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    breaches = [
        found
        for found in all_imports(package)
        if found.top in set(PACKAGES) - {package} - MAY_IMPORT[package] and found.path != ENTRY_POINT
    ]
    assert not breaches, report(breaches)


def test_the_command_line_loads_a_role_only_when_a_command_needs_it() -> None:
    breaches = [found for found in all_imports("cli") if found.top in ROLES and not found.is_lazy and is_command(found)]
    assert not breaches, report(breaches)


def is_command(found: Import) -> bool:
    """Modules of ``cli`` itself hold commands; what they show pages with is loaded by them."""
    return found.path.parent == REPOSITORY / "cli"


def test_the_shared_folder_holds_what_two_packages_use() -> None:
    """Directly, or through another of its modules."""
    shared = {name for name in modules() if name.startswith("edgeflame.")}
    users: dict[str, set[str]] = {name: set() for name in shared}
    inside: dict[str, set[str]] = {name: set() for name in shared}
    for name, imported in imports_by_module(is_complete=True).items():
        for target in imported & shared:
            if name in shared:
                inside[name].add(target)
            else:
                users[target].add(name.partition(".")[0])
    for _ in shared:
        for name, targets in inside.items():
            for target in targets:
                users[target] |= users[name]
    # Python itself runs the one; the other is started by the command line, by tests and by benchmarks.
    alone = {name for name, of in users.items() if len(of) < 2 and modules()[name].name != "__init__.py"}
    assert alone == {"edgeflame.__main__", "edgeflame.mqtt.embedded_broker"}


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles(imports_by_module()) == []


def test_no_folders_import_one_another_in_a_circle() -> None:
    """A folder and the folders inside it are one matter; what lies beside must be above or below."""
    names = modules()

    def folder(name: str) -> str:
        return name if names[name].name == "__init__.py" else name.rpartition(".")[0]

    edges: dict[str, set[str]] = {}
    for name, imported in imports_by_module().items():
        if names[name] == ENTRY_POINT:
            continue
        here = folder(name)
        for target in imported:
            there = folder(target)
            if here != there and not f"{here}.".startswith(f"{there}.") and not f"{there}.".startswith(f"{here}."):
                edges.setdefault(here, set()).add(there)
    assert circles(edges) == []


def test_no_public_class_name_stands_twice() -> None:
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def modules() -> dict[str, Path]:
    """Every module of our packages, by its full name."""
    found = {}
    for path in sources(*PACKAGES):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_by_module(*, is_complete: bool = False) -> dict[str, set[str]]:
    """Our modules that each of our modules names in its imports, those for the type checker included.

    With ``is_complete`` also those inside functions.
    """
    names = modules()
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        targets = set()

        def visit(node: ast.AST, targets: set[str]) -> None:
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                targets.update((whole & names.keys()) or {node.module})
            elif isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            if is_complete or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                for child in ast.iter_child_nodes(node):
                    visit(child, targets)

        visit(ast.parse(path.read_text()), targets)
        found[name] = (targets & names.keys()) - {name}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components of two and more)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return found


def test_the_command_line_is_imported_by_no_one_else() -> None:
    breaches = [
        found for found in all_imports(*PACKAGES)
        if found.top == "cli" and not found.in_command_line and found.path != ENTRY_POINT
    ]  # fmt: skip
    assert not breaches, report(breaches)


def test_what_runs_without_learning_libraries_imports_none() -> None:
    breaches = [
        found
        for found in all_imports("edgeflame", "boards", "cli", "aggregator", "edge", "fleet")
        if found.top in LEARNING_LIBRARIES and not (found.is_lazy and (found.in_command_line or is_optional(found)))
    ]
    assert not breaches, report(breaches)


def test_fitting_imports_nothing_that_a_line_does_not_have() -> None:
    heavy = {"torch", "torchvision", "timm", "sklearn", "scipy", "onnx"}
    breaches = [found for found in all_imports("fitting", "cli/pages") if found.top in heavy]
    assert not breaches, report(breaches)


def test_a_fit_by_a_given_backbone_loads_no_torch() -> None:
    loaded = loaded_after("import fitting.fit, fitting.backbone, export.graph, cli.fit, cli.calibrate, cli.evaluate")
    assert not loaded & {"torch", "torchvision", "timm", "onnxscript"}


def test_the_export_imports_torch_in_one_module() -> None:
    breaches = [
        found for found in all_imports("export")
        if found.top in {"torch", "torchvision", "timm"} and found.path != REPOSITORY / "export" / "network.py"
    ]  # fmt: skip
    assert not breaches, report(breaches)
    loaded = loaded_after("import export.graph, export.distances, export.onnx_file, export.precision, export.trt")
    assert "torch" not in loaded


def is_optional(found: Import) -> bool:
    """The k-means of one server rule, which says before a run begins what it lacks."""
    return found.top == "sklearn" and found.path.parts[-3:] == ("aggregator", "strategies", "memory.py")


def test_nothing_is_pickled() -> None:
    breaches = [found for found in all_imports(*PACKAGES) if found.top in PICKLES]
    assert not breaches, report(breaches)


def calls(path: Path) -> Iterator[tuple[str, dict[str, object], int]]:
    """Dotted name, constant keyword arguments and line of every call."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {
                word.arg: word.value.value
                for word in node.keywords
                if word.arg is not None and isinstance(word.value, ast.Constant)
            }
            yield ast.unparse(node.func), keywords, node.lineno


def test_tensors_are_loaded_without_running_code() -> None:
    breaches = []
    for path in sources(*PACKAGES):
        for name, keywords, line in calls(path):
            unsafe_torch = name == "torch.load" and keywords.get("weights_only") is not True
            unsafe_numpy = name in {"np.load", "numpy.load"} and keywords.get("allow_pickle", False) is not False
            if unsafe_torch or unsafe_numpy or name == "torch.save":
                breaches.append(f"{path.relative_to(REPOSITORY)}:{line} {name}")
    assert not breaches, "\n".join(breaches)


def test_who_catches_a_damaged_document_catches_one_that_is_nested_too_deeply() -> None:
    """A few hundred brackets would end a daemon: what msgspec raises for them is no ``DecodeError``."""
    breaches = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and node.type is not None
        and "msgspec.DecodeError" in (caught := ast.unparse(node.type))
        and "RecursionError" not in caught
    ]
    assert breaches == []


def test_threads_are_started_in_one_place() -> None:
    """Elsewhere an unexpected error would end one without a word in the log."""
    files = [path for path in sources(*PACKAGES) if "threading.Thread(" in path.read_text()]
    started = [path.relative_to(REPOSITORY).as_posix() for path in files]
    assert started == ["edgeflame/background.py"]


def test_no_source_names_a_pickle_in_passing() -> None:
    """Text too: `getattr(torch, "load")` and the like would escape the tree walk."""
    pattern = re.compile(
        r"\b(cloudpickle|dill|pickle\.(loads?|dumps?)|allow_pickle\s*=\s*True|weights_only\s*=\s*False)\b"
    )
    breaches = [str(path.relative_to(REPOSITORY)) for path in sources(*PACKAGES) if pattern.search(path.read_text())]
    assert not breaches


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('\\n'.join(sys.modules))"],
        capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=60,
    )  # fmt: skip
    return set(done.stdout.splitlines())


def test_help_loads_neither_numpy_nor_torch() -> None:
    help_of_all = "from cli import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass"
    assert not loaded_after(help_of_all) & {"numpy", "torch", "cv2", "onnxruntime", "rich", "msgspec"}


@pytest.mark.parametrize("module", ["edge.daemon", "edge.sources.locate", "edge.runtimes.load", "cli.inspect"])
def test_the_line_side_loads_no_torch(module: str) -> None:
    assert not loaded_after(f"import {module}") & set(LEARNING_LIBRARIES)


class TestTheTestItself:
    """It sees what it should."""

    def test_it_finds_every_kind_of_import(self, tmp_path: Path) -> None:
        path = REPOSITORY / "edge" / "never_written.py"
        source = (
            "from typing import TYPE_CHECKING\nimport torch.nn as nn\nfrom trainer.fit import fit\n"
            "if TYPE_CHECKING:\n    import sklearn\nelse:\n    import timm\n"
            "class A:\n    import onnx\ndef f():\n    import pickle\nfrom . import health\n"
        )
        copy = tmp_path / "source.py"
        copy.write_text(source)

        class At(type(path)):  # type: ignore[misc]
            def read_text(self, *_: object, **__: object) -> str:
                return source

        found = {entry.module: entry.is_lazy for entry in imports_of(At(path))}
        assert found == {
            "typing": False, "torch.nn": False, "trainer.fit": False, "timm": False, "onnx": False, "pickle": True,
            "edge.": False,
        }  # fmt: skip

    def test_it_finds_a_circle(self) -> None:
        assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}) == [["b", "c"]]


def test_the_terminal_is_written_to_by_what_escapes() -> None:
    """Names and reasons may be anybody's: `echo` and `cell` of cli/output.py let them write no lines of their own."""
    direct = re.compile(r"click\.s?echo\(|(?<![.\w])print\(|from rich\.text import|sys\.stdout\.write\(")
    output = REPOSITORY / "cli" / "output.py"
    assert not [path for path in sources("cli") if path != output and direct.search(path.read_text())]
