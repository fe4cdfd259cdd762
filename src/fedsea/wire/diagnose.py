"""Why a block server cannot be reached, in one clear line.

gRPC reports a wrong port, an expired certificate and a server without TLS as one and the same `UNAVAILABLE`. After such
a failure this module looks for itself, with plain sockets and the standard library's TLS.
"""

import datetime
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from shlex import quote
from typing import NoReturn

from fedsea.errors import CredentialsError, FedSEAError, ServerUnavailableError, UsageError
from fedsea.wire.address import format_address, is_loopback, parse_address
from fedsea.wire.credentials import Credentials

_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 2.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order

# RFC 9113, section 3.4: what a client says first in HTTP/2, with an empty SETTINGS frame after it. A gRPC server does
# not wait for it; a server of another protocol shows by its reply what it is.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

# What is wrong with a server's certificate, by OpenSSL's verification results (x509_vfy.h).
_OTHER_AUTHORITY = "the server is of another authority: check the address, or copy the client's folder from it again"
_OTHER_HOST = "it is not for the name {host!r}: its operator adds it with `fedsea credentials init DIR --host {quoted}`"
_UNVERIFIED = {
    9: "it is not valid yet: check both machines' clocks",
    10: "it has expired: its operator renews it with `fedsea credentials init DIR` and restarts the server",
    26: "it is not for a server: check the address",
    **dict.fromkeys((2, 7, 18, 19, 20, 21, 24, 30), _OTHER_AUTHORITY),
    **dict.fromkeys((62, 64), f"{_OTHER_HOST} and restarts the server"),
}

# TLS alerts (RFC 8446, section 6.2) by which a server rejects the client's certificate, as OpenSSL names them.
_REFUSALS = {
    "UNKNOWN_CA": "it is of another authority",
    "CERTIFICATE_EXPIRED": "it has expired",
    "CERTIFICATE_REVOKED": "it is revoked",
    "CERTIFICATE_REQUIRED": "it takes none but its own authority's",
    "BAD_CERTIFICATE": "it is of another authority or damaged",
    "CERTIFICATE_UNKNOWN": "it is of another authority",
    "UNSUPPORTED_CERTIFICATE": "it is not for a client",
    "DECRYPT_ERROR": "it is of another authority or damaged",
    "ACCESS_DENIED": "it is of another authority",
}


def explain_unreachable(address: str, credentials: Credentials | None, detail: str = "") -> FedSEAError:
    """The error that says why a connection failed, for the caller to raise; takes up to about ten seconds.

    CredentialsError if TLS or a certificate is the cause, UsageError if the address is none, else
    ServerUnavailableError, which quotes gRPC's `detail` if no cause is found.
    """
    error = _cause(address, credentials, detail)
    if isinstance(error, UsageError) or (proxy := _proxy(address, credentials)) is None:
        return error
    # What was looked at just now went there directly.
    return type(error)(f"{error} (gRPC goes through the proxy that {proxy} names, unless no_proxy has the host)")


def check_reachable(address: str, credentials: Credentials | None) -> None:
    """Raise what `explain_unreachable` would, if a first look at the server shows it: before a model is loaded.

    A server that is slow, or behind a proxy, is left to the connection itself.
    """
    if _proxy(address, credentials) is None:
        with suppress(OSError):
            _check(address, credentials)


def _proxy(address: str, credentials: Credentials | None) -> str | None:
    """The variable that names the proxy which gRPC may go through."""
    if credentials is None or is_loopback(parse_address(address)[0]):
        return None
    return next((name for name in _PROXIES if os.environ.get(name)), None)


def _cause(address: str, credentials: Credentials | None, detail: str) -> FedSEAError:
    try:
        _check(address, credentials)
    except FedSEAError as error:
        return error
    except TimeoutError:
        return ServerUnavailableError(f"{address} takes connections but does not answer: it may be stuck or overloaded")
    except OSError as error:
        detail = detail or str(error)
    reason = f": {' '.join(detail.split())}" if detail.strip() else ""
    return ServerUnavailableError(f"the block server at {address} answers, but the connection failed{reason}")


def _check(address: str, credentials: Credentials | None) -> None:
    host, port = parse_address(address)
    _connect(host, port).close()
    if credentials is None:
        _check_without_tls(host, port)
    else:
        _check_with_tls(host, port, credentials)


def _connect(host: str, port: int) -> socket.socket:
    """Open a TCP connection, or raise the error that says why there is none."""
    where = format_address(host, port)
    try:
        connection = socket.create_connection((host, port), _CONNECT_SECONDS)
    except (socket.gaierror, UnicodeError):
        raise ServerUnavailableError(f"no machine is known by the name {host!r}: check the address {where}") from None
    except ConnectionRefusedError:
        raise ServerUnavailableError(
            f"no block server at {where}: start one with `fedsea serve MODEL`, or check the address"
        ) from None
    except TimeoutError:
        raise ServerUnavailableError(
            f"{where} does not answer: check the address, the network, and firewalls on the way"
        ) from None
    except OSError as error:
        raise ServerUnavailableError(f"{where} cannot be reached: {error.strerror or error}") from error
    connection.settimeout(_ANSWER_SECONDS)
    return connection


