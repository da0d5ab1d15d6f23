"""`pytest -v tests/pallas_kernels` ends with the worst error of each kernel, path and dtype."""

from __future__ import annotations

from tests.pallas_kernels.exact import WORST


def pytest_terminal_summary(terminalreporter, config) -> None:
    if config.option.verbose > 0 and WORST:
        terminalreporter.section("worst relative norm error against float64")
        for (kernel, path, dtype), error in sorted(WORST.items()):
            terminalreporter.write_line(f"{kernel:18} {path:4} {dtype:9} {error:.1e}")
