"""Model files with random damage: each is refused in words, or read as what was written.

``python tests/fuzz_model_files.py [--n 100000] [--seed 0]`` prints how many were
refused, read as they were (damage that changes nothing, as spaces in JSON), silently different, or
crashed, and the longest time one took.
"""

import argparse
import json
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from helpers import fingerprint, small_counts, small_fit

from scuvae import get, io


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One of ten kinds of damage, at places that matter as often as any."""
    changed = bytearray(data)
    length = struct.unpack("<Q", data[:8])[0]
    ends = [8, 8 + length, len(data)]
    begin, end = [(0, ends[0]), (8, ends[1]), (ends[1], ends[2])][rng.choice(3, p=[0.1, 0.5, 0.4])]
    at = int(rng.integers(begin, end))
    size = int(rng.integers(1, 64))
    match rng.integers(10):
        case 0:
            changed[at] ^= 1 << int(rng.integers(8))
        case 1:
            changed[at] = int(rng.integers(256))
        case 2:
            changed[at : at + size] = rng.bytes(size)
        case 3:
            del changed[at : at + size]
        case 4:
            changed[at:at] = rng.bytes(size)
        case 5:
            del changed[at:]
        case 6:
            changed[at : at + size] = bytes(size)
        case 7:  # one piece for another
            other = int(rng.integers(0, len(data)))
            changed[at : at + size] = data[other : other + size]
        case 8:  # a digit for another, in the header
            digits = [i for i in range(8, ends[1]) if 48 <= data[i] < 58]
            changed[digits[int(rng.integers(len(digits)))]] = 48 + int(rng.integers(10))
        case 9:
            return _reordered(data, length, rng)
    return bytes(changed)


def _reordered(data: bytes, length: int, rng: np.random.Generator) -> bytes:
    """Entries of the header, or of the manifest, that change places, or go."""
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names, 2, replace=False)
    match rng.integers(4):
        case 0:
            header[a], header[b] = header[b], header[a]
        case 1:
            header[a] = header[b]
        case 2:
            del header[a]
        case 3:
            text = json.loads(header["__metadata__"]["scuvae"])
            part = text["settings"] if rng.integers(2) else text["manifest"]["arrays"]
            a, b = rng.choice(list(part), 2, replace=False)
            part[a], part[b] = part[b], part[a]
            header["__metadata__"]["scuvae"] = json.dumps(text)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def mutate_and_read(folder: Path, n: int, seed: int) -> Counter[str]:
    """How many of ``n`` damaged files were what; ``slowest`` is in milliseconds."""
    path = folder / "model.scuvae"
    io.write_model(path, small_fit(small_counts(n_vars=8), n_hidden=4, batch_key="batch"))
    data, rng = path.read_bytes(), np.random.default_rng(seed)
    expected = fingerprint(io.read_model(path).uns)
    counts: Counter[str] = Counter(slowest=0)
    for _ in range(n):
        changed = damaged(data, rng)
        path.write_bytes(changed)
        start = perf_counter()
        try:
            found = io.read_model(path)
            get.model(found)
        except ValueError:
            counts["refused"] += 1
        except Exception as error:
            counts["crashed"] += 1
            print(type(error).__name__, error, file=sys.stderr)
        else:
            same = fingerprint(found.uns) == expected
            counts["read as written" if same else "silently different"] += 1
        counts["slowest"] = max(counts["slowest"], round(1e3 * (perf_counter() - start)))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = mutate_and_read(Path(folder), args.n, args.seed)
    for name, count in sorted(counts.items()):
        print(f"{name:>20} {count:>9,}{' ms' if name == 'slowest' else ''}")


if __name__ == "__main__":
    main()