def _check_without_tls(host: str, port: int) -> None:
    """Raise why a client without credentials cannot use this server; return if it speaks HTTP/2 in plain text."""
    # The certificate is not looked at: the question is only whether there is TLS at all.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        context.wrap_socket(_connect(host, port), server_hostname=host).close()
    except ssl.SSLError as error:
        if "ALERT" not in str(error.reason):
            _check_http2(host, port)
            return
    except ConnectionError:
        _check_http2(host, port)
        return
    raise CredentialsError(
        f"the server at {format_address(host, port)} asks for TLS: give this client's credentials (`--credentials DIR`)"
    )


def _check_with_tls(host: str, port: int, credentials: Credentials) -> None:
    """Raise why a client with these credentials cannot use this server; return if both sides accept each other."""
    where = format_address(host, port)
    if credentials.expires <= datetime.datetime.now(datetime.UTC):
        raise CredentialsError(
            f"this client's certificate expired on {credentials.expires:%Y-%m-%d}: "
            "run `fedsea credentials init DIR` where the authority is, and copy the client's folder here"
        )
    try:
        connection = _client_context(credentials).wrap_socket(_connect(host, port), server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        why = _UNVERIFIED.get(error.verify_code, "{reason}")
        why = why.format(host=host, quoted=quote(host), reason=error.verify_message)
        raise CredentialsError(f"the certificate of the server at {where} is refused: {why}") from None
    except ssl.SSLError as error:
        _raise_if_alert(where, error)
        _raise_other_protocol(host, port)
    except ConnectionError:
        _raise_other_protocol(host, port)
    with connection:
        # In TLS 1.3 the client's handshake ends before the server has seen its certificate. A gRPC server speaks
        # first once it accepts; when it refuses, it closes, and a TLS alert may come before that.
        try:
            accepted = connection.recv(1)
        except TimeoutError:
            return
        except ssl.SSLError as error:
            _raise_if_alert(where, error)
            raise
        except ConnectionError:
            accepted = b""
    if not accepted:
        raise CredentialsError(
            f"the server at {where} closed the connection on seeing this client's certificate: it is of another "
            "authority, or expired by the server's clock; copy the client's folder from the server again"
        )


def _raise_if_alert(where: str, error: ssl.SSLError) -> None:
    """Raise what a TLS alert of the server means; return if the error is none."""
    _, alert, name = str(error.reason).partition("ALERT_")
    if not alert:
        return
    if name in _REFUSALS:
        raise CredentialsError(
            f"the server at {where} refuses this client's certificate: {_REFUSALS[name]}; "
            "copy the client's folder from this server again"
        ) from None
    raise CredentialsError(f"TLS with {where} failed: the server says {name.lower().replace('_', ' ')}") from None


def _raise_other_protocol(host: str, port: int) -> NoReturn:
    """Raise what it means for a client with credentials that the server speaks no TLS."""
    _check_http2(host, port)
    raise CredentialsError(
        f"the server at {format_address(host, port)} runs without TLS, and this client has credentials: "
        "start the server with `--credentials DIR`"
    )


def _check_http2(host: str, port: int) -> None:
    """Return if a plain HTTP/2 server listens, which a gRPC server without TLS is; else raise what is known."""
    where = format_address(host, port)
    with _connect(host, port) as connection:
        try:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(16)
        except ConnectionError:
            answer = b""
    # A frame of HTTP/2 (RFC 9113, section 4.1): 3 bytes of length, the type, 1 byte of flags, the stream.
    if len(answer) >= 9 and answer[3] == 4 and answer[5:9] == bytes(4):
        return
    if answer.startswith(b"HTTP/"):
        raise ServerUnavailableError(f"at {where} is a web server, not a block server: check the address")
    if answer:
        raise ServerUnavailableError(f"at {where} is not a block server but another program: check the address")
    raise ServerUnavailableError(f"{where} takes connections and closes them: it is another program, or shutting down")


def _client_context(credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=credentials.authority.decode())
    with _as_file(credentials.certificate + b"\n" + credentials.key) as path:
        context.load_cert_chain(path)
    return context


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path of these bytes, as the ssl module takes a key from a file only: in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("pem"), "wb", buffering=0) as file:
            file.write(content)
            yield f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.NamedTemporaryFile() as file:  # its owner's alone, and gone at once
        file.write(content)
        file.flush()
        yield file.name
