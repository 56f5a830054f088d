"""Returns what is wrong with a release folder: files that are missing, changed or not its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Finding
from edgeship.pipeline.releasing.signature import SIGNATURE, check_signature
from edgeship.pipeline.workspace import artifacts_of, sha256_of, stage_folder_name, write_atomically

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over every file in `folder`, in the format of `sha256sum --check`."""
    sums = {each.path: each.sha256 for each in artifacts_of(folder) if each.path not in (SUMS, SIGNATURE)}
    write_atomically(folder / SUMS, _sums_text(sums))


def _sums_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def verify_release(folder: Path, key: Path | None = None) -> list[Finding]:
    """Every file of the release that is missing, changed or a link, and every file that is foreign; empty if whole.

    `key`: the public key that must have signed it. Without one a signature is looked for where the manifest speaks of
    one, but proves nothing. Raises InputError for a folder that is no release (without SHA256SUMS that can be read), or
    a key that is none.
    """
    if not folder.is_dir():
        raise InputError(f"there is no release folder {folder}")
    sums = _read_sums(folder / SUMS)
    findings = []
    for name, expected in sums.items():
        path = folder / name
        if path.is_symlink():
            continue  # found below
        if not path.is_file():
            findings.append(Finding(name, "the file is missing", accepted=f"sha256 {expected}"))
        elif (seen := sha256_of(path)) != expected:
            findings.append(Finding(name, "the file was changed", f"sha256 {seen}", f"sha256 {expected}"))
    own = {SUMS, SIGNATURE, *sums}
    findings += [_linked(folder, name) for name in sorted(own) if (folder / name).is_symlink()]
    extra = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_file(path))
    findings += [Finding(name, "the file is not part of the release") for name in extra if name not in own]
    if MANIFEST not in sums:
        findings.append(Finding(SUMS, f"does not list {MANIFEST}"))
    elif (folder / MANIFEST).is_file():
        findings += _check_manifest(folder / MANIFEST, sums)
    told = {finding.where for finding in findings} - {SIGNATURE}
    signature = [] if key is None else check_signature(folder, key)
    return findings + [finding for finding in signature if finding.where not in told]


def is_signed(folder: Path) -> bool:
    """Whether the folder has a signature, of whomever."""
    return (folder / SIGNATURE).is_file()


def _linked(folder: Path, name: str) -> Finding:
    """What is wrong with a link: what it leads to may be another file tomorrow, or on the next machine."""
    return Finding(name, "the file is a link", f"to {(folder / name).readlink()}", "the file itself")


def _is_file(path: Path) -> bool:
    """Whether it is something that may not lie there unknown: a file, or a link to anything."""
    return path.is_symlink() or not path.is_dir()


def _check_manifest(path: Path, sums: dict[str, str]) -> list[Finding]:
    try:
        manifest = json.loads(path.read_text())
        listed = {**manifest["artifacts"], **manifest.get("documents", {})}
        expected = {str(name): str(facts["sha256"]) for name, facts in listed.items()}
        signed = manifest.get("signature") is not None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [Finding(path.name, "cannot be read as a manifest", accepted="the manifest.json that edgeship wrote")]
    findings = [
        Finding(name, "the manifest and SHA256SUMS do not agree", f"sha256 {sums.get(name)}", f"sha256 {digest}")
        for name, digest in expected.items()
        if sums.get(name) != digest
    ]
    if signed != is_signed(path.parent):
        rule = "the signature is missing" if signed else f"{path.name} does not know the file"
        findings.append(Finding(SIGNATURE, rule))
    unknown = sorted(set(sums) - set(expected) - {path.name})
    return findings + [Finding(name, f"{path.name} does not know the file") for name in unknown]


def _read_sums(path: Path) -> dict[str, str]:
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        inner = path.parent / stage_folder_name("release")
        hint = f"; accepted: {inner}, the release of this run" if inner.is_dir() else ""
        raise InputError(f"{path.parent} is no release: it has no {SUMS}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/\\].*)", line)
        if not match or ".." in Path(match[2]).parts:
            raise InputError(f"{path}, line {number}: expected '<sha256>  <file>', seen {line[:80]!r}")
        sums[match[2]] = match[1]
    if not sums:
        raise InputError(f"{path} lists no files")
    if text != _sums_text(sums):
        raise InputError(f"{path} was changed: it is not as edgeship writes it")
    return sums
