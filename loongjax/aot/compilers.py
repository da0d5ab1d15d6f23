"""The virtual environments that hold the compilers of TPU and GPU, one each.

The plugins of both would disturb each other, and loongjax itself needs neither. An environment
holds the plugin alone; everything else is that of the interpreter which starts it, by its path.
`scripts/install_compilers.py` makes them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from loongjax.aot.targets import Compiler
from loongjax.errors import ConfigError

_STAMP = "installed.txt"
_NVIDIA = ("nvidia-cuda-nvcc==13.5.37", "nvidia-nvvm==13.5.37")

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Where the environments are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loongjax" / "compilers"


def packages_of(compiler: Compiler) -> tuple[str, ...]:
    """What pip installs: the versions that go with the jax that runs here."""
    version = metadata.version("jax")
    if compiler == "cuda":
        return (f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}", *_NVIDIA)
    wanted = metadata.requires("jax") or []
    return tuple(line.split(";")[0].strip() for line in wanted if line.startswith("libtpu"))


def is_installed(compiler: Compiler, folder: Path) -> bool:
    """Whether the environment is there, with these very versions."""
    stamp = folder / compiler / _STAMP
    return stamp.exists() and stamp.read_text().split() == list(packages_of(compiler))


def install(compiler: Compiler, folder: Path) -> None:
    """Makes an environment, unless it is there; a minute and some hundred megabytes.

    Raises ConfigError with pip's last words if it fails.
    """
    if is_installed(compiler, folder):
        return  # also where nobody may write
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{compiler}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds it there
        if not is_installed(compiler, folder):
            _install(compiler, folder)


def _install(compiler: Compiler, folder: Path) -> None:
    packages = packages_of(compiler)
    _log.info("installing %s into %s", " ".join(packages), folder / compiler)
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder / compiler)])
    pip = [sys.executable, "-m", "pip", "--python", str(_python(compiler, folder))]
    _run([*pip, "install", "--quiet", "--no-deps", *packages])
    (folder / compiler / _STAMP).write_text("\n".join(packages) + "\n")


def start(
    compiler: Compiler, folder: Path, arguments: Sequence[str], **options: object
) -> subprocess.Popen[str]:
    """Starts python with these arguments in an environment; text on its pipes.

    Raises ConfigError, naming the command that mends it, where it is not installed.
    """
    if not is_installed(compiler, folder):
        raise ConfigError(
            f"the {compiler} compiler must be installed in {folder}; run: "
            f"python scripts/install_compilers.py --folder {folder}"
        )
    return subprocess.Popen(  # type: ignore[call-overload]
        [str(_python(compiler, folder)), *arguments],
        env=_environment(os.environ),
        text=True,
        **options,
    )


def _python(compiler: Compiler, folder: Path) -> Path:
    return folder / compiler / "bin" / "python"


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """That of a process that compiles for hardware which is not here, nor is looked for."""
    return {
        **ours,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TPU_SKIP_MDS_QUERY": "1",
        # Its lock keeps chips for one process. There are none, and several compile at a time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ConfigError(f"{' '.join(command)} failed:\n{last}")
