"""Certificates for tests, signed by an authority of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_certificates(folder: Path) -> None:
    """Writes `ca.pem`, and `server` and `client` each as `.pem` and `.key`."""
    _openssl(
        "req", "-x509", *_EC, "-days", "2", "-subj", "/CN=test authority",
        "-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.pem"),
    )  # fmt: skip
    for name in ("server", "client"):
        request, extensions = folder / f"{name}.csr", folder / f"{name}.cnf"
        extensions.write_text("subjectAltName = IP:127.0.0.1, DNS:localhost\n")
        _openssl(
            "req", *_EC, "-subj", f"/CN={name}", "-keyout", str(folder / f"{name}.key"),
            "-out", str(request),
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", str(request), "-CA", str(folder / "ca.pem"),
            "-CAkey", str(folder / "ca.key"), "-CAcreateserial", "-days", "2",
            "-extfile", str(extensions), "-out", str(folder / f"{name}.pem"),
        )  # fmt: skip


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
