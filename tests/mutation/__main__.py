"""Mutation testing of the trust core with mutmut's mutants: ``python -m tests.mutation [module ...]``.

In a copy of the checkout:

1. Every mutant, in a fork of one pytest that has collected the quick tests (``tests/mutation/forks.py``).
2. What survived is parted: a change of nothing but an error's message, or of the type that ``cast`` is told, is counted
   and shown; nothing else about it can differ. For such a mutant some of the tests are enough.
3. Whatever else survived runs in forks again, with more tests; and, if module-level code of the tests reaches its
   function, in a pytest of its own that is started with the mutant.

Prints every survivor as a difference. ``docs/explanation/mutation.md`` argues about those. Needs ``pip install mutmut``
(3.8, of which it calls inner functions). Some ten minutes of one core.
"""

import argparse
import ast
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("token", "keys", "signing", "refs", "policy", "policy_cache", "callables/policy_patterns")

QUICK = [
    "unit/test_mutants.py", "unit/test_token.py", "unit/test_keys.py", "unit/test_signing.py", "unit/test_refs.py",
    "unit/test_policy.py", "unit/test_policy_cache.py", "adversarial/test_policy.py", "adversarial/test_capabilities.py",
]  # fmt: skip
MORE = [
    "adversarial/test_inheritance.py", "unit/test_typed_refused.py", "unit/test_typed_accepted.py", "unit/test_execution.py",
    "unit/test_settings.py", "unit/test_wrappers.py", "unit/test_typed_packs.py", "test_schema.py",
]  # fmt: skip
#: The most tests that are run for a mutant which changes words alone.
ENOUGH = 60
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=native", "-pno:cacheprovider", "-pno:xdist"]


def mutate(folder, modules):
    """Put the mutants of the modules in their place and return, by name, the functions as they were and are."""
    changed = {}
    os.chdir(folder)
    Path("setup.cfg").write_text("[mutmut]\nsource_paths=\n    safedefer\n")
    for module in modules:
        path = Path("safedefer", f"{module}.py")
        mutated = mutate_file_contents(str(path), path.read_text())
        path.write_text(mutated.code)
        found = {each.name: each for each in ast.walk(ast.parse(mutated.code)) if isinstance(each, ast.FunctionDef)}
        for name in mutated.mutant_names:
            original = found[name.rpartition("__mutmut_")[0] + "__mutmut_orig"]
            changed[get_mutant_name(path, name)] = original, found[name]
    return changed


ALL = slice(None)
#: Which arguments of a call are for readers alone, by the name of a function or of one of ``callables.refusals``. An
#: exception's is its first. Of a refusal, what decides its slug or is a field of it is not among them.
WORDS = {
    "_deny": slice(2),
    "cast": slice(1),
    **dict.fromkeys(
        (
            "local_class", "nested_class", "metaclass", "makes_class", "special_function", "overridden_classmethod",
            "missing_member", "special_method", "mangled_member", "long_member", "foreign_member", "not_ascii", "long_name",
            "main_module", "found_otherwise", "not_admitted", "foreign_construction", "builtin_method",
        ),
        ALL,
    ),
    "unbound_method": slice(1),
    "missing_builtin": slice(1),
    "other_member": slice(2),
    "not_callable": slice(1, 2),
}  # fmt: skip


class Blank(ast.NodeTransformer):
    """Blanks what only a reader sees: an error's message, and the type that ``cast`` is told."""

    def visit_Call(self, call):
        self.generic_visit(call)
        name = ast.unparse(call.func).removeprefix("refusals.")
        if name in WORDS or self.raises(name):
            words = WORDS.get(name, slice(1))
            call.args[words] = [ast.Constant("") for _ in call.args[words]]
        return call

    @staticmethod
    def raises(name):
        import safedefer.errors

        return isinstance(getattr(safedefer.errors, name, None), type) or name in {"AttributeError", "TypeError"}


def words_alone(original, mutant):
    """Whether two functions are the same but for their names and what ``Blank`` blanks."""
    texts = []
    for function in (original, mutant):
        copy = ast.parse(ast.unparse(function)).body[0]
        copy.name = "f"
        texts.append(ast.dump(Blank().visit(copy)))
    return texts[0] == texts[1]


def difference(original, mutant):
    """Return the changed lines, as ``ast`` writes them."""
    old, new = (ast.unparse(function).splitlines()[1:] for function in (original, mutant))
    if old == new:  # a default in the signature
        old, new = (ast.unparse(function).splitlines() for function in (original, mutant))
    return [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[:2] not in {"--", "++", "@@"}]


def by_forks(folder, changed, tests, verdicts):
    """Return the row on each mutant, which says the test that noticed it, or None. Those of words alone come last."""
    words = {mutant for mutant, functions in changed.items() if words_alone(*functions)}
    lines = [mutant for mutant in changed if mutant not in words] + [f"{mutant} {ENOUGH}" for mutant in sorted(words)]
    (folder / "mutants.txt").write_text("\n".join(lines))
    command = [*PYTEST, "-s", "-p", "tests.mutation.forks", "--mutants=mutants.txt", f"--verdicts={verdicts}"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "ci", "MUTANT_UNDER_TEST": ""}
    subprocess.run([*command, *(f"tests/{test}" for test in tests)], cwd=folder, env=environment, check=True)
    rows = map(json.loads, (folder / verdicts).read_text().splitlines())
    return {row["mutant"]: row for row in rows}


def by_itself(folder, mutant):
    """Whether a test fails in a pytest of its own that is started with the mutant."""
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "ci", "MUTANT_UNDER_TEST": mutant}
    command = [*PYTEST, *(f"tests/{test}" for test in QUICK)]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def run(folder, modules):
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "node_modules", ".venv*", "mutants")
    shutil.copytree(ROOT, folder, ignore=ignored)
    changed = mutate(folder, modules)
    rows = by_forks(folder, changed, QUICK, "quick.jsonl")
    found = {mutant: "noticed by the quick tests" for mutant, row in rows.items() if row["by"] is not None}
    found |= {mutant: "words alone" for mutant in changed if mutant not in found and words_alone(*changed[mutant])}
    left = {mutant: functions for mutant, functions in changed.items() if mutant not in found}
    if left:
        later = by_forks(folder, left, MORE, "more.jsonl")
        found |= {mutant: "noticed by more tests" for mutant, row in later.items() if row["by"] is not None}
    for mutant in left:
        if mutant not in found and rows[mutant]["early"] and by_itself(folder, mutant):
            found[mutant] = "noticed from the start"
    counts = Counter()
    for mutant, functions in changed.items():
        verdict = found.get(mutant, "SURVIVED")
        counts[mutant.rpartition(".")[0].removeprefix("safedefer."), verdict] += 1
        if verdict != "noticed by the quick tests":
            print(verdict, mutant, *difference(*functions), sep="\n    ")
    for (module, verdict), count in counts.items():
        print(f"{module}: {verdict}: {count}")


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument(
        "--keep", type=Path, help="a folder that does not exist yet: the copy, and what was found, stay there"
    )
    given = parser.parse_args()
    if given.keep:
        run(given.keep.resolve(), given.modules)
        return
    with tempfile.TemporaryDirectory() as place:
        run(Path(place, "copy"), given.modules)


if __name__ == "__main__":
    main()
