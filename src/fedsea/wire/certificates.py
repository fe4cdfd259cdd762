"""Issuing and checking X.509 certificates; imported only where TLS is used: `cryptography` takes its time."""

import datetime
import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsea.errors import CredentialsError, UsageError
from fedsea.wire.roles import COORDINATOR_URI, Role

# Clocks of two machines differ: a certificate is valid a little before it was made.
CLOCK_SKEW = datetime.timedelta(minutes=5)

_USAGE: dict[Role, x509.ObjectIdentifier] = {
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "coordinator": ExtendedKeyUsageOID.CLIENT_AUTH,
}
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
E = TypeVar("E", bound=x509.ExtensionType)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def create_authority(lifetime: datetime.timedelta) -> Pair:
    """Create a certificate authority: a self-signed EC P-256 certificate that may sign others, none below them."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The random part keeps two authorities apart in messages, and in the trust store of the verifier.
    name = _name(f"FedSEA authority {secrets.token_hex(4)}")
    builder = _builder(name, name, key, key, _now() + lifetime, authority=True)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Pair, name: str, role: Role, lifetime: datetime.timedelta, hosts: Iterable[str] = ()
) -> tuple[Pair, datetime.datetime]:
    """A certificate that is good for one role and nothing else, and when it expires: not after the authority does.

    The server knows a client by the name. A server's `hosts` are written as `normalise_host` gives them. Raises
    CredentialsError if the authority's files cannot be read, do not belong together, or have expired.
    """
    issuer = _read_certificates(authority.certificate, "the authority's certificate")[0]
    issuer_key = _read_key(authority.key, "the authority's key")
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey) or issuer.public_key() != issuer_key.public_key():
        raise CredentialsError("the authority's key does not belong to its certificate: create credentials anew")
    expires = min(_now() + lifetime, issuer.not_valid_after_utc)
    if issuer.not_valid_after_utc <= _now():
        raise CredentialsError(
            f"the authority expired on {_day(issuer.not_valid_after_utc)}: create credentials in a new folder, "
            "and hand the clients' folders out again"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), issuer.subject, key, issuer_key, expires, authority=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([_USAGE[role]]), critical=False)
    alternatives = [_general_name(host) for host in hosts]
    if role == "coordinator":
        alternatives.append(x509.UniformResourceIdentifier(COORDINATOR_URI))
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return _pair(builder.sign(issuer_key, hashes.SHA256()), key), expires


def check(authority: bytes, pair: Pair, role: Role, place: str, renew: str) -> tuple[str, datetime.datetime]:
    """Check that a certificate can be used now, in this role, under one of these authorities (PEM).

    Gives its common name and when it expires (UTC). Raises CredentialsError that says what is wrong, in which `place`,
    and what to do: `renew` where the certificate no longer fits.
    """
    issuers = _read_certificates(authority, f"{place}/authority.pem")
    certificate = _read_certificates(pair.certificate, f"{place}/certificate.pem")[0]
    key = _read_key(pair.key, f"{place}/key.pem")
    if key.public_key() != certificate.public_key():
        raise CredentialsError(f"{place}/key.pem does not belong to certificate.pem beside it: {renew}")
    if not _allows(certificate, role):
        other = next((one for one in _USAGE if _allows(certificate, one)), None)
        raise CredentialsError(
            f"the certificate in {place} is not for a {role}: "
            + (f"it is a {other}'s; give the folder of a {role}" if other is not None else renew)
        )
    issuer = next((one for one in issuers if _issued_by(certificate, one)), None)
    if issuer is None:
        raise CredentialsError(f"the certificate in {place} was not issued by authority.pem beside it: {renew}")
    now = _now()
    for what, one in (("certificate", certificate), ("authority", issuer)):
        if one.not_valid_before_utc > now:
            raise CredentialsError(
                f"the {what} in {place} is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: "
                "check this machine's clock"
            )
        if one.not_valid_after_utc <= now:
            raise CredentialsError(
                f"the {what} in {place} expired on {_day(one.not_valid_after_utc)}: "
                + (renew if one is certificate else "create credentials in a new folder, and hand them out again")
            )
    return _common_name(certificate), min(certificate.not_valid_after_utc, issuer.not_valid_after_utc)


def expiry(certificate: bytes) -> datetime.datetime:
    """When a PEM certificate expires (UTC)."""
    return _read_certificates(certificate, "the certificate")[0].not_valid_after_utc


def hosts_of(certificate: bytes) -> tuple[str, ...]:
    """Names and IP addresses that a server's PEM certificate is good for."""
    names = _extension(_read_certificates(certificate, "the certificate")[0], x509.SubjectAlternativeName)
    if names is None:
        return ()
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def normalise_host(host: str) -> str:
    """Write a host as certificates do: a name in lower case, or an IP address in its short form.

    Raises UsageError if it is neither, or an address such as 0.0.0.0 that no client can connect to.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
        labels = name.split(".")
        if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdecimal():
            raise UsageError(
                f"{host!r} is no host name or IP address: give the name that clients connect to, without a port"
            ) from None
        return name
    if address.is_unspecified or "%" in host:
        raise UsageError(f"{host!r} is no address that clients can connect to: give the server's own name or address")
    return str(address)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    expires: datetime.datetime,
    *,
    authority: bool,
) -> x509.CertificateBuilder:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    usage = x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pem = serialization.Encoding.PEM
    return Pair(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _read_certificates(content: bytes, what: str) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise CredentialsError(f"{what} is not a readable PEM certificate: copy or create it again") from error


def _read_key(content: bytes, what: str) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CredentialsError(f"{what} is not a readable, unencrypted PEM key: copy or create it again") from error


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _allows(certificate: x509.Certificate, role: Role) -> bool:
    usage = _extension(certificate, x509.ExtendedKeyUsage)
    names = _extension(certificate, x509.SubjectAlternativeName)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names is not None else []
    return usage is not None and _USAGE[role] in usage and (role == "coordinator") == (COORDINATOR_URI in uris)


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _day(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d}"
