"""Write what is generated in ``schema/``: ``python -m tests.schema``."""

from tests.schema.files import ROOT, generated

for path, text in generated().items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(path.relative_to(ROOT.parent))
