"""Reads ``pyright --verifytypes --outputjson`` from standard input: every exported name must have a known type.

Django has no types of its own, so what derives from its classes cannot: ``safedefer.frameworks.django`` is left out.
"""

import json
import sys

LEFT_OUT = "safedefer.frameworks.django."


def main() -> int:
    """Print what has no type; return how many names that are, at most 1."""
    found = json.load(sys.stdin)["typeCompleteness"]["symbols"]
    exported = [each for each in found if each["isExported"] and not each["name"].startswith(LEFT_OUT)]
    untyped = [each for each in exported if not each["isTypeKnown"] or each["isTypeAmbiguous"]]
    for each in untyped:
        print(each["name"], *{item["message"].replace("\n", " ") for item in each["diagnostics"]}, sep="\n    ")
    print(f"{len(exported)} exported names, {len(untyped)} without a known type")
    return bool(untyped) or not exported


if __name__ == "__main__":
    sys.exit(main())
