"""A profile finds the coefficients of devices that are known, and goes on where it was."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from loongjax.cluster.topology import EverySubset
from loongjax.costmodel import ChunkWork, Crowding, DecodeWork, ScalingInformationBase
from loongjax.costmodel.padding import Padding
from loongjax.errors import StepError
from loongjax.executor.protocol import ExecutorLimits
from loongjax.kvcache import BlockAllocator
from loongjax.profiler.design import Sizes, decodes, migrations, walks
from loongjax.profiler.log import PointLog
from loongjax.profiler.runner import Runner
from loongjax.profiler.session import Profile, Session
from tests.costmodel.sibs import FINGERPRINT, toy_sib
from tests.profiler.virtual_devices import VirtualDevices

pytestmark = pytest.mark.usefixtures("without_shape_checks")

PADDING = Padding(chunks=(128, 512, 1024), resumed=(1024,), tile=256, rows=(1, 8, 32))
SIZES = Sizes(padding=PADDING, slots=16_384)
TRUTH = replace(
    toy_sib(degrees=(1, 2)),
    padding=PADDING,
    crowding=Crowding(
        prefill_prefill=0.8, prefill_decode=0.3, decode_prefill=1.7, decode_decode=0.4
    ),
)


def devices(instances: int = 2, **options: object) -> VirtualDevices:
    return VirtualDevices(
        allocator=BlockAllocator(instances=instances, slots=SIZES.slots, block_size=16),
        truth=TRUTH,
        limits=ExecutorLimits(max_chunk_tokens=PADDING.chunks[-1], max_rows=PADDING.rows[-1]),
        **options,
    )


def session(executor: VirtualDevices, path, told: list[str] | None = None) -> Session:
    runner = Runner(
        executor=executor,
        topology=EverySubset(executor.allocator.instances),
        allocator=executor.allocator,
        vocab_size=100,
    )
    log = PointLog(path, FINGERPRINT)
    tell = (
        (lambda done, total, what: None) if told is None else lambda d, t, what: told.append(what)
    )
    return Session(runner, SIZES, log, tell)


def profile(executor: VirtualDevices, path) -> Profile:
    found = session(executor, path).run(FINGERPRINT, "made up")
    assert all(executor.allocator.used_slots(i) == 0 for i in range(executor.allocator.instances))
    return found


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_what_is_found_foretells_the_devices(tmp_path, noise: float) -> None:
    found = profile(devices(noise=noise), tmp_path / "log")
    assert found.held_out.keys() == {"prefill", "decode", "migrate"}
    for check in found.held_out.values():
        assert check.median <= 1e-3 + noise
        assert check.points >= 1
    sib = found.sib
    for kinds, part in asdict(TRUTH.crowding).items():
        slower = 1.0 + getattr(sib.crowding, kinds)
        assert slower == pytest.approx(1.0 + part, rel=0.01 + noise), kinds
    for degree in (1, 2):
        for chunks in ([ChunkWork(700, 0)], [ChunkWork(512, 0), ChunkWork(300, 4_096)]):
            true = TRUTH.prefill(degree, chunks)
            assert sib.prefill(degree, chunks) == pytest.approx(true, rel=1e-3 + noise)
        for work in (DecodeWork(1, 3_000, 1), DecodeWork(20, 9_000, degree)):
            true = TRUTH.decode(degree, work)
            assert sib.decode(degree, work) == pytest.approx(true, rel=1e-3 + noise)
    assert sib.migrate(3_000) == pytest.approx(TRUTH.migrate(3_000), rel=1e-3 + noise)


def test_a_profile_that_broke_off_goes_on_and_comes_to_the_same(tmp_path) -> None:
    broken = devices(fail_after=60)
    with pytest.raises(StepError, match="a step that was to be measured failed: it broke"):
        profile(broken, tmp_path / "log")
    rest, whole = devices(), devices()
    found = profile(rest, tmp_path / "log")
    assert found.resumed > 3
    same = profile(whole, tmp_path / "other").sib
    for work in (DecodeWork(1, 3_000, 1), DecodeWork(20, 9_000, 2)):
        assert found.sib.decode(2, work) == pytest.approx(same.decode(2, work), rel=1e-3)
    assert rest.steps < whole.steps - 40


def test_a_log_of_something_else_is_begun_anew(tmp_path) -> None:
    path = tmp_path / "log"
    log = PointLog(path, FINGERPRINT)
    log.put("a", [1.0, 2.0])
    with path.open("a") as file:
        file.write('{"point": "cut o')
    again = PointLog(path, FINGERPRINT)
    assert (again.resumed, again.get("a"), again.get("b")) == (1, [1.0, 2.0], None)
    assert PointLog(path, replace(FINGERPRINT, model="other")).resumed == 0


def test_a_log_with_other_numbers_is_measured_anew_where_they_differ(tmp_path) -> None:
    path = tmp_path / "log"
    PointLog(path, FINGERPRINT).put("crowding", [0.7, 0.4])
    found = profile(devices(), path)
    assert found.sib.crowding.decode_prefill == pytest.approx(1.7, abs=0.05)
    assert len(PointLog(path, FINGERPRINT).get("crowding")) == 4


def test_one_instance_moves_nothing_and_crowds_nobody(tmp_path) -> None:
    found = profile(devices(instances=1), tmp_path / "log")
    assert found.sib.crowding == Crowding()
    assert found.sib.migrate(100) == 0.0
    assert found.held_out.keys() == {"prefill", "decode"}


def test_a_fit_that_foretells_what_comes_needs_fewer_points(tmp_path) -> None:
    told: list[str] = []
    session(devices(), tmp_path / "log", told).run(FINGERPRINT, "made up")
    series = [part(degree, SIZES) for part in (walks, decodes) for degree in (1, 2)]
    skipped = {p.name for each in series for p in each.between} - set(told)
    assert len(skipped) == len(series), "two foretold points say enough; each series has three"


@pytest.mark.parametrize("slots", [4_096, 100_000])
@pytest.mark.parametrize("degree", [1, 4])
def test_points_fit_the_pool_and_are_different(slots: int, degree: int) -> None:
    small = replace(PADDING, chunks=(128,), resumed=(128,))
    sizes = Sizes(padding=small, slots=slots)
    for series in (walks(degree, sizes), decodes(degree, sizes), migrations(sizes)):
        names = [point.name for point in series.all()]
        assert len(names) == len(set(names))
        assert all(point.tokens <= degree * slots for point in series.all())
    assert len(walks(degree, sizes).corners) >= 3
    assert len(decodes(degree, sizes).corners) >= 4


def test_the_file_keeps_everything(tmp_path) -> None:
    path = tmp_path / "sib.json"
    TRUTH.save(path)
    assert ScalingInformationBase.load(path) == TRUTH
