"""Makes the Python stubs of `protos/`: `python scripts/generate_stubs.py`.

They go to `serving/stubs`, and are kept in the repository, so that nobody needs a compiler to
install it; a test compares them with what this makes. protoc writes imports of `loongjax.v1`, which
is no Python package: the library knows no network. They are turned to `serving.stubs`.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "serving" / "stubs"
_PACKAGE = "loongjax/v1"


def generate() -> dict[str, str]:
    """The content of every stub, by file name.

    Raises:
      RuntimeError: protoc refused a file; it has said why on stderr.
    """
    from grpc_tools import protoc

    protos = sorted((ROOT / "protos" / _PACKAGE).glob("*.proto"))
    with TemporaryDirectory() as folder:
        code = protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'protos'}",
                f"-I{files('grpc_tools') / '_proto'}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                f"--grpc_python_out={folder}",
                *map(str, protos),
            ]
        )
        if code != 0:
            raise RuntimeError(f"protoc ended with code {code}")
        made = sorted((Path(folder) / _PACKAGE).iterdir())
        return {path.name: _rehome(path.read_text()) for path in made}


def _rehome(source: str) -> str:
    return source.replace(f"from {_PACKAGE.replace('/', '.')} import", "from serving.stubs import")


def main() -> int:
    """Writes them all."""
    STUBS.mkdir(exist_ok=True)
    for name, source in generate().items():
        (STUBS / name).write_text(source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
