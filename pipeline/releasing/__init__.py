"""What a release holds beside its artifacts: model card, bill of materials, checksums, signature; and their check."""
