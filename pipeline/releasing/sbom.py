"""Returns a release's bill of materials: CycloneDX, with the artifacts as machine-learning models.

What CycloneDX calls `modelCard` is added to the library's document, which has no class for it; the schema has. Neither
a time nor a random number is in it: the serial number is a UUID of the contents (RFC 9562, version 5).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

SBOM = "sbom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:edgeship:release")


def make_sbom(manifest: Mapping[str, Any], facts: Mapping[str, Any], cards: Mapping[str, Any]) -> str:
    """The JSON document for a release with this manifest.

    `facts`: the recipe's [release] table; `cards`: the CycloneDX model card of each artifact by its file name.
    """
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.contact import OrganizationalContact
    from cyclonedx.output.json import JsonV1Dot6

    digest = json.dumps(manifest, sort_keys=True)
    release = Component(
        name=manifest["name"],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=facts.get("version"),
        description=facts.get("description"),
        authors=[OrganizationalContact(name=facts["author"])] if facts.get("author") else [],
        licenses=_licenses(facts),
        bom_ref=f"release:{manifest['name']}",
    )
    artifacts = [_artifact(name, artifact, facts) for name, artifact in sorted(manifest["artifacts"].items())]
    libraries = [_library(name, version) for name, version in sorted(manifest["versions"].items())]
    bom = Bom(
        components=[*artifacts, *libraries],
        metadata=BomMetaData(component=release),
        serial_number=uuid.uuid5(_NAMESPACE, digest),
    )
    bom.register_dependency(release, artifacts)
    for artifact in artifacts:
        bom.register_dependency(artifact, libraries)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"].pop("timestamp", None)
    for component in document["components"]:
        if component["name"] in cards and component["type"] == "machine-learning-model":
            component["modelCard"] = cards[component["name"]]
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _artifact(name: str, artifact: Mapping[str, Any], facts: Mapping[str, Any]) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=facts.get("version"),
        licenses=_licenses(facts),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=artifact["sha256"])],
        properties=[
            Property(name="edgeship:target", value=str(artifact["target"])),
            Property(name="edgeship:bytes", value=str(artifact["bytes"])),
        ],
        bom_ref=f"artifact:{name}",
    )


def _library(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    is_python = name == "python"
    return Component(
        name=name,
        version=version,
        type=ComponentType.PLATFORM if is_python else ComponentType.LIBRARY,
        purl=None if is_python else PackageURL("pypi", name=name, version=version),
        bom_ref=f"library:{name}@{version}",
    )


def _licenses(facts: Mapping[str, Any]) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    text = facts.get("license")
    return [LicenseFactory().make_from_string(text)] if text else []


def model_card(target: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The CycloneDX model card of an artifact: what it takes and gives, and how well it did."""
    metrics = [{"type": name, "value": f"{value:g}"} for name, value in target["metrics"].items() if value is not None]
    return {
        "modelParameters": {
            "inputs": [{"format": f"{name} {shape}"} for name, shape in inputs.items()],
            "outputs": [{"format": f"{name} {shape}"} for name, shape in outputs.items()],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
    }
