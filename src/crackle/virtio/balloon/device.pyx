"""virtio-balloon (virtio 1.2, section 5.5): memory that the guest does without, and the host gets back.

Two to five queues: pages that the driver puts into the balloon and takes out of it, and, as far as both sides want them,
statistics, free pages that the host has asked for (hinting), and free pages that the driver tells of by itself (reporting).
What the host wants is in the configuration space. What a driver says of its pages is believed, because they are its own.

No page in the balloon need keep what was in it: neither MUST_TELL_HOST nor PAGE_POISON is offered, and a driver that wants to
find zeros in free pages then makes no use of reporting.

The buffer for statistics stays with the device until it wants new ones; over a snapshot the queue keeps it, and it is read
again. `pages` gives pages back; here are the turns of the queues, the configuration, and what the device saves and counts.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strerror
from posix.time cimport itimerspec
from posix.unistd cimport close, read

from crackle.includes.balloon cimport *
from crackle.includes.events cimport CLOCK_MONOTONIC, EPOLLIN, TFD_CLOEXEC, TFD_NONBLOCK, timerfd_create, timerfd_settime
from crackle.memory.discard cimport discard
from crackle.memory.guest cimport GuestMemory
from crackle.runtime.iothread cimport IoThread
from crackle.runtime.threads cimport now_ns, pthread_mutex_lock, pthread_mutex_unlock
from crackle.virtio.balloon.pages cimport BATCH, Pages
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.queue cimport (
    MAX_QUEUE_SIZE, QUEUE_BROKEN, QUEUE_CHAIN, Virtqueue, chain, copy_buffers
)

import msgspec

from crackle.errors import ConfigError
from crackle.schema.balloon import BalloonHintingStatus, BalloonStats


cdef enum:
    # What a queue is for.
    INFLATE = 0
    DEFLATE = 1
    STATISTICS = 2
    HINTING = 3
    REPORTING = 4
    ROLES = 5

    # Statistics that have a name (Linux 6.12, include/uapi/linux/virtio_balloon.h), and entries that are looked at.
    TAGS = 16
    MAX_ENTRIES = 256

    PAGES_PER_MIB = 256

# By their tags.
STATISTICS_NAMES = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
)

cdef uint64_t STATS_VQ = <uint64_t> 1 << VIRTIO_BALLOON_F_STATS_VQ
cdef uint64_t ON_OOM = <uint64_t> 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
cdef uint64_t HINT = <uint64_t> 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT
cdef uint64_t REPORT = <uint64_t> 1 << VIRTIO_BALLOON_F_REPORTING

_INACTIVE = "Balloon: Device not activated yet."
_NO_HINTING = "Balloon: Attempting to use hinting when not enabled"


class BalloonState(msgspec.Struct, frozen=True, kw_only=True, tag="balloon"):
    """What a balloon adds to its DeviceState.

    num_pages, actual_pages: of 4 KiB, as the host wants it and as the driver has it. interval_s: between statistics.
    statistics: by their tags, None for those that the driver did not give. hint_*: the command of the host, the last one
    that began a run, and the driver's; and whether the end of a run is acknowledged by itself.
    """

    num_pages: int
    actual_pages: int
    interval_s: int
    statistics: tuple[int | None, ...]
    hint_command: int
    hint_last: int
    hint_guest: int | None
    hint_acknowledges: bool


cdef class Balloon(VirtioDevice):
    """A balloon that is to hold `amount_mib` MiB, which `resize` changes.

    deflate_on_oom: the driver may take pages out when the guest has no others. stats_interval_s: between statistics, in
    seconds; 0 for none. hinting, reporting: offer them.
    """

    own_state = BalloonState

    cdef Pages pages
    cdef chain chain
    cdef readonly int timer_fd
    cdef readonly int interval_s
    cdef int roles[ROLES]       # by queue, as the driver has negotiated them
    cdef int statistics_queue   # or -1
    cdef int statistics_head    # of the buffer that the device has, or -1
    cdef uint64_t values[TAGS]
    cdef uint32_t known         # of them, a bit for each
    cdef uint32_t hint_last, hint_guest
    cdef bint hint_told         # hint_guest is one
    cdef bint hint_ends         # it has said in this turn that it has no more
    cdef bint hint_acknowledges
    cdef readonly uint64_t inflate_events, deflate_events, malformed
    cdef readonly uint64_t statistics_events, statistics_fails
    cdef readonly uint64_t hinted, hinted_bytes, hint_fails
    cdef readonly uint64_t reported, reported_bytes, report_fails

    def __cinit__(self, *args, **kwargs):
        self.timer_fd = -1
        self.statistics_head = self.statistics_queue = -1

    def __init__(
        self,
        GuestMemory memory,
        int amount_mib=0,
        *,
        bint deflate_on_oom=False,
        int stats_interval_s=0,
        bint hinting=False,
        bint reporting=False,
    ):
        cdef uint64_t features = 0
        features |= ON_OOM if deflate_on_oom else 0
        features |= STATS_VQ if stats_interval_s else 0
        features |= HINT if hinting else 0
        features |= REPORT if reporting else 0
        self.set_up(VIRTIO_ID_BALLOON, features, (MAX_QUEUE_SIZE,) * (2 + (stats_interval_s > 0) + hinting + reporting))
        for queue in self.queues:
            # Pages that go need not come first.
            (<Virtqueue> queue).names_only = True
        self.pages = Pages(memory)
        self.interval_s = stats_interval_s
        self.space().num_pages = _pages(memory, amount_mib)
        self.config_size = sizeof(virtio_balloon_config)
        self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.timer_fd < 0:
            raise ConfigError(f"cannot make the balloon's timer: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self.timer_fd >= 0:
            close(self.timer_fd)

    def close(self):
        """Give the descriptors back; the I/O thread is stopped. Idempotent."""
        VirtioDevice.close(self)
        if self.timer_fd >= 0:
            close(self.timer_fd)
            self.timer_fd = -1

    def attach(self, IoThread io not None):
        """Serve queues and timer on `io`."""
        VirtioDevice.attach(self, io)
        self.watch(self.timer_fd, EPOLLIN, timer_fired, <void *> self)

    cdef virtio_balloon_config *space(self) noexcept nogil:
        return <virtio_balloon_config *> self.config

    # -- the driver's life ---------------------------------------------------------------------------------------

    cdef bint on_activate(self) noexcept nogil:
        self.find_roles()
        self.set_timer()
        return True

    cdef void find_roles(self) noexcept nogil:
        """The queues that both sides know, one after the other (5.5.2), without gaps, as drivers number them."""
        cdef int i = 2
        self.roles[0], self.roles[1] = INFLATE, DEFLATE
        self.statistics_queue = -1
        if self.driver_features & STATS_VQ:
            self.statistics_queue = i
            self.roles[i] = STATISTICS
            i += 1
        if self.driver_features & HINT:
            self.roles[i] = HINTING
            i += 1
        if self.driver_features & REPORT:
            self.roles[i] = REPORTING
            i += 1
        while i < ROLES:
            self.roles[i] = ROLES
            i += 1

    cdef void set_timer(self) noexcept nogil:
        cdef itimerspec when
        memset(&when, 0, sizeof(when))
        if self.running() and self.statistics_queue >= 0:
            when.it_value.tv_sec = when.it_interval.tv_sec = self.interval_s
        timerfd_settime(self.timer_fd, 0, &when, NULL)

    cdef void on_reset(self) noexcept nogil:
        self.status = 0
        self.set_timer()
        self.space().actual = 0
        self.space().free_page_hint_cmd_id = VIRTIO_BALLOON_CMD_ID_STOP
        self.statistics_head = -1
        self.known = 0
        self.hint_last = self.hint_guest = 0
        self.hint_told = self.hint_acknowledges = False
        self.pages.forget()

    cdef void on_config_write(self, uint32_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint32_t place = <uint32_t> (<uint8_t *> &self.space().actual - self.config)
        # How much it holds is the driver's to say, and nothing else (5.5.4).
        if offset >= place and offset + size <= place + sizeof(uint32_t):
            memcpy(&self.config[offset], data, size)
        else:
            self.cfg_fails += 1

    # -- turns: on the I/O thread, with the lock held ----------------------------------------------------------------

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        cdef int role = self.roles[index]
        if not queue.ready or role == ROLES:
            return
        if role == STATISTICS:
            self.take_statistics(index, queue)
            return
        self.hint_ends = False
        if not self.serve(role, queue):
            self.notify_again(index)
        if role <= DEFLATE:
            self.settle(role, queue.next_used != queue.published)
        # Not before: what the driver is told of is its own again, and may not go any more.
        if queue.show(True):
            self.signal_queue(index)
        if self.hint_ends and self.hint_acknowledges and self.space().free_page_hint_cmd_id != VIRTIO_BALLOON_CMD_ID_DONE:
            # The driver has told of all it has: let it have its pages again.
            self.command_hinting(VIRTIO_BALLOON_CMD_ID_DONE)

    cdef bint serve(self, int role, Virtqueue queue) noexcept nogil:
        """Take what is in the queue; False when there is more for the next turn."""
        cdef uint64_t begin = now_ns()
        cdef int found
        while True:
            found = queue.pop(&self.chain)
            if found == QUEUE_BROKEN:
                self.need_reset()
                return True
            if found != QUEUE_CHAIN:
                if queue.rearm():
                    return True
                continue
            if role == HINTING:
                self.hint()
            elif role == REPORTING:
                self.report()
            elif self.chain.writable or self.chain.readable_bytes & 3 or self.chain.readable_bytes > BATCH * 4:
                self.malformed += 1
            elif not self.pages.add(&self.chain):
                queue.put_back(1)
                return False
            queue.push(self.chain.head, 0)
            if now_ns() - begin >= TURN_NS:
                return False

    cdef void settle(self, int role, bint any) noexcept nogil:
        """Do with the pages that were collected, in this turn if there are `any`, what is to be done."""
        if role == INFLATE:
            self.inflate_events += any
            self.pages.give_back()
        else:
            self.deflate_events += any
            self.pages.take_out()

    cdef void report(self) noexcept nogil:
        """Free pages, which stay free until the driver hears of this chain (5.5.6.7)."""
        cdef int i
        self.malformed += self.chain.readable != 0
        for i in range(self.chain.readable, self.chain.readable + self.chain.writable):
            self.reported += 1
            if not discard(self.memory, self.chain.gpa[i], self.chain.iov[i].iov_len, &self.reported_bytes):
                self.report_fails += 1

    cdef void hint(self) noexcept nogil:
        """A command of the driver's, or free pages of the run that the host has begun (5.5.6.5)."""
        cdef uint32_t command, wanted = self.space().free_page_hint_cmd_id
        cdef int i
        if self.chain.readable_bytes == sizeof(command):
            copy_buffers(self.chain.iov, self.chain.readable, 0, &command, sizeof(command), False)
            self.hint_guest, self.hint_told = command, True
            self.hint_ends = command <= VIRTIO_BALLOON_CMD_ID_DONE
        else:
            self.malformed += self.chain.readable != 0
        if not self.hint_told or self.hint_guest != wanted or wanted <= VIRTIO_BALLOON_CMD_ID_DONE:
            # Of a run that is over: the driver may have them again.
            return
        for i in range(self.chain.readable, self.chain.readable + self.chain.writable):
            self.hinted += 1
            if not discard(self.memory, self.chain.gpa[i], self.chain.iov[i].iov_len, &self.hinted_bytes):
                self.hint_fails += 1

    cdef void command_hinting(self, uint32_t command) noexcept nogil:
        self.space().free_page_hint_cmd_id = command
        self.config_changed()

    # -- statistics ----------------------------------------------------------------------------------------------

    cdef void take_statistics(self, int index, Virtqueue queue) noexcept nogil:
        """Read what the driver tells, and keep its buffer until the next time (5.5.6.3)."""
        cdef uint32_t taken = 0
        cdef int found
        while True:
            found = queue.pop_to_keep(&self.chain)
            if found == QUEUE_BROKEN:
                self.need_reset()
                break
            if found != QUEUE_CHAIN:
                if queue.rearm():
                    break
                continue
            if self.statistics_head >= 0:
                # It has more than one, against the rules.
                self.statistics_fails += 1
                queue.push_kept(<uint16_t> self.statistics_head, 0)
            self.statistics_head = self.chain.head
            self.read_statistics()
            self.statistics_events += 1
            taken += 1
            if taken == MAX_QUEUE_SIZE:
                self.notify_again(index)
                break
        if queue.show(True):
            self.signal_queue(index)

    cdef void read_statistics(self) noexcept nogil:
        cdef uint64_t size = self.chain.readable_bytes, at = 0
        cdef virtio_balloon_stat entry
        if self.chain.writable or size > MAX_ENTRIES * sizeof(entry):
            self.statistics_fails += 1
            return
        while at + sizeof(entry) <= size:
            copy_buffers(self.chain.iov, self.chain.readable, at, &entry, sizeof(entry), False)
            if entry.tag < TAGS:
                self.values[entry.tag] = entry.val
                self.known |= <uint32_t> 1 << entry.tag
            else:
                self.statistics_fails += 1
            at += sizeof(entry)
        self.statistics_fails += size % sizeof(entry) != 0

    cdef void ask(self) noexcept nogil:
        """Have the driver tell again: it does so when it has its buffer back."""
        cdef int index = self.statistics_queue
        if not self.running() or self.statistics_head < 0:
            return
        (<Virtqueue> self.table[index]).push_kept(<uint16_t> self.statistics_head, 0)
        self.statistics_head = -1
        if (<Virtqueue> self.table[index]).show(True):
            self.signal_queue(index)

    cdef void timer_ended(self) noexcept nogil:
        cdef uint64_t times
        pthread_mutex_lock(&self.lock)
        read(self.timer_fd, &times, sizeof(times))
        self.ask()
        pthread_mutex_unlock(&self.lock)

    # -- control: from the main thread ---------------------------------------------------------------------------

    def resize(self, amount_mib):
        """Have the driver make it hold so many MiB. ConfigError when that is more than there is, or there is no driver."""
        cdef uint32_t pages
        cdef bint active
        self._check_active()
        pages = _pages(self.memory, amount_mib)
        with nogil:
            pthread_mutex_lock(&self.lock)
            active = self.running()
            if active:
                self.space().num_pages = pages
                self.config_changed()
            pthread_mutex_unlock(&self.lock)
        if not active:
            raise ConfigError(_INACTIVE)

    def poll_statistics(self, int interval_s):
        """Ask for statistics now, and every so many seconds from now on. ConfigError where that were none, or the first."""
        if interval_s == self.interval_s:
            return
        if not interval_s or not self.interval_s:
            raise ConfigError("Balloon: Statistics cannot be enabled/disabled after activation.")
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.interval_s = interval_s
            self.ask()
            self.set_timer()
            pthread_mutex_unlock(&self.lock)

    def statistics(self):
        """schema.BalloonStats, of when the driver last told. ConfigError where there are none."""
        # Without the lock, which the I/O thread may have for as long as a page-fault handler takes.
        cdef virtio_balloon_config *space = self.space()
        cdef uint32_t target = space.num_pages, actual = space.actual, known = self.known
        if not self.interval_s:
            raise ConfigError("Balloon: Received stats query when stats are disabled.")
        return BalloonStats(
            target_pages=target,
            actual_pages=actual,
            target_mib=target // PAGES_PER_MIB,
            actual_mib=actual // PAGES_PER_MIB,
            **{name: self.values[tag] for tag, name in enumerate(STATISTICS_NAMES) if known >> tag & 1},
        )

    def start_hinting(self, bint acknowledge_on_stop):
        """Begin a run: the driver tells of the free pages that it has, and keeps them from others until its end."""
        self._check_hinting()
        self._check_active()
        with nogil:
            pthread_mutex_lock(&self.lock)
            # The commands STOP and DONE begin none.
            self.hint_last = max(self.hint_last + 1, <uint32_t> (VIRTIO_BALLOON_CMD_ID_DONE + 1))
            self.hint_acknowledges = acknowledge_on_stop
            self.command_hinting(self.hint_last)
            pthread_mutex_unlock(&self.lock)

    def stop_hinting(self):
        """End a run: the driver may use its pages again."""
        self._check_hinting()
        self._check_active()
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.command_hinting(VIRTIO_BALLOON_CMD_ID_DONE)
            pthread_mutex_unlock(&self.lock)

    def hinting_status(self):
        """schema.BalloonHintingStatus."""
        self._check_hinting()
        return BalloonHintingStatus(
            host_cmd=self.space().free_page_hint_cmd_id, guest_cmd=self.hint_guest if self.hint_told else None
        )

    def _check_active(self):
        if not self.running():
            raise ConfigError(_INACTIVE)

    def _check_hinting(self):
        if not self.device_features & HINT:
            raise ConfigError(_NO_HINTING)

    # -- what it tells -------------------------------------------------------------------------------------------

    @property
    def target_pages(self):
        """Pages of 4 KiB that the host wants in the balloon."""
        return self.space().num_pages

    @property
    def actual_pages(self):
        """Pages that the driver says are in it."""
        return self.space().actual

    def counters(self):
        """Firecracker's metrics of a balloon, since the start; and what inflating gave back, in bytes and in calls."""
        return {
            "activate_fails": self.activate_fails,
            "inflate_count": self.inflate_events,
            "stats_updates_count": self.statistics_events,
            "stats_update_fails": self.statistics_fails,
            "deflate_count": self.deflate_events,
            "event_fails": self.malformed + self.pages.outside + self.pages.refused + self.broken_queues
            + self.irq_fails + self.cfg_fails,
            "free_page_report_count": self.reported,
            "free_page_report_freed": self.reported_bytes,
            "free_page_report_fails": self.report_fails,
            "free_page_hint_count": self.hinted,
            "free_page_hint_freed": self.hinted_bytes,
            "free_page_hint_fails": self.hint_fails,
            "inflate_freed": self.pages.freed_bytes,
            "inflate_runs": self.pages.freed_runs,
        }

    def save_own(self):
        """BalloonState. The machine is paused and drained."""
        return BalloonState(
            num_pages=self.space().num_pages,
            actual_pages=self.space().actual,
            interval_s=self.interval_s,
            statistics=tuple([self.values[tag] if self.known >> tag & 1 else None for tag in range(TAGS)]),
            hint_command=self.space().free_page_hint_cmd_id,
            hint_last=self.hint_last,
            hint_guest=self.hint_guest if self.hint_told else None,
            hint_acknowledges=self.hint_acknowledges,
        )

    def restore_own(self, state):
        """The reverse of `save_own`; ValueError when the state is not this device's.

        A run of hinting ends, as with Firecracker: the driver may have its pages again.
        """
        words = (state.num_pages, state.actual_pages, state.hint_command, state.hint_last, state.hint_guest or 0)
        if any(not 0 <= word < 1 << 32 for word in words) or not 0 <= state.interval_s < 1 << 16:
            raise ValueError(f"a balloon has no numbers as large as in {state}")
        if any(value is not None and not 0 <= value < 1 << 64 for value in state.statistics):
            raise ValueError("saved statistics have more than 64 bits")
        if bool(state.interval_s) != bool(self.interval_s) or len(state.statistics) != TAGS:
            raise ValueError("the saved balloon has other statistics than this one")
        self.space().num_pages, self.space().actual = state.num_pages, state.actual_pages
        self.space().free_page_hint_cmd_id = state.hint_command
        self.interval_s = state.interval_s
        self.known = 0
        for tag, value in enumerate(state.statistics):
            if value is not None:
                self.values[tag] = value
                self.known |= <uint32_t> 1 << <int> tag
        self.hint_last, self.hint_acknowledges = state.hint_last, state.hint_acknowledges
        self.hint_guest, self.hint_told = state.hint_guest or 0, state.hint_guest is not None
        self.statistics_head = -1
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.find_roles()
            self.set_timer()
            if self.driver_features & HINT and self.running():
                self.command_hinting(VIRTIO_BALLOON_CMD_ID_DONE)
            pthread_mutex_unlock(&self.lock)


def _pages(GuestMemory memory not None, amount_mib):
    """So many MiB in pages of 4 KiB; ConfigError when guest memory has fewer."""
    if not 0 <= amount_mib << 20 <= memory.size:
        raise ConfigError(
            f"Balloon: Requested memory should be less than {amount_mib}MiB: the microVM has {memory.size >> 20} MiB."
        )
    return amount_mib * PAGES_PER_MIB


cdef void timer_fired(void *context, uint32_t events) noexcept nogil:
    (<Balloon> context).timer_ended()
