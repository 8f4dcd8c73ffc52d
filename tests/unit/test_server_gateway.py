"""The gateway's configuration as text; tests/e2e/test_gateway.py runs nginx with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from server.federation import Federation
from server.gateway import (
    FLEET_CALLS,
    HEADERS,
    needs_gateway,
    nginx_configuration,
    write_nginx_configuration,
)
from strategies.errors import ConfigError


def federation(folder: Path, address: str = "hub.example.org:8443") -> Federation:
    return Federation.create(folder / "state", name="lung", address=address, port=8000)


def directives(configuration: str, name: str) -> list[str]:
    """What follows a directive, wherever it stands; comments are none."""
    return re.findall(rf"^ *{name} (.*);$", configuration, flags=re.MULTILINE)


def test_the_calls_are_all_that_flower_has_but_the_registering_of_nodes():
    offered = {
        path.removeprefix("/v1/fleet/")
        for method, path in PROTOBUF_REQUEST_TYPES
        if path.startswith("/v1/fleet/") and method == "POST"
    }
    assert offered - set(FLEET_CALLS) == {"register-node", "unregister-node"}
    assert set(FLEET_CALLS) <= offered


def test_the_headers_are_those_by_which_flower_knows_a_node_and_its_version():
    version = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
    node = {FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER}
    assert set(HEADERS) == node | set(version) | {"Content-Type", "Accept"}


def test_every_way_through_is_an_exact_location_with_a_fixed_request_line(tmp_path):
    configuration = nginx_configuration(federation(tmp_path))

    blocks = re.findall(r"^    location ([^\n]*) \{\n(.*?)^    \}", configuration, re.M | re.S)
    assert [where for where, _ in blocks].count("/") == 1
    assert [line.partition("#")[0].strip() for line in dict(blocks)["/"].splitlines()] == [
        "client_max_body_size 0;",
        "return 404;",
    ]
    passing = {where.removeprefix("= "): body for where, body in blocks if where != "/"}
    assert set(passing) == {f"/v1/fleet/{call}" for call in FLEET_CALLS} | {"/health"}
    assert all(where.startswith("= ") for where, _ in blocks if where != "/")
    for path, body in passing.items():
        method = "GET" if path == "/health" else "POST"
        assert [line.strip() for line in body.splitlines()] == [
            f'if ($request != "{method} {path} HTTP/1.1") {{',
            "return 404;",
            "}",
            f"client_max_body_size {'8m' if path == '/v1/fleet/push-object' else '64k'};",
            f"proxy_pass https://127.0.0.1:8000{path};",
        ]
    assert configuration.count("proxy_pass ") == len(passing)
    assert configuration.count("location ") == len(blocks)


def test_only_the_named_headers_are_passed_on(tmp_path):
    configuration = nginx_configuration(federation(tmp_path))
    assert directives(configuration, "proxy_pass_request_headers") == ["off"]
    passed = dict(line.split() for line in directives(configuration, "proxy_set_header"))
    assert passed.pop("Host") == "localhost"
    assert passed.pop("Connection") == "close"
    assert passed == {name: f"$http_{name.lower().replace('-', '_')}" for name in HEADERS}


def test_both_connections_have_tls_and_the_inner_one_knows_its_end(tmp_path):
    configuration = nginx_configuration(federation(tmp_path))
    state = (tmp_path / "state").resolve()
    assert directives(configuration, "listen") == ["0.0.0.0:8443 ssl"]
    assert directives(configuration, "ssl_protocols") == ["TLSv1.2 TLSv1.3"]
    assert directives(configuration, "ssl_certificate") == [f'"{state}/server.pem"']
    assert directives(configuration, "ssl_certificate_key") == [f'"{state}/server.key"']
    assert directives(configuration, "proxy_ssl_verify") == ["on"]
    assert directives(configuration, "proxy_ssl_trusted_certificate") == [f'"{state}/ca.pem"']
    assert directives(configuration, "proxy_ssl_name") == ["localhost"]


def test_nothing_of_a_request_is_kept(tmp_path):
    configuration = nginx_configuration(federation(tmp_path))
    assert directives(configuration, "access_log") == ["off"]
    assert directives(configuration, "error_log") == ["stderr error"]
    assert directives(configuration, "proxy_request_buffering") == ["off"]
    assert directives(configuration, "proxy_buffering") == ["off"]
    assert directives(configuration, "server_tokens") == ["off"]


@pytest.mark.parametrize(
    ("address", "listened"),
    [
        ("hub.example.org:443", "0.0.0.0:443"),
        ("192.0.2.7:8443", "0.0.0.0:8443"),
        ("[2001:db8::7]:8443", "[::]:8443"),
        ("localhost:8443", "127.0.0.1:8443"),
        ("127.0.0.1:8443", "127.0.0.1:8443"),
        ("[::1]:8443", "[::1]:8443"),
    ],
)
def test_a_loopback_address_is_listened_on_alone(tmp_path, address, listened):
    configuration = nginx_configuration(federation(tmp_path, address))
    assert directives(configuration, "listen") == [f"{listened} ssl"]
    has_hint = "# listen [::]:443 ssl;" in configuration
    assert has_hint is (address == "hub.example.org:443"), "a name may have an IPv6 address"


def test_sites_on_this_machine_may_do_without(tmp_path):
    assert not needs_gateway(federation(tmp_path / "demo", "127.0.0.1:8000"))
    assert needs_gateway(federation(tmp_path / "near", "127.0.0.1:8443"))
    assert needs_gateway(federation(tmp_path / "far", "hub.example.org:443"))


def test_the_file_is_complete_and_says_how_to_run_it(tmp_path):
    folder = tmp_path / 'of "the" hub; #1'
    path = write_nginx_configuration(federation(folder))
    text = path.read_text()
    assert path == (folder / "state" / "nginx.conf").resolve()
    assert f"run it     nginx -e stderr -c '{path}'\n" in text
    written = str(folder.resolve()).replace('"', '\\"')
    assert directives(text, "pid") == [f'"{written}/state/nginx.pid"']
    assert text.count("{") == text.count("}")
    assert not [name for name in (folder / "state").iterdir() if name.name.startswith(".nginx")]


def test_connections_that_send_nothing_do_not_soon_shut_the_sites_out(tmp_path):
    configuration = nginx_configuration(federation(tmp_path))
    assert directives(configuration, "worker_processes") == ["auto"]
    [connections] = directives(configuration, "worker_connections")
    [files] = directives(configuration, "worker_rlimit_nofile")
    assert 4096 <= int(connections) < int(files)
    assert directives(configuration, "client_header_timeout") == ["10s"]


@pytest.mark.parametrize("name", ["cost$", "two\nlines"])
def test_a_folder_that_nginx_would_read_otherwise_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be written into an nginx configuration") as error:
        nginx_configuration(federation(tmp_path / name))
    assert "without $" in error.value.hint
