"""Graphs that no export of ours is: refused before a runtime sees them, or ended with the process that tries them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from click.testing import CliRunner

from cli import cli
from edge.config import InspectConfig
from edge.inspector import InspectorLoader
from edge.runtimes.load import open_runtime
from edge.runtimes.trial import TRIED_FILE, try_graph
from edgeflame.errors import EdgeFlameError, PackageError
from edgeflame.operators import ALLOWED_OPERATORS, check_operators
from edgeflame.package import Package, write_package
from edgeflame.state import locked_state_dir
from export.precision import PRECISIONS, with_precision
from tests.support.paths import RECORDED
from tests.support.small_package import good_image
from tests.support.waiting import wait_for

Change = Callable[[onnx.ModelProto], None]


def edited(package: Package, change: Change) -> bytes:
    model = onnx.load_from_string(package.model_onnx)
    change(model)
    data: bytes = model.SerializeToString()
    return data


def before_the_score(model: onnx.ModelProto, *nodes: onnx.NodeProto, **constants: np.ndarray) -> None:
    """Nodes from ``in`` (the graph's own score) to ``out``, which becomes the score."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "score":
                node.output[index] = "in"
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(nodes)
    model.graph.node.append(onnx.helper.make_node("Identity", ["out"], ["score"], name="edgeflame.last"))


def endless_loop(model: onnx.ModelProto) -> None:
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["go"], ["go_on"]), onnx.helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            onnx.helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None),
        ],
        [
            onnx.helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
        ],
    )
    loop = onnx.helper.make_node("Loop", ["", "yes", "in"], ["out"], body=body)
    before_the_score(model, loop, yes=np.array(True))


def branches(model: onnx.ModelProto) -> None:
    out = [onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, None)]
    same = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["in"], ["r"])], "same", [], out)
    before_the_score(
        model,
        onnx.helper.make_node("If", ["yes"], ["out"], then_branch=same, else_branch=same),
        yes=np.array(True),
    )


def random_numbers(model: onnx.ModelProto) -> None:
    before_the_score(model, onnx.helper.make_node("RandomNormalLike", ["in"], ["out"]))


def sequences(model: onnx.ModelProto) -> None:
    before_the_score(
        model,
        onnx.helper.make_node("SequenceConstruct", ["in"], ["list"]),
        onnx.helper.make_node("SequenceAt", ["list", "first"], ["out"]),
        first=np.array(0),
    )


def of_another_domain(model: onnx.ModelProto) -> None:
    before_the_score(model, onnx.helper.make_node("Gelu", ["in"], ["out"], domain="com.microsoft"))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def with_a_function(model: onnx.ModelProto) -> None:
    opset = [onnx.helper.make_opsetid("", 18)]
    body = [onnx.helper.make_node("RandomNormalLike", ["a"], ["b"])]
    model.functions.append(onnx.helper.make_function("own", "Relu", ["a"], ["b"], body, opset))


def with_a_graph_in_an_allowed_operator(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("extra", inner))


def with_a_constant_outside(model: onnx.ModelProto) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "x")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (endless_loop, "graphs within its operators|operator 'Loop'"),
        (branches, "graphs within its operators|operator 'If'"),
        (random_numbers, "operator 'RandomNormalLike'"),
        (sequences, "operator 'SequenceConstruct'"),
        (of_another_domain, "operator 'Gelu' of the domain 'com.microsoft'"),
        (with_a_function, "functions"),
        (with_a_graph_in_an_allowed_operator, "graphs within"),
        (with_a_constant_outside, "files outside"),
    ],
)
def test_what_no_export_of_ours_has_is_refused_unrun(package: Package, change: Change, words: str) -> None:
    with pytest.raises(PackageError, match=f"cannot be loaded by ONNX Runtime here: .*({words})") as raised:
        open_runtime(edited(package, change), device="cpu")
    assert "\n" not in str(raised.value)


