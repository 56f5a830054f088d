"""Returns signatures of release folders, and what is wrong with one: OpenSSF Model Signing with an elliptic-curve key.

The signature is a Sigstore bundle over the SHA-256 of every file but itself. Keys stay where they are; nothing is
asked of a network. Of the bundle's text too, not one bit may differ: JSON and base64 can say the same in several ways,
so a bundle is accepted in the one form that the signer writes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Finding
from edgeship.pipeline.workspace import sha256_of

if TYPE_CHECKING:
    from model_signing import hashing

SIGNATURE = "model.sig"
KEY_VARIABLE = "EDGESHIP_SIGNING_KEY"
INSTALL = "pip install 'edgeship[release]'"
ACCEPTED = "a PEM file with a private key on the curve P-256, P-384 or P-521, without a password"


def check_key(key: Path) -> str:
    """SHA-256 of the public half of a private key, as signatures name it. Raises InputError for an unusable file."""
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except OSError as error:
        raise InputError(f"the signing key {key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"the signing key {key} cannot be used: {error}; accepted: {ACCEPTED}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in (
        *("secp256r1", "secp384r1", "secp521r1"),
    ):
        raise InputError(f"the signing key {key} is of another kind; accepted: {ACCEPTED}")
    return _digest(private.public_key())


def sign(folder: Path, key: Path) -> None:
    """Writes `model.sig` over every other file of the folder. Raises InputError for an unusable key."""
    check_key(key)
    signing = _library().signing
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_hashing(folder))
        config.sign(folder, folder / SIGNATURE)
    except (OSError, ValueError) as error:
        raise StageError(f"release: signing failed: {error}") from error


def check_signature(folder: Path, key: Path) -> list[Finding]:
    """What is wrong with the signature of a folder; empty when it is that of the public key's owner.

    Raises InputError for a file that holds no public key.
    """
    digest = _public_digest(key)
    path = folder / SIGNATURE
    if not path.is_file():
        return [Finding(SIGNATURE, "the release is not signed", accepted=f"a signature by the key of {key.name}")]
    problem = _form(path, digest)
    if problem:
        return [problem]
    verifying = _library().verifying
    config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints its warnings
            config.verify(folder, path)
    except Exception as error:
        return _differences(folder, path) or [_unexplained(error)]
    return []


def _differences(folder: Path, path: Path) -> list[Finding]:
    """Each signed file that is missing or is not as the signature's statement has it."""
    try:
        statement = json.loads(base64.b64decode(json.loads(path.read_text())["dsseEnvelope"]["payload"]))
        signed = {str(each["name"]): str(each["digest"]) for each in statement["predicate"]["resources"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found = {name: sha256_of(folder / name) for name in sorted(signed) if (folder / name).is_file()}
    missing = [
        Finding(name, "the signed file is missing", "", f"sha256 {signed[name]}") for name in signed.keys() - found
    ]
    return missing + [
        Finding(name, "is not the file that was signed", f"sha256 {seen}", f"sha256 {signed[name]}")
        for name, seen in found.items()
        if seen != signed[name]
    ]


def _unexplained(error: Exception) -> Finding:
    said = " ".join(str(error).split()) or type(error).__name__
    return Finding(SIGNATURE, "is not a signature of these files by this key", said[:300])


def _form(path: Path, digest: str) -> Finding | None:
    """What the bundle's text has that the signer would not have written."""
    accepted = "the bundle that edgeship wrote"
    try:
        text = path.read_text()
        bundle: dict[str, Any] = json.loads(text)
        envelope = bundle["dsseEnvelope"]
        payload, signature = envelope["payload"], envelope["signatures"][0]["sig"]
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        canonical = all(base64.b64encode(base64.b64decode(part)).decode() == part for part in (payload, signature))
    except (OSError, ValueError, KeyError, IndexError, TypeError, binascii.Error) as error:
        return Finding(SIGNATURE, "cannot be read as a signature", str(error), accepted)
    if hint != digest:
        return Finding(
            SIGNATURE, "was made with another key", f"public key sha256 {hint}", f"public key sha256 {digest}"
        )
    written = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": digest}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": payload,
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": signature, "keyid": ""}],
        },
    }
    if not canonical or json.dumps(written, separators=(",", ":")) != text:
        return Finding(SIGNATURE, "the bundle's text was changed", accepted=accepted)
    return None


def _public_digest(key: Path) -> str:
    _library()
    from cryptography.hazmat.primitives import serialization

    try:
        return _digest(serialization.load_pem_public_key(key.read_bytes()))
    except OSError as error:
        raise InputError(f"the public key {key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"the public key {key} cannot be used: {error}; accepted: a public key as PEM") from None


def _digest(public: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


def _hashing(folder: Path) -> hashing.Config:
    config: hashing.Config = _library().hashing.Config()
    return config.set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(f"signatures need model-signing, which is not installed; {INSTALL}") from error
    return model_signing
