"""The demo by its commands, and flower-superlink's nodes following the register, for real."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.enrolments import Keys, request
from fakes.federations import Federation
from server.federation import Federation as Coordinator
from server.flower_control import Control, Node

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    yield federation
    federation.stop()


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def control(federation: Federation) -> Control:
    return Control(f"127.0.0.1:{federation.port}", federation.server_state / "ca.pem")


def nodes(federation: Federation) -> dict[str, Node]:
    with control(federation) as connection:
        return {node.name: node for node in connection.nodes()}


def may_connect(federation: Federation) -> list[str]:
    return sorted(name for name, node in nodes(federation).items() if not node.unregistered)


def save(federation: Federation, site: str) -> Path:
    path = federation.folder / f"{site}.enroll.json"
    path.write_text(request(site).to_json())
    return path


def test_the_demo_is_made_by_the_commands_it_prints(federation: Federation) -> None:
    words = ["server", "init", "--demo", "--port", str(federation.port)]
    told = federation.call(*words).stdout
    commands = [line.split()[3:] for line in told.splitlines() if line.startswith("$ python -m ")]
    assert [command[:2] for command in commands] == [
        ["server", "init"],
        *[["client", "init"], ["server", "admit"], ["client", "join"]] * 3,
    ]
    made = [command for command in commands if command[:2] == ["client", "init"]]
    assert all(command[-1] == "--allow-unprotected" for command in made)
    following = told.rpartition("terminal of its own:\n")[2].splitlines()
    assert following[:4] == [
        "  python -m server superlink",
        *(f"  python -m client --site {site}" for site in "ABC"),
    ]
    assert following[4].startswith("  python -m server run --output runs/demo ")
    coordinator = Coordinator.open(federation.server_state)
    assert set(coordinator.admitted()) == {"A", "B", "C"}
    for site in "ABC":
        assert (federation.state(site) / "join.json").exists()

    before = files(federation.folder)
    again = federation.call("server", "init", "--demo").stdout  # its port is known by now
    assert again.splitlines()[-6:] == told.splitlines()[-6:]
    assert files(federation.folder) == before


def test_a_demo_whose_step_fails_says_which(federation: Federation) -> None:
    (federation.folder / "sites").mkdir()
    (federation.folder / "sites" / "B.toml").write_text('site = "Z"\n[data]\ndataset = "phantom"\n')
    done = federation.call("server", "init", "--demo", "--port", str(federation.port), code=2)
    assert done.stderr.splitlines() == [
        "error: --site B but B.toml says site=Z",
        "error: `python -m client init` ended with exit code 2",
        "hint: its message is above",
    ]


def test_a_demo_on_a_port_that_cannot_be_says_so(federation: Federation) -> None:
    done = federation.call("server", "init", "--demo", "--port", "0", code=2)
    assert done.stderr.startswith("error: address=127.0.0.1:0: expected host:port")
    assert not federation.server_state.exists()


def test_the_superlinks_nodes_follow_the_register(federation: Federation) -> None:
    address = f"127.0.0.1:{federation.port}"
    federation.call("server", "init", "--address", address, "--port", str(federation.port))
    for site in "AB":
        said = federation.call("server", "admit", str(save(federation, site))).stdout
        assert "does not run; it learns of this when it starts" in said

    federation.start_superlink()
    federation.wait_for("superlink", "admitted=A,B")
    assert may_connect(federation) == ["A", "B"]
    assert nodes(federation)["A"].status == "registered"
    assert nodes(federation)["A"].last_seen is None

    said = federation.call("server", "admit", str(save(federation, "C"))).stdout
    assert "registered node C" in said
    assert "unregistered node B" in federation.call("server", "revoke", "B").stdout
    assert may_connect(federation) == ["A", "C"]

    # Flower takes no key twice, registered or not; and it is a stranger's key that goes.
    stranger = Keys().request("Z")
    other = Coordinator.create(federation.folder / "other", name="x", address="127.0.0.1:8000")
    other.admit(stranger)
    with control(federation) as connection:
        gone = Coordinator.open(federation.server_state).sites()["B"].node_key
        assert connection.register("B", gone) is False
        assert connection.register("Z", other.sites()["Z"].node_key) is True
        assert connection.unregister(nodes(federation)["B"].node_id) is False
        assert connection.unregister(12345) is False
    assert may_connect(federation) == ["A", "C", "Z"]

    federation.processes["superlink"].send_signal(signal.SIGTERM)
    assert federation.processes["superlink"].wait(30) == 0
    federation.call("server", "revoke", "A")
    federation.call("server", "admit", str(save(federation, "D")))
    federation.start_superlink()
    federation.wait_for("superlink", "admitted=C,D")
    assert may_connect(federation) == ["C", "D"]
    assert federation.log("superlink").count("unregistered node Z") == 1

    federation.kill("superlink")
    for path in federation.server_state.glob("superlink.sqlite*"):
        path.unlink()
    federation.start_superlink()
    federation.wait_for("superlink", "admitted=C,D", count=2)
    assert may_connect(federation) == ["C", "D"]
    federation.call("server", "audit", "--verify")
