"""virtio-block as a guest's driver sees it, with the host looking at the file behind it."""

import array
import itertools
import time

import pytest

from crackle.schema import Drive, DriveUpdate, RateLimiter, TokenBucket

WORD = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
MIB = 1 << 20


def pattern(size, seed):
    """What the guest writes: each 8-byte word from its index and the seed."""
    return array.array("Q", ((word + seed) * WORD & MASK for word in range(size // 8))).tobytes()


@pytest.fixture(scope="module", params=["Sync", "Async"])
def engine(request):
    return request.param


@pytest.fixture
def image(tmp_path, engine):
    """A file of so many bytes of the pattern; its drive section. Everything here holds for both engines."""

    def make(size=2 * MIB, seed=7, **section):
        path = tmp_path / f"image{len(list(tmp_path.iterdir()))}"
        path.write_bytes(pattern(size, seed))
        return path, {"path_on_host": str(path), "io_engine": engine, **section}

    return make


FEATURES = [" ".join(words) for words in itertools.product(("", "noindirect"), ("", "noevent"), ("", "irq"))]


@pytest.mark.parametrize("features", FEATURES)
def test_data_arrive_whole_with_every_way_to_talk(run, image, features):
    path, drive = image()
    printed = run("blk", f"{features} seed=7 t=check,4096,16 seed=7", drives=[drive])
    assert f"bytes={2 * MIB}" in printed
    run("blk", f"{features} seed=99 t=fill,65536,4 t=check,512,1", drives=[drive])
    assert path.read_bytes() == pattern(2 * MIB, 99)


@pytest.mark.parametrize("features", ["", "noindirect"])
@pytest.mark.parametrize("shape", ["131072,2,4096", "65536,2,1000", "4096,8,512", "512,40"])
def test_requests_may_be_scattered_over_many_descriptors(run, image, features, shape):
    path, drive = image()
    run("blk", f"{features} seed=3 t=fill,{shape} t=check,{shape}", drives=[drive])
    assert path.read_bytes() == pattern(2 * MIB, 3)


def test_sum_of_the_whole_device_matches_the_hosts(run, image):
    path, drive = image(seed=1234)
    words = array.array("Q", path.read_bytes())
    expected = sum(value * (2 * index + 1) for index, value in enumerate(words)) & MASK
    assert f"sum={expected:#x}\n" in run("blk", "t=sum,131072,4", drives=[drive])


def test_a_read_only_drive_refuses_writes(run, image):
    path, drive = image(is_read_only=True)
    before = path.read_bytes()
    printed = run("blk", "seed=8 t=write t=read", drives=[drive])
    read_only = 1 << 5
    assert int(printed.split("offered=")[1].split()[0], 16) & read_only
    assert "blk write status=1\n" in printed
    assert "blk read status=0" in printed
    assert path.read_bytes() == before


def test_a_writable_drive_does_not_say_read_only(run, image):
    _, drive = image()
    printed = run("blk", "t=read", drives=[drive])
    assert not int(printed.split("offered=")[1].split()[0], 16) & 1 << 5


def test_flush_is_offered_with_writeback_and_works(run, image):
    _, unsafe = image()
    _, writeback = image(cache_type="Writeback")
    flush = 1 << 9
    for device, offered in ((0, 0), (1, flush)):
        printed = run("blk", f"device={device} t=write t=flush", drives=[unsafe, writeback])
        assert int(printed.split("offered=")[1].split()[0], 16) & flush == offered
        assert "blk flush status=0\n" in printed


def test_every_drive_has_an_id_of_its_own(run, image):
    drives = [image(MIB, seed=n)[1] for n in range(3)]
    ids = [run("blk", f"device={n} t=id", drives=drives).split("id=")[1].split()[0] for n in range(3)]
    assert len(set(ids)) == 3
    assert all(ids)


def test_drives_do_not_mix(run, image):
    (first, one), (second, two) = image(MIB, seed=1), image(MIB, seed=2)
    run("blk", "device=1 seed=5 t=fill,4096,8", drives=[one, two])
    assert first.read_bytes() == pattern(MIB, 1)
    assert second.read_bytes() == pattern(MIB, 5)


def test_a_request_beyond_the_end_is_an_error_and_nothing_more(run, image):
    path, drive = image()
    printed = run("blk", "seed=7 t=beyond t=unsupported t=check,4096,4", drives=[drive])
    assert "blk beyond status=1" in printed
    assert "blk unsupported status=2" in printed
    assert path.stat().st_size == 2 * MIB


def test_a_size_that_is_no_whole_number_of_sectors_is_rounded_down(run, image):
    _, drive = image(5 * 512 + 100 * 8)
    assert f"sectors={(5 * 512 + 800) // 512} " in run("blk", "t=read", drives=[drive])


def test_the_device_works_again_after_a_reset(run, image):
    path, drive = image()
    printed = run("blk", "reopen seed=4 t=fill,4096,32 t=check,4096,32", drives=[drive])
    assert printed.count("blk check") == 2
    assert path.read_bytes() == pattern(2 * MIB, 4)


def test_nothing_is_lost_while_the_guest_is_paused_again_and_again(machine, image):
    path, drive = image(2 * MIB)
    running = machine("blk", "irq seed=6 t=fill,4096,8 t=check,4096,8", drives=[drive]).start()
    pauses = 0
    while not running.ended(0):
        running.machine.pause()
        running.machine.resume()
        pauses += 1
    assert running.wait_end().exit_code == 0
    assert pauses > 20
    assert "FAIL" not in running.text
    assert path.read_bytes() == pattern(2 * MIB, 6)


def test_the_file_behind_a_drive_can_be_changed(machine, image):
    (_, drive), (other, _) = image(MIB, seed=1), image(2 * MIB, seed=2)
    running = machine("blk", "ms=200 t=randread,4096,1 seed=2 t=check,4096,1 reopen", drives=[drive])
    running.machine.update("block", "drive0", DriveUpdate("drive0", str(other)))
    running.start().wait_end()
    assert f"sectors={2 * MIB // 512} " in running.text
    assert "FAIL" not in running.text


def test_the_file_changes_under_a_guest_that_reads_all_the_time(machine, image):
    (path, drive), (other, _) = image(MIB, seed=1), image(MIB, seed=1)
    running = machine("blk", "seed=1" + " t=check,4096,32" * 50, drives=[drive]).start()
    for n in range(20):
        running.machine.update("block", "drive0", DriveUpdate("drive0", str(path if n % 2 else other)))
    assert running.wait_end().exit_code == 0
    assert "FAIL" not in running.text


def rate(machine, name, seconds=5.0):
    """How fast a counter of the drive rises, a second, once what the bucket held is gone."""
    time.sleep(0.5)
    begin, before = time.monotonic(), machine.metrics()["block_drive0"][name]
    time.sleep(seconds)
    return (machine.metrics()["block_drive0"][name] - before) / (time.monotonic() - begin)


def test_a_limited_drive_has_its_rate_within_five_percent(machine, image):
    """Both buckets, set and changed while the guest reads, each over five seconds."""
    _, drive = image()
    running = machine("blk", "ms=60000 t=randread,4096,8", drives=[drive]).start()
    nothing = TokenBucket(0, 0)
    for limits, counter, expected in (
        (RateLimiter(TokenBucket(400_000, 100)), "read_bytes", 4_000_000),
        (RateLimiter(nothing, TokenBucket(50, 100)), "read_count", 500),
    ):
        running.machine.update("block", "drive0", DriveUpdate("drive0", rate_limiter=limits))
        for _ in range(4):
            found = rate(running.machine, counter)
            assert found <= 1.05 * expected
            if found >= 0.95 * expected:  # or this machine had no time for the guest
                break
        else:
            pytest.fail(f"{counter}: {found} a second, not {expected}")
    running.machine.update("block", "drive0", DriveUpdate("drive0", rate_limiter=RateLimiter(ops=nothing)))
    assert rate(running.machine, "read_count", 0.5) > 600


def test_vmm_process_serves_the_guest_its_disk(vmm, image):
    path, drive = image()
    process = vmm("blk", "seed=11 t=fill,4096,16 t=check,65536,2", drives=[drive])
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "FAIL" not in printed
    assert path.read_bytes() == pattern(2 * MIB, 11)


def test_devices_beyond_the_interrupt_lines_share_them(run, tmp_path):
    drives = []
    for n in range(40):
        (tmp_path / f"{n}").write_bytes(pattern(65536, n))
        drives.append({"path_on_host": str(tmp_path / f"{n}")})
    # Windows 6 and 24 have the same line, and so do 2, 20 and 38.
    for n in (6, 24, 38, 39):
        run("blk", f"device={n} {'irq' if n % 18 < 10 else ''} seed={n} t=check,4096,8", drives=drives)


def test_the_place_of_a_device_that_was_removed_is_free(machine, tmp_path):
    drives = []
    for n in range(3):
        (tmp_path / f"{n}").write_bytes(pattern(65536, n))
        drives.append({"path_on_host": str(tmp_path / f"{n}")})
    # The guest's second window, its notification and its interrupt are another disk's now.
    running = machine("blk", "device=1 irq seed=9 t=check,4096,8", drives=drives)
    running.machine.remove("block", "drive1")
    (tmp_path / "9").write_bytes(pattern(65536, 9))
    running.machine.add(
        "block", "new", Drive("new", False, path_on_host=str(tmp_path / "9"), is_read_only=True)
    )
    assert list(running.machine.devices) == [("block", "drive0"), ("block", "drive2"), ("block", "new")]
    assert running.start().wait_end().exit_code == 0
    assert "blk check" in running.text
