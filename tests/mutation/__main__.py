"""Mutation testing of the trust core with mutmut: ``python -m tests.mutation [module ...]``.

Works on a copy, since mutmut writes into the folder that it runs in, and prints every mutant that survived as a
difference. ``docs/explanation/mutation.md`` argues about those. Needs ``pip install mutmut``; some 40 minutes on two cores.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Module, and the tests that mutmut runs for it. It runs only those that reach the mutated function.
TESTS = {
    "token": ["unit/test_token.py", "unit/test_keys.py", "unit/test_mutants.py"],
    "keys": ["unit/test_token.py", "unit/test_keys.py", "unit/test_mutants.py"],
    "signing": ["unit/test_signing.py", "unit/test_keys.py", "adversarial/test_policy.py", "unit/test_mutants.py"],
    "refs": ["unit/test_refs.py", "unit/test_policy.py", "adversarial/test_policy.py", "unit/test_mutants.py"],
    "policy": ["unit/test_refs.py", "unit/test_policy.py", "adversarial/test_policy.py", "unit/test_mutants.py"],
}


def config(modules):
    tests = dict.fromkeys(test for module in modules for test in TESTS[module])
    values = {
        "source_paths": ["safedefer"],
        "only_mutate": [f"safedefer/{module}.py" for module in modules],
        "also_copy": ["safedefer", "tests", "schema", "fuzz", "pyproject.toml"],
        "pytest_add_cli_args_test_selection": [f"tests/{test}" for test in tests],
        "pytest_add_cli_args": ["-q", "-x", "-pno:cacheprovider", "-pno:xdist"],
    }
    lines = (f"{name}=\n" + "".join(f"    {item}\n" for item in items) for name, items in values.items())
    return "[mutmut]\n" + "".join(lines)


def main(*modules):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "copy")
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "node_modules", ".venv*", "mutants")
        shutil.copytree(ROOT, folder, ignore=ignored)
        (folder / "setup.cfg").write_text(config(modules or TESTS))
        mutmut = shutil.which("mutmut", path=str(Path(sys.executable).parent)) or "mutmut"
        subprocess.run([mutmut, "run", "--max-children", "2"], cwd=folder, check=True)
        found = subprocess.run([mutmut, "results"], cwd=folder, capture_output=True, text=True, check=True).stdout
        for line in found.splitlines():
            name = line.strip().partition(":")[0]
            shown = subprocess.run(
                [mutmut, "show", name], cwd=folder, capture_output=True, text=True, check=False
            ).stdout
            changes = [each for each in shown.splitlines() if each[:1] in "+-" and each[:3] not in {"---", "+++"}]
            print(name, *changes, sep="\n    ")


if __name__ == "__main__":
    main(*sys.argv[1:])
