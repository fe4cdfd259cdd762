"""Addresses of block servers: `HOST:PORT`, or `[HOST]:PORT` for IPv6."""

import errno
import ipaddress
import socket

from fedsea.errors import UsageError


def parse_address(text: str, *, allow_port_zero: bool = False) -> tuple[str, int]:
    """The host, without brackets, and the port of an address; UsageError if it is none.

    Port 0, which lets a listener take any free port, is for listeners alone (`allow_port_zero`).
    """
    stripped = text.strip()
    if "/" in stripped or any(character.isspace() for character in stripped):
        raise UsageError(f"{text!r} is no address: write HOST:PORT alone, without a scheme or a path")
    host, colon, port_text = stripped.rpartition(":")
    if not colon or not host:
        raise UsageError(f"{text!r} is no address: write HOST:PORT, such as localhost:7070")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ipv6(host):
            raise UsageError(f"{text!r} is no address: between the brackets stands no IPv6 address")
    elif ":" in host:
        raise UsageError(f"{text!r} is no address: write an IPv6 host in brackets, such as [::1]:7070")
    lowest = 0 if allow_port_zero else 1
    digits = port_text.isascii() and port_text.isdecimal() and len(port_text) <= 5
    if not (digits and lowest <= int(port_text) <= 65535):
        raise UsageError(f"{text!r} is no address: the port is a number from {lowest} to 65535")
    return host, int(port_text)


def format_address(host: str, port: int) -> str:
    """Write host and port as one address, the reverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether the host names this machine only, so that nothing sent to it passes a network."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_server(address: str, *, plaintext: bool) -> None:
    """Check a server's address; UsageError if it is none, or if what is not encrypted would leave this machine."""
    host, _port = parse_address(address)
    if plaintext and not is_loopback(host):
        raise UsageError(f"insecure connections stay on this machine; {host} is another one, so give credentials")


def check_listen(address: str, *, plaintext: bool) -> tuple[str, int]:
    """Split an address to listen on; UsageError if it is none, or if others could reach a server without TLS there."""
    host, port = parse_address(address, allow_port_zero=True)
    if plaintext and not is_loopback(host):
        raise UsageError(
            f"without credentials the server listens on loopback addresses only, not on {host}; "
            "make some with: fedsea credentials init DIR"
        )
    return host, port


def require_free(host: str, port: int, option: str) -> int:
    """Check that an address can be listened on, before minutes go into loading weights; returns its port, 0 settled.

    Raises UsageError, which names the `option` that chooses another, if it is taken or not this machine's.
    """
    listen = format_address(host, port)
    try:
        family, kind, protocol, _name, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: a port of a moment ago is free
            probe.bind(where)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise UsageError(f"cannot listen on {listen}: no machine is known by the name {host!r}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"cannot listen on {listen}: port {port} is taken; choose another with {option}") from None
        raise UsageError(f"cannot listen on {listen}: {error.strerror or error}; see {option}") from None


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
