"""Every kernel compiles for every target, with the target's own compiler.

The first run installs the compilers, some hundred megabytes; they are kept.
"""

from __future__ import annotations

import pytest

from loongjax.aot import kernels
from loongjax.aot.compilers import default_folder, install
from loongjax.aot.kernel_cases import CASES, cases_of
from loongjax.aot.kernels import compile_kernels
from loongjax.aot.targets import TARGETS, target_of
from loongjax.errors import StepError

# All of them by `scripts/compile_kernels.py`; these are what the model of `test_programs.py` lacks:
# float32, other head sizes, blocks of one token, the Hopper kernel.
QUICK = tuple(CASES[i] for i in (3, 6, 9, 10))


@pytest.fixture(scope="module")
def folder():
    found = default_folder()
    for compiler in ("tpu", "cuda"):
        install(compiler, found)
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_kernels_compile_for_hardware_that_is_not_here(target, folder):
    cases = [case for case in QUICK if case in cases_of(target.chip)]
    found = compile_kernels(target, cases, folder)
    assert [CASES[kernel.case] for kernel in found] == cases
    for kernel in found:
        case = CASES[kernel.case]
        pool = case.kernel != "striped_attention"
        assert kernel.pool_copies == 0, case
        in_place = case.kernel != "paged_attention" and case.backend is None
        assert kernel.aliased_bytes > 0 or not in_place, case
        if pool:
            assert kernel.temporary_bytes < 64e6, case  # the smallest pool has 490 MB


def test_a_compiler_that_dies_is_an_error_that_names_the_kernel(folder, monkeypatch):
    monkeypatch.setattr(kernels, "__name__", "loongjax.aot.no_such_module")
    with pytest.raises(StepError, match=r"(?s)striped_attention.* does not compile for h100x8.*No"):
        compile_kernels(target_of("h100x8"), QUICK[:1], folder)