def test_a_model_in_the_runtime_s_own_format_is_refused(package: Package, tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(package.model_onnx, options, providers=["CPUExecutionProvider"])
    with pytest.raises(PackageError, match="ONNX Runtime's own format"):
        open_runtime((tmp_path / "model.ort").read_bytes(), device="cpu")


def test_every_graph_of_our_own_passes(package: Package) -> None:
    images = np.stack([good_image(seed) for seed in range(2)])
    model = onnx.load_from_string(package.model_onnx)
    for precision in PRECISIONS:
        for target in ("cpu", "tensorrt"):
            made = with_precision(model, precision, calibration=images, target=target)  # type: ignore[arg-type]
            check_operators(made.SerializeToString())


def test_the_list_names_operators_of_onnx_and_none_that_could_go_on_for_ever() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    newer_than_opset_18 = {"Attention", "RMSNormalization", "Swish"}
    assert known - newer_than_opset_18 >= ALLOWED_OPERATORS - newer_than_opset_18
    for kind in ALLOWED_OPERATORS & known:
        schema = onnx.defs.get_schema(kind)
        assert not any(one.type == onnx.defs.OpSchema.AttrType.GRAPH for one in schema.attributes.values())
        types = {name for one in (*schema.inputs, *schema.outputs) for name in one.types}
        assert not any(name.startswith(("seq", "optional")) for name in types) or kind == "Identity"
    assert not any(kind.startswith(("Random", "Sequence", "Optional", "String")) for kind in ALLOWED_OPERATORS)


def much_memory(model: onnx.ModelProto) -> None:
    before_the_score(
        model,
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        onnx.helper.make_node("ReduceSum", ["huge"], ["zero"], keepdims=0),
        onnx.helper.make_node("Add", ["in", "zero"], ["out"]),
        shape=np.array([1 << 22, 1 << 22]),
    )


def much_work(model: onnx.ModelProto) -> None:
    nodes = [onnx.helper.make_node("Expand", ["first", "square"], ["m0"])]
    nodes += [onnx.helper.make_node("MatMul", [f"m{index}", f"m{index}"], [f"m{index + 1}"]) for index in range(500)]
    before_the_score(
        model,
        onnx.helper.make_node("ReduceSum", ["in"], ["first"], keepdims=1),
        *nodes,
        onnx.helper.make_node("ReduceMax", ["m500"], ["most"], keepdims=0),
        onnx.helper.make_node("Max", ["in", "most"], ["out"]),
        square=np.array([4096, 4096]),
    )


def test_a_graph_that_asks_for_more_memory_than_there_is_fails_in_one_line(package: Package) -> None:
    data = edited(package, much_memory)
    with pytest.raises(EdgeFlameError) as raised:
        open_runtime(data, device="cpu", num_threads=1).score(good_image(1)[None])
    assert "\n" not in str(raised.value)
    with pytest.raises(EdgeFlameError) as raised:
        try_graph(data)
    assert "\n" not in str(raised.value)


def test_a_graph_that_does_not_come_to_an_end_is_given_up(package: Package) -> None:
    with pytest.raises(PackageError, match="does not score an image within 3 s"):
        try_graph(edited(package, much_work), timeout_s=3.0)
    assert not _trials()


def test_a_graph_that_ends_its_process_is_refused(package: Package) -> None:
    def end_it() -> None:
        wait_for(_trials, "it is tried")
        os.kill(_trials()[0], signal.SIGKILL)

    ending = threading.Thread(target=end_it)
    ending.start()
    with pytest.raises(PackageError, match=r"ended the process that tried it \(exit code -9\)"):
        try_graph(edited(package, much_work))
    ending.join()


def _trials() -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (process / "cmdline").read_bytes(), (process / "stat").read_text()
        except OSError:
            continue
        if b"run_trial" in command and int(status.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(int(process.name))
    return found


def test_a_package_whose_graph_loops_does_not_hang_a_line(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "m.edgeflame"
    write_package(
        path,
        manifest=package.manifest,
        model_onnx=edited(package, endless_loop),
        statistics=package.statistics,
    )
    for arguments in (
        ("inspect", "--model", path, "--source", "boards:warm_wood?size=64&parts=1"),
        ("model", "verify", path),
    ):
        done = CliRunner().invoke(cli, [str(one) for one in arguments])
        assert isinstance(done.exception, PackageError), done.exception
        assert done.exception.exit_code == 4


def test_a_graph_is_tried_once_for_each_state_folder_and_runtime(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    monkeypatch.setattr("edge.inspector.try_graph", lambda graph: tries.append(len(graph)))

    def open_line() -> int:
        """The number of tries when a daemon starts with two cameras."""
        tries.clear()
        loader = InspectorLoader(device="cpu", num_threads=1, state=tmp_path)
        for camera in ("a", "b"):
            loader.open(signed, InspectConfig(), camera=camera, is_live=False)
        return len(tries)

    assert open_line() == 1
    assert list(tmp_path.iterdir()) == [], "no daemon has run with the folder yet"
    with locked_state_dir(tmp_path, kind="line"):
        pass
    assert [open_line(), open_line()] == [1, 0]
    record = tmp_path / TRIED_FILE
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b"onnxruntime ", b"onnxruntime 0."))
    assert open_line() == 1, "a bit flipped in it"
    record.write_bytes(b"{")
    assert open_line() == 1, "it is damaged"
    record.unlink()
    record.mkdir()
    assert open_line() == 1, "it can neither be read nor written"
    record.rmdir()
    monkeypatch.setattr("onnxruntime.__version__", "1.99")
    assert [open_line(), open_line()] == [1, 0]


def test_an_engine_is_looked_for_where_onnx_runtime_is_not_installed(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    loader = InspectorLoader(device="rtx", engines=tmp_path, state=tmp_path)
    with pytest.raises(EdgeFlameError) as raised:
        loader.open(signed, InspectConfig(), camera="a", is_live=False)
    assert "ONNX Runtime" not in str(raised.value)


def test_a_graph_of_the_first_version_passes() -> None:
    from edgeflame.package import read_package

    check_operators(read_package(RECORDED / "state" / "first" / "package.edgeflame").model_onnx)
