"""An authority and a certificate, as cert-manager writes them into a Secret."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM = serialization.Encoding.PEM
NAMES = [x509.DNSName("dfx-scheduler"), x509.IPAddress(ip_address("127.0.0.1"))]


def certificates(folder: Path) -> None:
    """Write ca.crt, and tls.crt with tls.key, which serves both ends."""
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, subject = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("ca", "dfx"))
    now = datetime.now(UTC)

    def signed(name: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        made = x509.CertificateBuilder(
            issuer_name=issuer,
            subject_name=name,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(minutes=1),
            not_valid_after=now + timedelta(days=1),
        )
        made = made.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectAlternativeName(NAMES), critical=False)
        return made.sign(authority, hashes.SHA256()).public_bytes(PEM)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.crt").write_bytes(signed(issuer, authority, ca=True))
    (folder / "tls.crt").write_bytes(signed(subject, own, ca=False))
    key = own.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(key)
