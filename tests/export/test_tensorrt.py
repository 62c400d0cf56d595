"""TensorRT takes the graph. Engines are built here, without a GPU; none is run."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from cli import cli
from edgeflame import tensorrt
from edgeflame.errors import MissingDependencyError, PackageError, RuntimeUnavailableError, StorageError, UsageError
from edgeflame.package import Package
from edgeflame.tensorrt import TensorRT, load_tensorrt, read_build_report, select_capabilities
from export.trt import build_engines


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    pytest.importorskip("tensorrt_rtx")
    return load_tensorrt("rtx")


def export(package_file: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ["export", "--model", str(package_file), "--trt", "--out", str(out), "--json", *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    engines: list[dict[str, Any]] = json.loads(result.stdout)["engines"]
    return engines


def build(library: Any, model: bytes, out: Path, capability: str = "8.9") -> Any:
    return build_engines(
        library, model, out, capabilities=[capability], precision="fp32", max_batch=4, package_sha256="0" * 64
    )[0]


def test_nothing_but_a_cast_touches_the_bytes(package: Package) -> None:
    """TensorRT refuses any other operation on uint8."""
    graph = onnx.load_from_string(package.model_onnx).graph
    assert [node.op_type for node in graph.node if "image" in node.input] == ["Cast"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_command_builds_for_three_generations_and_reports(
    rtx: TensorRT, package_file: Path, package: Package, tmp_path: Path, precision: str
) -> None:
    engines = export(package_file, tmp_path / "new" / "engines", "--precision", precision)
    assert [one["compute_capability"] for one in engines] == ["8.6", "8.9", "12.0"]
    assert {one["runtime_version"] for one in engines} == {rtx.version}
    assert {one["package_sha256"] for one in engines} == {package.sha256}
    assert {one["precision"] for one in engines} == {precision}
    out = tmp_path / "new" / "engines"
    for one in engines:
        data = (out / one["file"]).read_bytes()
        assert len(data) == one["size_bytes"] > 10_000
        assert hashlib.sha256(data).hexdigest() == one["sha256"]
        assert one["build_s"] > 0
    assert {path.name for path in out.iterdir()} == {"engines.json", *(one["file"] for one in engines)}
    assert {record.file for record in read_build_report(out).engines} == {one["file"] for one in engines}


def test_an_engine_that_is_there_is_kept_and_one_cut_short_is_built_again(
    rtx: TensorRT, package_file: Path, tmp_path: Path
) -> None:
    options = ("--compute-capability", "8.9", "--compute-capability", "SM86")
    first = export(package_file, tmp_path, *options)
    whole = (tmp_path / first[0]["file"]).read_bytes()
    (tmp_path / first[0]["file"]).write_bytes(whole[:-1])
    again = export(package_file, tmp_path, *options)
    assert [one["reused"] for one in again] == [False, True]
    assert (tmp_path / first[0]["file"]).stat().st_size >= len(whole) - 1
    # Another largest batch is another engine.
    other = export(package_file, tmp_path, "--compute-capability", "8.9", "--max-batch", "2")
    assert other[0]["file"] not in {one["file"] for one in first}
    assert len(read_build_report(tmp_path).engines) == 3
    table = CliRunner().invoke(
        cli,
        ["export", "--model", str(package_file), "--trt", "--out", str(tmp_path), "--compute-capability", "89"],
        catch_exceptions=False,
    )
    assert "as it was" in table.stdout
    assert first[0]["file"] in table.stdout


def test_an_operation_it_lacks_is_named_with_its_node(rtx: TensorRT, package: Package, tmp_path: Path) -> None:
    model = onnx.load_from_string(package.model_onnx)
    node = next(item for item in model.graph.node if item.name == "edgeflame.distance_positions_first")
    node.op_type, node.domain = "Sqroot", "of.nobody"
    with pytest.raises(RuntimeUnavailableError, match=r"edgeflame\.distance_positions_first.*Sqroot") as raised:
        build(rtx, model.SerializeToString(), tmp_path)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_what_it_cannot_build_is_told_with_its_reason(rtx: TensorRT, package: Package, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"compute capability 7\.5: .*not supported"):
        build(rtx, package.model_onnx, tmp_path, capability="7.5")


def test_bytes_that_are_no_model(rtx: TensorRT, tmp_path: Path) -> None:
    with pytest.raises((PackageError, RuntimeUnavailableError), match=r"graph"):
        build(rtx, b"no model", tmp_path)


def test_no_space_left_keeps_the_old_engine(
    rtx: TensorRT, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = build(rtx, package.model_onnx, tmp_path)
    (tmp_path / record.file).write_bytes(b"an older one")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(StorageError, match="No space left"):
        build(rtx, package.model_onnx, tmp_path)
    assert (tmp_path / record.file).read_bytes() == b"an older one"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("asked", "message"), [("8.7", "does not build for .* 8.7, but for 7.5"), ("new", "written")])
def test_generations_it_does_not_know(rtx: TensorRT, asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select_capabilities(rtx, (asked,))


@pytest.mark.parametrize(
    ("machine", "board", "message"),
    [
        ("x86_64", "", r"edgeflame\[rtx\].*edgeflame\[tensorrt\].*JetPack"),
        ("aarch64", "", r"data-centre GPU"),
        ("aarch64", "NVIDIA Jetson Orin NX", r"On this Jetson it comes with JetPack"),
    ],
)
def test_where_it_is_missing_the_error_says_what_this_machine_needs(
    machine: str, board: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.write_text(board)
    monkeypatch.setattr(tensorrt, "_loaded", {})
    monkeypatch.setattr(tensorrt, "_DEVICE_TREE", model)
    monkeypatch.setattr("platform.machine", lambda: machine)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=message):
        load_tensorrt()


@pytest.mark.parametrize("arguments", [(), ("--trt",), ("--trt", "--onnx", "x.onnx"), ("--out", "x")])
def test_one_of_two_is_asked_for(arguments: tuple[str, ...], package_file: Path) -> None:
    with pytest.raises(UsageError, match="either --onnx FILE, --trt with --out DIR"):
        CliRunner().invoke(cli, ["export", "--model", str(package_file), *arguments], catch_exceptions=False)


class DeviceTensorRT:
    """A stand-in for ``tensorrt`` on a device: it has no compute capabilities to choose from, and times kernels."""

    def __init__(self) -> None:
        self.flags: list[int] = []
        self.caches: list[bytes] = []
        self.profiles: list[tuple[Any, ...]] = []

        def add_profile(profile: Any) -> None:
            self.profiles.append(profile.shapes)

        def create_cache(data: bytes) -> Any:
            self.caches.append(data)
            return SimpleNamespace(serialize=lambda: data + b"+")

        config = SimpleNamespace(
            create_timing_cache=create_cache,
            set_timing_cache=lambda cache, ignore: True,
            add_optimization_profile=add_profile,
        )
        tensor = SimpleNamespace(shape=(-1, 64, 64, 3))
        profile = SimpleNamespace(shapes=None)
        profile.set_shape = lambda *shapes: setattr(profile, "shapes", shapes)
        network = SimpleNamespace(get_input=lambda index: tensor)
        builder = SimpleNamespace(
            create_network=lambda flags: self.flags.append(flags) or network,
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda network, config: b"engine" * 10,
        )
        self.kind, self.version, self.builds_ahead, self.logger = "tensorrt", "10.3.0", False, None
        self.module = SimpleNamespace(
            __name__="tensorrt",
            Builder=lambda logger: builder,
            OnnxParser=lambda network, logger: SimpleNamespace(parse=lambda data: True),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            BuilderFlag=SimpleNamespace(),
        )

    def take_errors(self) -> list[str]:
        return []


def test_on_a_device_the_recipe_is_the_same_and_its_timings_are_kept(tmp_path: Path) -> None:
    library = DeviceTensorRT()
    record = build(library, b"one", tmp_path, capability="8.7")
    assert record.file.endswith("-fp32-b4-sm87-tensorrt10.3.0.engine")
    build(library, b"two", tmp_path, capability="8.7")
    assert library.flags == [2, 2]
    assert library.caches == [b"", b"+"]
    assert library.profiles[0] == ("image", (1, 64, 64, 3), (1, 64, 64, 3), (4, 64, 64, 3))


def test_on_a_machine_without_a_gpu_a_device_cannot_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = DeviceTensorRT()
    monkeypatch.setattr(tensorrt, "device_capability", lambda: "8.7")
    assert select_capabilities(library, ()) == select_capabilities(library, ("SM87",)) == ["8.7"]
    with pytest.raises(UsageError, match=r"for the GPU of this machine alone \(8.7\), not for 8.9"):
        select_capabilities(library, ("8.9",))


def test_an_engine_of_a_memory_is_built(rtx: TensorRT, tmp_path: Path) -> None:
    from export.graph import complete_graph
    from tests.support.small_package import memory_statistics, small_embedding_graph

    model = complete_graph(small_embedding_graph(), memory_statistics(), smoothing_sigma=1.0, metadata={})
    assert build(rtx, model, tmp_path).size_bytes > 0
