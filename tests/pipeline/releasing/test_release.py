"""A signed release of a tiny model: nothing in it can change unnoticed, and what it says of itself is true."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from edgeship.calibration.errors import InputError
from edgeship.pipeline.releasing.sbom import make_sbom
from edgeship.pipeline.releasing.signature import KEY_VARIABLE, check_key, check_signature, sign
from edgeship.pipeline.releasing.verify import verify_release, write_sums
from projects import run, write_project

MORE = """
evaluation = "tiny.npz"
[quantize]
samples = 16
[targets.onnxruntime]
[benchmark]
runs = 4
warmup = 0
[release]
version = "1.2.0"
author = "A. Nyone"
license = "Apache-2.0"
description = "Tells five classes apart."
labels = "labels.txt"
"""
FILES = ["MODEL_CARD.md", "SHA256SUMS", "manifest.json", "model.onnx", "model.sig", "sbom.cdx.json"]
pytestmark = pytest.mark.xdist_group("release")  # one deployment for all of them
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def write_keys(folder: Path) -> Path:
    """Writes private.pem and public.pem."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "private.pem").write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, bytes], tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_models["plain"], tiny_data, MORE)
    (folder / "labels.txt").write_text("".join(f"class {i}\n" for i in range(5)))
    return folder


@pytest.fixture(scope="module")
def released(project: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signed") / "run"
    result = run("deploy", project / "recipe.toml", "--out", out, "--sign", keys / "private.pem")
    assert result.exit_code == 0, result.output
    return out / "9-release"


@pytest.fixture
def release(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "release"))


def is_detected(folder: Path, key: Path) -> bool:
    try:
        return bool(verify_release(folder, key))
    except InputError:
        return True


