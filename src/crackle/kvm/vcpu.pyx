"""A vCPU: its thread, its run loop, and how others pause, resume and stop it.

Owns the vCPU descriptor, the shared kvm_run page and the thread. The loop runs without the GIL: KVM_RUN, then the exit
is dispatched to the PIO or MMIO bus, then KVM_RUN again (Documentation/virt/kvm/api.rst, 4.10 and 5).

A kick from another thread sets `immediate_exit` in the kvm_run page and sends the thread a signal. Whichever comes
first, before KVM_RUN or inside it, makes the ioctl return EINTR; none can be lost.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, write

from crackle.includes.kvm cimport *
from crackle.runtime.threads cimport *
from crackle.kvm.bus cimport BUS_CONTINUE, BUS_PANIC, BUS_RESET, Bus

from _thread import start_new_thread

from crackle.errors import KvmError, StateError


cdef extern from "<sys/ioctl.h>" nogil:
    int c_ioctl "ioctl" (int fd, unsigned long request, ...)

cdef enum:
    KICK_AGAIN_NS = 20_000_000

install_kick_handler()

END_NAMES = {
    END_NONE: "running",
    END_ASKED: "stopped",
    END_RESET: "reset",
    END_SHUTDOWN: "shutdown",
    END_TRIPLE_FAULT: "triple-fault",
    END_FAIL_ENTRY: "fail-entry",
    END_INTERNAL_ERROR: "internal-error",
    END_UNHANDLED: "unhandled-exit",
    END_IOCTL: "run-failed",
    END_CRASH: "crash",
    END_PANIC: "panic",
}


cdef void *thread_entry(void *argument) noexcept nogil:
    # The object outlives its thread: close() joins first, and so does dealloc.
    (<VcpuBase> argument).loop()
    return NULL


cdef long checked_ioctl(int fd, unsigned long request, void *argument, str what) except -1:
    cdef long result
    if fd < 0:
        raise KvmError(f"cannot {what}: it is closed")
    with nogil:
        result = c_ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(f"cannot {what}: {strerror(errno).decode()}")
    return result


cdef class VcpuBase:
    """What every architecture's vCPU shares; `crackle.kvm.x86_64.Vcpu` adds the register state.

    fd: the vCPU descriptor, owned from here on. run_size: KVM_GET_VCPU_MMAP_SIZE.
    """

    def __cinit__(self, int fd, int index, size_t run_size, *args):
        # Nothing is ours before this succeeds: __dealloc__ looks at it first.
        self.sync = calloc(1, sizeof(thread_sync))
        if self.sync == NULL:
            raise MemoryError
        self.fd = fd
        self.index = index
        self.exit_fd = -1
        self.run_size = run_size
        init_sync(<thread_sync *> self.sync)
        cdef void *page = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if page == MAP_FAILED:
            raise KvmError(f"cannot map the kvm_run page of vCPU {index}: {strerror(errno).decode()}")
        self.run = <kvm_run *> page

    def __del__(self):
        # Before the collector takes anything away that the thread still uses; it may run on that very thread.
        if self.is_current():
            start_new_thread(self.stop, ())
        else:
            self.stop()

    def __dealloc__(self):
        if self.sync == NULL:
            return
        self.stop()
        if self.run != NULL:
            munmap(self.run, self.run_size)
        if self.fd >= 0:
            close(self.fd)
        destroy_sync(<thread_sync *> self.sync)
        free(self.sync)

    def close(self):
        """Stop the thread and give the descriptor and the kvm_run page back. Idempotent.

        In a forked child, whose they are not, the copies only; StateError on the vCPU's own thread.
        """
        self.stop()
        self.exit_fd = -1
        if self.run != NULL:
            munmap(self.run, self.run_size)
            self.run = NULL
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef int ioctl(self, unsigned long request, void *argument, str what) except -1:
        return <int> checked_ioctl(self.fd, request, argument, f"{what} of vCPU {self.index}")

    # -- the loop ------------------------------------------------------------------------------------------------

    cdef int loop(self) noexcept nogil:
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef int result, error
        cdef uint64_t one = 1
        while True:
            result = c_ioctl(self.fd, KVM_RUN, 0)
            if result >= 0:
                if self.handle():
                    break
                continue
            error = errno
            if error != EINTR and error != EAGAIN:
                self.end.why, self.end.error = END_IOCTL, error
                break
            # An access that exited is completed by the next KVM_RUN; EINTR says that has happened, so here, and only
            # here, the registers are whole. Clear the flag before looking: a kick after the look sets it again.
            self.counts.interrupted += 1
            clear_flag(&self.run.immediate_exit)
            if load_acquire(&self.ask) != ASK_RUN and self.obey():
                break
        pthread_mutex_lock(&sync.mutex)
        self.state = IS_STOPPED
        pthread_cond_broadcast(&sync.changed)
        pthread_mutex_unlock(&sync.mutex)
        if self.end.why != END_ASKED and self.exit_fd >= 0:
            write(self.exit_fd, &one, sizeof(one))
        return 0

    cdef int obey(self) noexcept nogil:
        """Do what another thread asked. Nonzero when the loop must end."""
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef bint stop
        pthread_mutex_lock(&sync.mutex)
        while self.ask == ASK_PAUSE:
            if self.state != IS_PAUSED:
                self.state = IS_PAUSED
                pthread_cond_broadcast(&sync.changed)
            pthread_cond_wait(&sync.changed, &sync.mutex)
        self.run.immediate_exit = 0
        stop = self.ask == ASK_STOP
        if stop:
            self.end.why = END_ASKED
        else:
            self.state = IS_RUNNING
            pthread_cond_broadcast(&sync.changed)
        pthread_mutex_unlock(&sync.mutex)
        return stop

    cdef int handle(self) noexcept nogil:
        """Dispatch one exit. Nonzero when the loop must end; `end` then says why."""
        cdef kvm_run *run = self.run
        cdef uint32_t reason = run.exit_reason
        cdef int action = BUS_CONTINUE
        cdef uint32_t i
        cdef uint64_t start = 0
        if self.profile:
            start = now_ns()
        if reason == KVM_EXIT_IO:
            action = self.handle_pio()
            if self.profile:
                self.counts.ns_pio += now_ns() - start
        elif reason == KVM_EXIT_MMIO:
            if run.mmio.is_write:
                self.counts.mmio_write += 1
            else:
                self.counts.mmio_read += 1
            action = self.mmio.access(run.mmio.phys_addr, run.mmio.data, run.mmio.len, run.mmio.is_write)
            if self.profile:
                self.counts.ns_mmio += now_ns() - start
        elif reason == KVM_EXIT_INTR or reason == KVM_EXIT_IRQ_WINDOW_OPEN:
            pass
        else:
            self.end.exit_reason = reason
            if reason == KVM_EXIT_SHUTDOWN:
                self.end.why = END_TRIPLE_FAULT
            elif reason == KVM_EXIT_FAIL_ENTRY:
                self.end.why = END_FAIL_ENTRY
                self.end.ndata = 1
                self.end.data[0] = run.fail_entry.hardware_entry_failure_reason
            elif reason == KVM_EXIT_INTERNAL_ERROR:
                self.end.why = END_INTERNAL_ERROR
                self.end.suberror = run.internal.suberror
                self.end.ndata = min(run.internal.ndata, 16)
                for i in range(self.end.ndata):
                    self.end.data[i] = run.internal.data[i]
            elif reason == KVM_EXIT_SYSTEM_EVENT and run.system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN:
                self.end.why = END_SHUTDOWN
            elif reason == KVM_EXIT_SYSTEM_EVENT and run.system_event.type == KVM_SYSTEM_EVENT_RESET:
                self.end.why = END_RESET
            elif reason == KVM_EXIT_SYSTEM_EVENT and run.system_event.type == KVM_SYSTEM_EVENT_CRASH:
                self.end.why = END_CRASH
            else:
                self.end.why = END_UNHANDLED
                self.end.ndata = 1
                self.end.data[0] = run.hw.hardware_exit_reason
            return 1
        if action != BUS_CONTINUE:
            self.end.why = END_RESET if action == BUS_RESET else END_PANIC if action == BUS_PANIC else END_SHUTDOWN
            return 1
        return 0

    cdef int handle_pio(self) noexcept nogil:
        # A string instruction (rep outsb) delivers `count` items of `size` bytes at once.
        cdef kvm_run *run = self.run
        cdef uint32_t count = run.io.count, size = run.io.size
        cdef bint is_write = run.io.direction == KVM_EXIT_IO_OUT
        cdef uint8_t *data = <uint8_t *> run + run.io.data_offset
        cdef int action
        if is_write:
            self.counts.pio_out += 1
        else:
            self.counts.pio_in += 1
        while count > 0:
            action = self.pio.access(run.io.port, data, size, is_write)
            if action != BUS_CONTINUE:
                return action
            data += size
            count -= 1
        return BUS_CONTINUE

    # -- from other threads --------------------------------------------------------------------------------------

    cdef bint is_current(self) noexcept nogil:
        return (self.state != IS_NEW and not self.joined and is_ours(<thread_sync *> self.sync)
                and (<thread_sync *> self.sync).thread == pthread_self())

    cdef int check_waiter(self) except -1:
        if self.is_current():
            raise StateError(f"the thread of vCPU {self.index} cannot wait for itself")
        return 0

    @property
    def ident(self):
        """The thread, as threading.get_ident() names it; 0 without one."""
        return 0 if self.state == IS_NEW or self.joined else (<thread_sync *> self.sync).thread

    def start(self, Bus pio not None, Bus mmio not None, int exit_fd=-1, bint paused=False, bint profile=False):
        """Start the thread. Exits go to the two buses; `exit_fd`, an eventfd, is written when the guest ends itself.

        paused: come up paused, as after `pause()`. profile: also sum the nanoseconds spent handling exits.
        """
        cdef int error
        if self.state != IS_NEW:
            raise StateError(f"vCPU {self.index} has been started already")
        if self.fd < 0:
            raise StateError(f"vCPU {self.index} is closed")
        self.pio, self.mmio, self.exit_fd, self.profile = pio, mmio, exit_fd, profile
        self.ask = ASK_PAUSE if paused else ASK_RUN
        self.run.immediate_exit = paused
        self.state = IS_RUNNING
        name = f"vcpu {self.index}".encode()
        error = start_thread(<thread_sync *> self.sync, thread_entry, <void *> self, name)
        if error:
            self.state = IS_NEW
            raise KvmError(f"cannot start the thread of vCPU {self.index}: {strerror(error).decode()}")

    cdef join(self):
        cdef bint first = not self.joined
        self.joined = True
        self.request(ASK_STOP)
        with nogil:
            self.wait_settled(<uint64_t> -1 >> 1)
            if first:
                pthread_join((<thread_sync *> self.sync).thread, NULL)

    cdef request(self, int what):
        cdef thread_sync *sync = <thread_sync *> self.sync
        if not is_ours(<thread_sync *> self.sync):
            return
        with nogil:
            pthread_mutex_lock(&sync.mutex)
            store_ordered(&self.ask, what)
            if self.state != IS_STOPPED:
                if what != ASK_RUN:
                    self.run.immediate_exit = 1
                    pthread_kill(sync.thread, KICK_SIGNAL)
                pthread_cond_broadcast(&sync.changed)
            pthread_mutex_unlock(&sync.mutex)

    def request_pause(self):
        """Ask the thread to pause and return at once; `wait_paused` waits for it."""
        if self.state != IS_NEW and self.ask != ASK_STOP:
            self.request(ASK_PAUSE)

    def wait_paused(self, double timeout=10.0):
        """Wait until the vCPU is paused or has ended. KvmError after `timeout` seconds, StateError on its own thread."""
        cdef bint done
        cdef uint64_t timeout_ns = <uint64_t> (timeout * 1e9)
        self.check_waiter()
        with nogil:
            done = self.wait_settled(timeout_ns)
        if not done:
            raise KvmError(f"vCPU {self.index} did not pause within {timeout:g} s")

    cdef bint wait_settled(self, uint64_t timeout_ns) noexcept nogil:
        """Wait until the vCPU is paused or has ended. False when `timeout_ns` passed first."""
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef uint64_t end = now_ns() + timeout_ns
        cdef bint done
        pthread_mutex_lock(&sync.mutex)
        while True:
            done = self.state == IS_PAUSED and self.ask == ASK_PAUSE or self.state in (IS_NEW, IS_STOPPED)
            if done or now_ns() >= end:
                break
            # A kick may have come just before a device's write to a full pipe: kick again until it is heard.
            if wait_changed(sync, KICK_AGAIN_NS):
                self.run.immediate_exit = 1
                pthread_kill(sync.thread, KICK_SIGNAL)
        pthread_mutex_unlock(&sync.mutex)
        return done

    def pause(self, double timeout=10.0):
        """Pause and wait for it. The registers can then be read and written. Idempotent."""
        self.request_pause()
        self.wait_paused(timeout)

    def resume(self):
        """Let a paused vCPU run on. Idempotent."""
        if self.state != IS_NEW and self.ask == ASK_PAUSE:
            self.request(ASK_RUN)

    def request_stop(self):
        """Ask the thread to end and return at once; `stop` waits for it."""
        if self.state != IS_NEW:
            self.request(ASK_STOP)

    def stop(self):
        """End the thread, wherever it is, and wait for it. Idempotent; StateError on that thread itself."""
        self.check_waiter()
        if self.state != IS_NEW and is_ours(<thread_sync *> self.sync):
            self.join()

    @property
    def status(self):
        """"new", "running", "paused", or why it ended: "stopped", "reset", "shutdown", "triple-fault", ..."""
        # Looked at once: the thread may end meanwhile.
        cdef int state = load_acquire(&self.state)
        if state == IS_STOPPED:
            return END_NAMES[self.end.why]
        return ("new", "running", "paused")[state]

    @property
    def exits(self):
        """Exits so far by kind, and nanoseconds spent handling them (zero unless profiling)."""
        return self.counts

    @property
    def failure(self):
        """None, or why this vCPU could not go on, in words; the registers are added by the architecture."""
        cdef end_record *end = &self.end
        if self.state != IS_STOPPED or end.why in (END_ASKED, END_RESET, END_SHUTDOWN, END_PANIC):
            return None
        if end.why == END_TRIPLE_FAULT:
            text = "the guest shut the CPU down (triple fault)"
        elif end.why == END_FAIL_ENTRY:
            text = f"KVM could not enter the guest: hardware entry failure reason {end.data[0]:#x}"
        elif end.why == END_INTERNAL_ERROR:
            data = " ".join(f"{end.data[i]:#x}" for i in range(end.ndata))
            kind = "instruction emulation failed" if end.suberror == KVM_INTERNAL_ERROR_EMULATION else "internal error"
            text = f"KVM {kind}: suberror {end.suberror}" + (f", data {data}" if data else "")
        elif end.why == END_IOCTL:
            text = f"KVM_RUN failed: {strerror(end.error).decode()}"
        elif end.why == END_CRASH:
            text = "the guest reported a crash"
        else:
            text = f"KVM exit reason {end.exit_reason} is not handled: hardware reason {end.data[0]:#x}"
        return f"vCPU {self.index}: {text}"

    # -- without a thread ----------------------------------------------------------------------------------------

    def run_once(self):
        """KVM_RUN once in the calling thread, not dispatched: ("io"|"mmio"|"hlt"|..., details). For probes and tests.

        ("interrupted", None) when a signal or `kick` came first. ("io", (port, is_write, size, data bytes)),
        ("mmio", (gpa, is_write, length, data bytes)), ("exit", reason number).
        """
        cdef kvm_run *run = self.run
        cdef int result
        if self.state != IS_NEW or self.fd < 0:
            raise StateError(f"vCPU {self.index} has a thread or is closed")
        with nogil:
            result = c_ioctl(self.fd, KVM_RUN, 0)
        if result < 0:
            if errno == EINTR or errno == EAGAIN:
                run.immediate_exit = 0
                return "interrupted", None
            raise KvmError(f"KVM_RUN of vCPU {self.index} failed: {strerror(errno).decode()}")
        if run.exit_reason == KVM_EXIT_IO:
            data = (<uint8_t *> run + run.io.data_offset)[:run.io.size * run.io.count]
            return "io", (run.io.port, run.io.direction == KVM_EXIT_IO_OUT, run.io.size, data)
        if run.exit_reason == KVM_EXIT_MMIO:
            return "mmio", (run.mmio.phys_addr, bool(run.mmio.is_write), run.mmio.len, run.mmio.data[:run.mmio.len])
        return "exit", run.exit_reason

    def answer(self, bytes data not None):
        """Give the guest `data` as the result of the port or MMIO read that the last `run_once` returned."""
        cdef uint8_t *place
        cdef Py_ssize_t room, i
        if self.run == NULL:
            raise StateError(f"vCPU {self.index} is closed")
        if self.run.exit_reason == KVM_EXIT_IO:
            place, room = <uint8_t *> self.run + self.run.io.data_offset, self.run.io.size * self.run.io.count
        elif self.run.exit_reason == KVM_EXIT_MMIO:
            place, room = self.run.mmio.data, self.run.mmio.len
        else:
            raise StateError("the last exit was no read")
        if len(data) != room:
            raise ValueError(f"the guest asked for {room} bytes, not {len(data)}")
        for i in range(room):
            place[i] = data[i]

    def kick(self):
        """Make a `run_once` in another thread, present or next, return "interrupted" as soon as the guest exits."""
        if self.run != NULL:
            self.run.immediate_exit = 1

    def time_exits(self, uint64_t count):
        """Nanoseconds for `count` KVM_RUN round trips that do nothing with the exit: the floor an exit can cost here."""
        cdef uint64_t _i, start
        cdef int result = 0
        if self.state != IS_NEW or self.fd < 0:
            raise StateError(f"vCPU {self.index} has a thread or is closed")
        with nogil:
            start = now_ns()
            for _i in range(count):
                result = c_ioctl(self.fd, KVM_RUN, 0)
                if result < 0:
                    break
            start = now_ns() - start
        if result < 0:
            raise KvmError(f"KVM_RUN of vCPU {self.index} failed: {strerror(errno).decode()}")
        return start
