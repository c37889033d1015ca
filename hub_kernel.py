"""Makes a kernel repository as Hugging Face's ``kernels`` loads it: the Triton kernels, for every Python and torch.

    python hub_kernel.py FOLDER
    python -c "import kernels; print(kernels.get_local_kernel('FOLDER').neighborhood_attention)"

Its rules (https://huggingface.co/docs/kernels/kernel-requirements, version 0.17): a build variant is a folder
``build/torch-universal`` with the package in it, without a folder of its name, and ``metadata.json``. (`kernels` before
0.11 looked for that folder; it is older than the torch that this package needs.) Versions must run beside each other in
one process: the package imports itself by relative names only, and its operators carry the name that it is loaded by,
which is new with every change of a file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "natten_ext"
NAME = "natten-ext"
VERSION = 0
"""Of the interface, as repositories of kernels count it: the branch v0."""


def make(folder: Path) -> Path:
    """Writes the repository into ``folder``, which must not be there yet; returns the build variant's folder."""
    sources = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.relative_to(PACKAGE).as_posix().encode() + b"\0" + source.read_bytes())
    name = f"_natten_ext_universal_{digest.hexdigest()[:12]}"

    variant = folder / "build" / "torch-universal"
    folder.mkdir(parents=True)
    for source in sources:
        target = variant / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    metadata = {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "README.md").write_text(
        "---\nlicense: mit\ntags: [kernels]\n---\n\n"
        "natten_ext: fused local attention with forward, backward and double backward, its Triton kernels.\n"
    )
    return variant


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(make(Path(sys.argv[1])))
