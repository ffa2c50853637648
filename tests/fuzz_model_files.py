"""Model files with random damage: each is refused in words, or read as what was written.

``python tests/fuzz_model_files.py [--n 100000] [--seed 0] [--large 200]`` prints how many were
refused, read as they were (damage that changes nothing, as spaces in JSON), silently different,
crashed, or not done within ten seconds, and the longest time one took. Of ``--large`` damaged
copies of a larger file, in which arrays are most, it prints the most memory that one took.
"""

import argparse
import json
import signal
import struct
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from helpers import fingerprint, small_counts, small_fit

from scuvae import get, io

LONGEST = 10  # seconds


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One of eleven kinds of damage, at places that matter as often as any."""
    changed = bytearray(data)
    length = struct.unpack("<Q", data[:8])[0]
    ends = [8, 8 + length, len(data)]
    begin, end = [(0, ends[0]), (8, ends[1]), (ends[1], ends[2])][rng.choice(3, p=[0.1, 0.5, 0.4])]
    at = int(rng.integers(begin, end))
    size = int(rng.integers(1, 64))
    match rng.integers(11):
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
            digits = [i for i in range(8, min(ends[1], 50_000)) if 48 <= data[i] < 58]
            changed[digits[int(rng.integers(len(digits)))]] = 48 + int(rng.integers(10))
        case 9:
            return _with_another_header(data, length, rng)
        case 10:  # a header that is all of the file, more than it, or nothing
            claimed = [len(data) - 8, len(data), 2**31, 2**63, 2**64 - 1, 0][int(rng.integers(6))]
            changed[:8] = struct.pack("<Q", claimed)
    return bytes(changed)


def _with_another_header(data: bytes, length: int, rng: np.random.Generator) -> bytes:
    """Entries that change places, go, are there twice or renamed; other shapes, other settings."""
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names, 2, replace=False)
    twice = ""
    match rng.integers(8):
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
        case 4:
            header[f"{a}{chr(int(rng.integers(32, 1000)))}"] = header.pop(a)
        case 5:
            twice = f"{json.dumps(str(a))}: {json.dumps(header[b])}, "
        case 6:  # of sizes that no memory holds, or of other numbers of axes
            shape = [int(2 ** rng.integers(0, 64)) for _ in range(rng.integers(0, 10))]
            header[a]["shape"] = shape
            if rng.integers(2):
                stop = header[a]["data_offsets"][0] + 4 * int(np.prod(shape, dtype=object))
                header[a]["data_offsets"][1] = stop
        case 7:  # the same bytes as another shape or of another kind
            if rng.integers(2):
                header[a]["shape"] = [int(np.prod(header[a]["shape"], dtype=int))]
            else:
                header[a]["dtype"] = str(rng.choice(["F64", "F16", "I32", "U8", "BOOL", "F8", ""]))
    encoded = f"{{{twice}{json.dumps(header)[1:]}".encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What takes longer is a ``TimeoutError``."""

    def over(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def written(path: Path, **options: int) -> bytes:
    """A model file; ``options`` are numbers of genes and units."""
    adata = small_counts(n_vars=options["n_vars"])
    io.write_model(path, small_fit(adata, n_hidden=options["n_hidden"], batch_key="batch"))
    return path.read_bytes()


def mutate_and_read(folder: Path, n: int, seed: int) -> Counter[str]:
    """How many of ``n`` damaged files were what; ``slowest`` is in milliseconds."""
    path = folder / "model.scuvae"
    data, rng = written(path, n_vars=8, n_hidden=4), np.random.default_rng(seed)
    expected = fingerprint(io.read_model(path).uns)
    counts: Counter[str] = Counter(slowest=0)
    for _ in range(n):
        path.write_bytes(damaged(data, rng))
        start = perf_counter()
        try:
            with within(LONGEST):
                found = io.read_model(path)
                get.model(found)
        except ValueError:
            counts["refused"] += 1
        except TimeoutError:
            counts["hung"] += 1
        except Exception as error:
            counts["crashed"] += 1
            print(type(error).__name__, error, file=sys.stderr)
        else:
            same = fingerprint(found.uns) == expected
            counts["read as written" if same else "silently different"] += 1
        counts["slowest"] = max(counts["slowest"], round(1e3 * (perf_counter() - start)))
    return counts


def most_memory(folder: Path, n: int, seed: int, n_vars: int = 4000) -> float:
    """The most that reading one of ``n`` damaged files, or the whole one, took.

    In sizes of what is read, of those cut short in MiB.
    """
    path = folder / "large.scuvae"
    data, rng = written(path, n_vars=n_vars, n_hidden=128), np.random.default_rng(seed)
    most = 0.0
    for number in range(n + 1):
        changed = damaged(data, rng) if number else data
        path.write_bytes(changed)
        tracemalloc.start()
        try:
            io.read_model(path)
        except ValueError:
            pass
        finally:
            most = max(most, tracemalloc.get_traced_memory()[1] / max(len(changed), 2**20))
            tracemalloc.stop()
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = mutate_and_read(Path(folder), args.n, args.seed)
        for name, count in sorted(counts.items()):
            print(f"{name:>20} {count:>9,}{' ms' if name == 'slowest' else ''}", flush=True)
        most = most_memory(Path(folder), args.large, args.seed)
    print(f"{'memory':>20} {most:>9.2f} × the file's size, of {args.large} larger files")


if __name__ == "__main__":
    main()
