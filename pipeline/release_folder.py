"""Returns what is wrong with a release folder: files that are missing, changed or not its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Finding
from edgeship.pipeline.workspace import artifacts_of, sha256_of, write_atomically

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over every file in `folder`, in the format of `sha256sum --check`."""
    lines = [f"{artifact.sha256}  {artifact.path}\n" for artifact in artifacts_of(folder) if artifact.path != SUMS]
    write_atomically(folder / SUMS, "".join(lines))


def verify_release(folder: Path) -> list[Finding]:
    """Every file of the release that is missing or changed, and every file that is not part of it; empty if whole.

    Raises InputError for a folder that is no release: without a manifest or SHA256SUMS that can be read.
    """
    if not folder.is_dir():
        raise InputError(f"there is no release folder {folder}")
    sums = _read_sums(folder / SUMS)
    findings = []
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            findings.append(Finding(name, "the file is missing", accepted=f"sha256 {expected}"))
        elif (seen := sha256_of(path)) != expected:
            findings.append(Finding(name, "the file was changed", f"sha256 {seen}", f"sha256 {expected}"))
    own = {SUMS, *sums}
    extra = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    findings += [Finding(name, "the file is not part of the release") for name in extra if name not in own]
    if MANIFEST not in sums:
        findings.append(Finding(SUMS, f"does not list {MANIFEST}"))
    elif (folder / MANIFEST).is_file():
        findings += _check_manifest(folder / MANIFEST, sums)
    return findings


def _check_manifest(path: Path, sums: dict[str, str]) -> list[Finding]:
    try:
        manifest = json.loads(path.read_text())
        expected = {str(name): str(facts["sha256"]) for name, facts in manifest["artifacts"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [Finding(path.name, "cannot be read as a manifest", accepted="the manifest.json that edgeship wrote")]
    findings = [
        Finding(name, "the manifest and SHA256SUMS do not agree", f"sha256 {sums.get(name)}", f"sha256 {digest}")
        for name, digest in expected.items()
        if sums.get(name) != digest
    ]
    unknown = sorted(set(sums) - set(expected) - {path.name})
    return findings + [Finding(name, f"{path.name} does not know the file") for name in unknown]


def _read_sums(path: Path) -> dict[str, str]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no release: it has no {SUMS}") from None
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
    return sums