def test_a_release_is_whole_wherever_it_is_copied(release: Path, keys: Path) -> None:
    assert sorted(path.name for path in release.iterdir()) == FILES
    assert verify_release(release) == []
    assert verify_release(release, keys / "public.pem") == []
    result = run("verify", release, "--key", keys / "public.pem")
    assert (result.exit_code, "signed by the key of public.pem" in result.stdout) == (0, True)
    assert "its signature was not checked" in run("verify", release).stdout
    facts = json.loads(run("verify", release, "--json").stdout)
    assert (facts["whole"], facts["signature"]) == (True, "not checked")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_detected(release: Path, keys: Path, name: str) -> None:
    path = release / name
    content = path.read_bytes()
    step = max(len(content) // 24, 1)
    places = sorted({*range(0, len(content), step), len(content) - 1, len(content) - 2})
    missed = []
    for place in places:
        bit = place % 8
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
        if not is_detected(release, keys / "public.pem"):
            missed.append((place, bit))
    assert missed == []


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.sig"])
def test_a_line_end_or_a_blank_that_reads_the_same_is_detected(release: Path, keys: Path, name: str) -> None:
    content = (release / name).read_bytes()
    for changed in (content + b"\n", content.replace(b"\n", b"\r\n"), content.replace(b",", b", "), content.strip()):
        if changed != content:
            (release / name).write_bytes(changed)
            assert is_detected(release, keys / "public.pem")


def test_unused_bits_of_base64_are_part_of_the_signature(release: Path, keys: Path) -> None:
    path = release / "model.sig"
    text = path.read_text()
    for end in ("==", "="):
        at = text.find(f'{end}"')
        if at > 0:
            path.write_text(text[: at - 1] + chr(ord(text[at - 1]) + 1) + text[at:])
            assert is_detected(release, keys / "public.pem")
            path.write_text(text)


@pytest.mark.parametrize("name", FILES)
def test_every_missing_file_is_detected(release: Path, keys: Path, name: str) -> None:
    (release / name).unlink()
    assert is_detected(release, keys / "public.pem")
    assert is_detected(release, keys / "public.pem") == (run("verify", release).exit_code != 0)


@pytest.mark.parametrize("name", ["extra.txt", ".gitignore", "sub/extra.bin", "model.sig2"])
def test_every_extra_file_is_detected(release: Path, keys: Path, name: str) -> None:
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_text("x")
    assert is_detected(release, keys / "public.pem")
    assert run("verify", release).exit_code == 1


def test_an_extra_link_is_detected(release: Path, tmp_path: Path) -> None:
    (release / "link").symlink_to(tmp_path, target_is_directory=True)
    assert [finding.where for finding in verify_release(release)] == ["link"]


def test_a_changed_file_is_named_once_with_the_digests_in_hexadecimal(release: Path, keys: Path) -> None:
    card = release / "MODEL_CARD.md"
    before = hashlib.sha256(card.read_bytes()).hexdigest()
    card.write_text(card.read_text() + "more")
    after = hashlib.sha256(card.read_bytes()).hexdigest()
    (finding,) = verify_release(release, keys / "public.pem")
    assert (finding.where, finding.seen, finding.accepted) == (card.name, f"sha256 {after}", f"sha256 {before}")


def test_what_was_changed_together_with_the_checksums_is_not_what_was_signed(release: Path, keys: Path) -> None:
    """The sums and the manifest agree with the changed file: the signature alone tells."""
    card, manifest = release / "MODEL_CARD.md", release / "manifest.json"
    digest = hashlib.sha256(card.read_bytes()).hexdigest()
    card.write_text(card.read_text() + "more")
    manifest.write_text(manifest.read_text().replace(digest, hashlib.sha256(card.read_bytes()).hexdigest()))
    write_sums(release)
    assert verify_release(release) == []
    found = {finding.where: finding for finding in verify_release(release, keys / "public.pem")}
    assert sorted(found) == ["MODEL_CARD.md", "SHA256SUMS", "manifest.json"]
    assert found["MODEL_CARD.md"].accepted == f"sha256 {digest}"


def test_another_key_is_refused_even_by_whoever_signs_again(release: Path, keys: Path, tmp_path: Path) -> None:
    others = write_keys(tmp_path / "others")
    (finding,) = check_signature(release, others / "public.pem")
    assert finding.rule == "was made with another key"
    (release / "model.onnx").write_bytes(b"evil")
    (release / "model.sig").unlink()
    write_sums(release)
    sign(release, others / "private.pem")
    assert "was made with another key" in [f.rule for f in verify_release(release, keys / "public.pem")]


def test_a_release_is_the_same_bytes_from_another_path_on_another_date(
    released: Path, project: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Path(shutil.copytree(project, tmp_path / "a" / "longer path"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 400 * 86400)
    result = run("deploy", elsewhere / "recipe.toml", "--out", tmp_path / "out", "--sign", keys / "private.pem")
    assert result.exit_code == 0, result.output
    other = tmp_path / "out" / "9-release"
    assert sorted(path.name for path in other.iterdir()) == FILES
    differ = [name for name in FILES if (other / name).read_bytes() != (released / name).read_bytes()]
    assert differ == ["model.sig"]  # ECDSA draws a random number for each signature
    assert verify_release(other, keys / "public.pem") == []


def test_the_private_key_is_nowhere_in_the_run(released: Path, keys: Path) -> None:
    secret = (keys / "private.pem").read_bytes()
    body = b"".join(secret.splitlines()[1:-1])
    for path in released.parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert body[:40] not in content
            assert str(keys).encode() not in content or path.parent.name == ".edgeship"


def test_the_bill_of_materials_is_valid_and_names_every_artifact(released: Path) -> None:
    text = (released / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert "timestamp" not in document["metadata"]
    models = {c["name"]: c for c in document["components"] if c["type"] == "machine-learning-model"}
    digest = hashlib.sha256((released / "model.onnx").read_bytes()).hexdigest()
    assert models["model.onnx"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert models["model.onnx"]["licenses"] == [{"license": {"acknowledgement": "declared", "id": "Apache-2.0"}}] or (
        models["model.onnx"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    )
    assert models["model.onnx"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    purls = [c.get("purl", "") for c in document["components"]]
    assert any(purl.startswith("pkg:pypi/onnxruntime@") for purl in purls)


def test_the_bill_of_materials_is_the_same_every_time_and_another_for_other_contents() -> None:
    artifact = {"target": "tflite", "sha256": "ab" * 32, "bytes": 1}
    manifest = {"name": "m", "artifacts": {"model.tflite": artifact}, "versions": {"python": "3.11", "numpy": "2.1"}}
    first = make_sbom(manifest, {}, {})
    assert make_sbom(manifest, {}, {}) == first
    other = {**manifest, "artifacts": {"model.tflite": {**artifact, "sha256": "cd" * 32}}}
    assert json.loads(make_sbom(other, {}, {}))["serialNumber"] != json.loads(first)["serialNumber"]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(first) is None


def test_the_card_says_what_a_user_needs(released: Path) -> None:
    card = (released / "MODEL_CARD.md").read_text()
    for said in ("# tiny", "Tells five classes apart.", "version: 1.2.0", "license: Apache-2.0", "class 0, class 1"):
        assert said in card
    assert "| model.onnx | onnxruntime |" in card
    assert "- input of model.onnx: image: float 1 x 3 x 12 x 12" in card
    samples = json.loads((released.parent / "4-quantize" / "plan.json").read_text())["samples"]
    assert f"ranges: minmax, {samples} calibration samples" in card
    assert "The samples came as arrays" in card


def _rsa(folder: Path) -> Path:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "rsa.pem").write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    return folder / "rsa.pem"


def _locked(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "locked.pem").write_bytes(key.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"secret")))
    return folder / "locked.pem"


def _nonsense(folder: Path) -> Path:
    (folder / "nonsense.pem").write_text("not a key")
    return folder / "nonsense.pem"


@pytest.mark.parametrize("make", [_rsa, _locked, _nonsense, lambda folder: folder / "missing.pem"])
def test_a_key_that_cannot_sign_is_refused_before_the_first_stage(
    make: Callable[[Path], Path], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make(tmp_path)
    with pytest.raises(InputError, match=r"the signing key .* (cannot be|is of another kind)"):
        check_key(key)
    monkeypatch.setenv(KEY_VARIABLE, str(key))
    result = run("deploy", project / "recipe.toml", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert not (tmp_path / "run" / "2-export").exists()
