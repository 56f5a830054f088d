"""Flips every bit of a release, one at a time, removes every file and adds some, and counts what `verify` misses.

python benchmarks/tampering.py RELEASE --key PUBLIC.pem [--most BITS_PER_FILE]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from edgeship.calibration.errors import InputError
from edgeship.pipeline.releasing.verify import verify_release


def detected(folder: Path, key: Path) -> bool:
    try:
        return bool(verify_release(folder, key))
    except InputError:
        return True


def flips(folder: Path, key: Path, name: str, most: int) -> tuple[int, int]:
    """How many bits of a file were flipped, evenly spread, and how many flips were not detected."""
    path = folder / name
    content = path.read_bytes()
    count = min(8 * len(content), most)
    missed = 0
    for place in range(count):
        bit = place * 8 * len(content) // count
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        missed += not detected(folder, key)
    path.write_bytes(content)
    return count, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", type=Path)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--most", type=int, default=100_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(asked.release, Path(scratch) / "release"))
        if detected(folder, asked.key):
            sys.exit(f"{asked.release} is not whole to begin with")
        missed = 0
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            tried, lost = flips(folder, asked.key, name, asked.most)
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            gone = detected(folder, asked.key)
            (folder / name).write_bytes(content)
            missed += lost + (not gone)
            print(f"{name:<20} {tried:>7} bits flipped, {lost} missed; removed: {'detected' if gone else 'MISSED'}")
        for name in ("extra", ".hidden", "folder/extra"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
            found = detected(folder, asked.key)
            (folder / name).unlink()
            missed += not found
            print(f"{name:<20} added: {'detected' if found else 'MISSED'}")
    print(f"{missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
