"""The generated files of ``schema/``, by path."""

import json
from pathlib import Path

from tests.schema import schemas, vectors

ROOT = Path(__file__).resolve().parents[2] / "schema"


def generated():
    documents = {
        **{f"{name}.schema.json": document for name, document in schemas.documents().items()},
        "vectors/valid.json": vectors.valid(),
        "vectors/invalid.json": vectors.invalid(),
    }
    return {
        ROOT / name: json.dumps(document, indent=1, ensure_ascii=True) + "\n" for name, document in documents.items()
    }
