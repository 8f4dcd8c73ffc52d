"""The nginx configuration of the gateway: what hospitals reach of flower-superlink, nothing else.

flower-superlink offers three interfaces on one port, and Flower's control interface authenticates
nobody: whoever reaches it can register nodes, read runs and start code. So flower-superlink
listens on this machine alone, and nginx stands before it.

Invariant: a request is passed on only if its request line is, byte for byte, that of a call which
a SuperNode with a registered key makes. What is passed on is the same fixed path, never a text of
the caller's. All else is 404.

Source: the paths and headers are those of Flower 1.41 (``flwr/supernode/fleet_http_client.py``).
"""

from __future__ import annotations

import shlex
from ipaddress import ip_address
from pathlib import Path

from server.federation import Federation
from server.federation_file import host_of, is_loopback
from strategies.errors import ConfigError
from strategies.files import write_atomic

CONFIGURATION = "nginx.conf"

# Without register-node and unregister-node: sites are admitted by `python -m server admit`.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
# Flower cuts every array into pieces of 5 MiB, whatever the size of a model.
PUSH_OBJECT, PIECE_LIMIT = "/v1/fleet/push-object", "8m"
BODY_LIMIT = "64k"
# An empty 200 whenever flower-superlink is up; `python -m client check` asks for it.
HEALTH_PATH = "/health"

# Headers of such a call. Others, such as X-Forwarded-For, would only mislead flower-superlink.
HEADERS = (
    "Content-Type",
    "Accept",
    "flwr-public-key",
    "flwr-signature",
    "flwr-timestamp",
    "flwr-package-name",
    "flwr-package-version",
    "flwr-component-name",
)


def write_nginx_configuration(federation: Federation) -> Path:
    """Write ``nginx.conf`` into the coordinator's state folder and return its path.

    Raises:
        ConfigError: See :func:`nginx_configuration`.
    """
    path = federation.state_dir.resolve() / CONFIGURATION
    write_atomic(path, nginx_configuration(federation))
    return path


def needs_gateway(federation: Federation) -> bool:
    """Whether sites connect to a gateway, and not to flower-superlink itself on this machine."""
    return _port_of(federation.address) != federation.port


def nginx_configuration(federation: Federation) -> str:
    """Return a complete configuration, to be run as it is: ``nginx -e stderr -c FILE``.

    It names the state folder absolutely. A loopback address is listened on alone; any other on all
    of this machine's interfaces, since behind a translating router it is none of them.

    Raises:
        ConfigError: The folder's name cannot be written in the syntax of nginx.
    """
    host, public_port = host_of(federation.address), _port_of(federation.address)
    port = federation.port
    state = federation.state_dir.resolve()
    locations = "\n".join(
        [
            *(_location("POST", f"/v1/fleet/{call}", port) for call in FLEET_CALLS),
            _location("GET", HEALTH_PATH, port),
        ]
    )
    headers = "\n".join(
        f"    proxy_set_header {name} $http_{name.lower().replace('-', '_')};" for name in HEADERS
    )
    command = f"nginx -e stderr -c {shlex.quote(str(state / CONFIGURATION))}"
    temporary = _quoted(state / "nginx-temporary")
    return f"""\
# The gateway of a federation: hospitals reach the calls listed below and nothing else.
# `python -m server` writes this file anew; to change something, change a copy.
#
#   try it     {command} -t
#   run it     {command}
#   reload it  {command} -s reload    (after `python -m server init --renew`)
#
# It stays in the foreground, as systemd and containers want it, and logs to standard error. Run it
# as the user of this folder, whose key it reads. A port below 1024 needs one right besides: in a
# systemd unit, AmbientCapabilities=CAP_NET_BIND_SERVICE. Needs nginx 1.19.5 or newer.

daemon off;
error_log stderr error;
pid {_quoted(state / "nginx.pid")};

worker_processes auto;
# A request takes two connections, one to each side, and each a file. Whoever opens connections
# and sends nothing must open many to shut the sites out; see client_header_timeout too.
worker_rlimit_nofile 8192;
events {{
  worker_connections 4096;
}}

http {{
  access_log off;
  server_tokens off;

  # nginx makes these folders when it starts; nothing is written there, see "buffering" below.
  client_body_temp_path {temporary};
  proxy_temp_path {temporary};
  fastcgi_temp_path {temporary};
  uwsgi_temp_path {temporary};
  scgi_temp_path {temporary};

  # A site has at most five requests under way: one every three seconds when idle, many a second
  # when it sends a model. Beyond the rate requests wait; beyond the burst, or too many under way,
  # they get 503, after which Flower tries again. Sites behind one address share these.
  limit_conn_zone $binary_remote_addr zone=connections:1m;
  limit_req_zone $binary_remote_addr zone=requests:1m rate=100r/s;

  server {{
    listen {_listened(host, public_port)} ssl;{_ipv6_hint(host, public_port)}
    limit_conn connections 64;
    limit_req zone=requests burst=500 delay=200;

    ssl_certificate {_quoted(federation.server_certificate_file)};
    ssl_certificate_key {_quoted(federation.server_key_file)};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
    ssl_session_tickets off;

    # Flower reads a whole request before it asks who sent it, so every path has its limit. Only a
    # piece of an array is long; a list of a reply's pieces takes 70 bytes for each.
    # limit_conn counts a connection only once it has sent its headers: until then this is all that
    # ends one that sends nothing. An honest site's handshake and headers are a few kilobytes.
    client_header_timeout 10s;
    # Flower itself gives up after 30 s; nginx lasts longer, so that Flower decides.
    client_body_timeout 60s;
    send_timeout 60s;
    proxy_connect_timeout 10s;
    proxy_send_timeout 60s;
    proxy_read_timeout 60s;

    # Buffering would put updates on this machine's disk.
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_http_version 1.1;
    proxy_next_upstream off;

    # Also on this machine: only the holder of the federation's key is flower-superlink.
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {_quoted(federation.ca_file)};
    proxy_ssl_name localhost;
    proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;

    # Who the site is, its signature says; its address and other headers are not passed on.
    proxy_pass_request_headers off;
    proxy_set_header Host localhost;
    proxy_set_header Connection close;
{headers}

    merge_slashes off;
    location / {{
      client_max_body_size 0;  # 404 for a large body too, and nothing in the log
      return 404;
    }}
{locations}
  }}
}}
"""


def _location(method: str, path: str, port: int) -> str:
    # nginx compares a location with the decoded path; the request line is what was really sent.
    return f"""\
    location = {path} {{
      if ($request != "{method} {path} HTTP/1.1") {{
        return 404;
      }}
      client_max_body_size {PIECE_LIMIT if path == PUSH_OBJECT else BODY_LIMIT};
      proxy_pass https://127.0.0.1:{port}{path};
    }}"""


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _listened(host: str, port: int) -> str:
    if not is_loopback(host):
        host = "::" if ":" in host else "0.0.0.0"
    elif host == "localhost":
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ipv6_hint(host: str, port: int) -> str:
    """Return a second line to uncomment, where a name may stand for an IPv6 address as well."""
    try:
        ip_address(host)
    except ValueError:
        if host != "localhost":
            return f"\n    # listen [::]:{port} ssl;  # if sites reach this machine over IPv6 too"
    return ""


def _quoted(path: Path) -> str:
    """Return a path as nginx reads it: whole, and free of its variables."""
    text = str(path.resolve())
    if "$" in text or not text.isprintable():
        raise ConfigError(
            f"state-dir={text!r} cannot be written into an nginx configuration",
            hint="expected a folder without $ and control characters in its name",
        )
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
