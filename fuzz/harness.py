"""Runs a target: by atheris (coverage-guided) where it is installed, else by random changes of the seeds.

python -m fuzz.fuzz_typed -max_total_time=600
python -m fuzz.fuzz_typed path/of/a/crash
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
VECTORS = HERE.parent / "schema" / "vectors"

OneInput = Callable[[bytes], None]


def vectors() -> list[dict[str, str]]:
    """Return all test vectors, valid and invalid: the seeds that every target is made of."""
    files = (json.loads((VECTORS / name).read_text()) for name in ("valid.json", "invalid.json"))
    return [test for document in files for test in document["tests"]]


def corpus(name: str) -> list[bytes]:
    """Return what earlier runs found for a target: inputs that reach new code, and crashes that were fixed."""
    return [path.read_bytes() for path in sorted((HERE / "corpus" / name).glob("*")) if path.is_file()]


def main(name: str, one_input: OneInput, seeds: Iterable[bytes]) -> None:
    """Run a target from the command line."""
    seeds = [*seeds, *corpus(name)]
    files = [Path(arg) for arg in sys.argv[1:] if not arg.startswith("-") and Path(arg).is_file()]
    if files:
        for path in files:
            one_input(path.read_bytes())
            print(f"{path}: no crash")
        return
    try:
        import atheris
    except ImportError:
        _random_run(name, one_input, seeds)
        return
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            Path(folder, sha256(seed).hexdigest()[:16]).write_bytes(seed)
        found = [arg for arg in sys.argv[1:] if not arg.startswith("-")]  # where new inputs go
        options = [arg for arg in sys.argv[1:] if arg.startswith("-")]
        words = HERE / "words.dict"
        atheris.Setup(
            [sys.argv[0], *options, f"-dict={words}", "-timeout=10", "-rss_limit_mb=2048", *found, folder], one_input
        )
        atheris.Fuzz()


def _random_run(name: str, one_input: OneInput, seeds: list[bytes]) -> None:
    seconds = next((float(arg.partition("=")[2]) for arg in sys.argv if arg.startswith("-max_total_time=")), 60.0)
    source, end, count = random.Random(0), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = changed(source, seeds)
        try:
            one_input(data)
        except BaseException:
            path = Path(f"crash-{name}-{sha256(data).hexdigest()[:16]}")
            path.write_bytes(data)
            print(f"crash: {path}")
            raise
        count += 1
    print(f"{count} inputs, no crash")


_WORDS = [
    line[1:-1].encode()
    for line in (HERE / "words.dict").read_text().splitlines()
    if line.startswith('"') and "\\" not in line
]


def changed(source: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with a few changes: bytes flipped, cut, doubled, words put in, seeds spliced."""
    data = bytearray(source.choice(seeds))
    for _ in range(source.randint(0, 4)):
        at = source.randint(0, len(data))
        to = min(len(data), at + source.randint(1, 16))
        match source.randint(0, 5):
            case 0 if data:
                data[at % len(data)] = source.randint(0, 255)
            case 1:
                del data[at:to]
            case 2:
                data[at:at] = data[at:to]
            case 3:
                data[at:to] = source.choice(_WORDS)
            case 4:
                data[at:] = source.choice(seeds)[at:]
            case _:
                data[at:at] = source.randbytes(source.randint(1, 4))
    return bytes(data)
