"""Which kernels run where, and what is refused."""

from __future__ import annotations

import pytest

from pallas_kernels.backend_names import BACKENDS
from pallas_kernels.backends import default_backend, kernels_of, unsupported
from pallas_kernels.gpu import hopper_attention as hopper
from pallas_kernels.gpu import striped_attention as gpu
from pallas_kernels.striped_attention import fold_stripe
from pallas_kernels.tpu import striped_attention as tpu


def test_platforms_have_kernels_of_their_own():
    found = [default_backend(platform) for platform in ("cpu", "tpu", "gpu", "metal")]
    assert found == ["xla", "pallas-tpu", "pallas-triton", "xla"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_gives_its_own_kernels(backend):
    kernels = kernels_of(backend)
    fold = getattr(kernels.fold_stripe, "func", kernels.fold_stripe)
    of_backend = {
        "xla": fold_stripe,
        "pallas-triton": gpu.fold_stripe,
        "interpret": gpu.fold_stripe,
        "pallas-hopper": hopper.fold_stripe,
    }
    assert kernels.backend == backend
    assert fold is of_backend.get(backend, tpu.fold_stripe)
    assert kernels.shares_keys == (backend != "xla")


def test_what_no_chip_has_run_says_so(caplog):
    kernels_of.cache_clear()
    kernels_of("pallas-hopper")
    assert "unconfirmed" in caplog.text
    with pytest.raises(ValueError, match="200 tokens is no multiple of 128"):
        hopper.tiles_for(200, 128, 2)


@pytest.mark.parametrize(
    ("backend", "platform", "head_dim", "reason"),
    [
        ("xla", "cpu", 80, None),
        ("pallas-tpu", "tpu", 80, None),
        ("pallas-triton", "gpu", 128, None),
        ("pallas-triton", "gpu", 80, "head_dim 80 must be a power of two"),
        ("pallas-hopper", "gpu", 128, None),
        ("pallas-hopper", "gpu", 256, "head_dim 256 with 2 bytes per number must be 64 or 128"),
        ("pallas-hopper", "cpu", 128, "it needs a gpu, and this is a cpu"),
        ("interpret", "cpu", 80, "head_dim 80 must be a power of two"),
        ("pallas-tpu", "cpu", 128, "it needs a tpu, and this is a cpu"),
        ("pallas-triton", "tpu", 128, "it needs a gpu, and this is a tpu"),
    ],
)
def test_what_a_backend_cannot_serve_has_a_reason(backend, platform, head_dim, reason):
    found = unsupported(backend, platform=platform, head_dim=head_dim, itemsize=2, chunk_tokens=128)
    assert found == reason or (reason and found and found.startswith(reason))
