"""A vCPU: its thread, its run loop, and how others pause, resume and stop it.

Owns the vCPU descriptor, the shared kvm_run page and the thread. The loop runs without the GIL: KVM_RUN, then the exit
is dispatched to the PIO or MMIO bus, then KVM_RUN again (Documentation/virt/kvm/api.rst, 4.10 and 5).

A kick from another thread sets `immediate_exit` in the kvm_run page and sends the thread a signal. Whichever comes
first, before KVM_RUN or inside it, makes the ioctl return EINTR. None can be lost: who kicks has said what it wants before,
and the thread clears the flag before it looks for that.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport strerror
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, usleep, write

from crackle.includes.kvm cimport *
from crackle.runtime.threads cimport *
from crackle.kvm.bus cimport BUS_CONTINUE, BUS_PANIC, BUS_RESET, Bus

from crackle.errors import KvmError, StateError


cdef extern from "<sys/ioctl.h>" nogil:
    int c_ioctl "ioctl" (int fd, unsigned long request, ...)

cdef enum:
    # A second in all, most of it asleep
    AGAIN_AT_ONCE = 16
    AGAIN_MOST = 1016
    AGAIN_US = 1000

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


cdef void kick_vcpu(void *argument) noexcept nogil:
    set_flag(&(<VcpuBase> argument).run.immediate_exit)
    kick_thread((<VcpuBase> argument).worker.thread)


cdef long checked_ioctl(int fd, unsigned long request, void *argument, str what) except -1:
    cdef long result
    if fd < 0:
        raise KvmError(f"cannot {what}: it is closed")
    with nogil:
        result = c_ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(f"cannot {what}: {strerror(errno).decode()}")
    return result


cdef class VcpuBase(Worker):
    """What every architecture's vCPU shares; `crackle.kvm.x86_64.Vcpu` adds the register state.

    Paused, it stands between two instructions: the registers can be read and written.
    fd: the vCPU descriptor, owned from here on. run_size: KVM_GET_VCPU_MMAP_SIZE.
    """

    def __cinit__(self, int fd, int index, size_t run_size, *args):
        init_worker(&self.worker, kick_vcpu, <void *> self)
        self.made = True
        self.fd = fd
        self.index = index
        self.exit_fd = -1
        self.run_size = run_size
        cdef void *page = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if page == MAP_FAILED:
            raise KvmError(f"cannot map the kvm_run page of vCPU {index}: {strerror(errno).decode()}")
        self.run = <kvm_run *> page

    def __dealloc__(self):
        if not self.made:
            return
        self.stop()
        if self.run != NULL:
            munmap(self.run, self.run_size)
        if self.fd >= 0:
            close(self.fd)

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

    cdef void loop(self) noexcept nogil:
        cdef uint64_t one = 1
        self.pio.enter(&self.pio_reader)
        self.mmio.enter(&self.mmio_reader)
        self.run_guest()
        self.mmio.leave(&self.mmio_reader)
        self.pio.leave(&self.pio_reader)
        end_worker(&self.worker)
        if self.end.why != END_ASKED and self.exit_fd >= 0:
            write(self.exit_fd, &one, sizeof(one))

    cdef void run_guest(self) noexcept nogil:
        """Until the guest ends, or somebody ends it; `end` says why."""
        cdef int result, error, again = 0
        while True:
            result = c_ioctl(self.fd, KVM_RUN, 0)
            if result >= 0:
                again = 0
                if self.handle():
                    return
                continue
            error = errno
            # EAGAIN is for a processor that is being started, a few times; for ever where KVM gets no thread of its own.
            again = again + 1 if error == EAGAIN else 0
            if again > AGAIN_AT_ONCE:
                usleep(AGAIN_US)
            if error != EINTR and error != EAGAIN or again == AGAIN_MOST:
                self.end.why, self.end.error = END_IOCTL, error
                return
            # An access that exited is completed by the next KVM_RUN; EINTR says that has happened, so here, and only
            # here, the registers are whole.
            self.counts.interrupted += 1
            if self.obey():
                self.end.why = END_ASKED
                return

    cdef bint obey(self) noexcept nogil:
        """Do what another thread asks; whether the loop must end."""
        while True:
            # A kick after the look sets the flag again.
            clear_flag(&self.run.immediate_exit)
            if load_ordered(&self.worker.ask) == ASK_RUN:
                return False
            if rest(&self.worker):
                return True

    cdef int handle(self) noexcept nogil:
        """Dispatch one exit. Nonzero when the loop must end; `end` then says why."""
        cdef kvm_run *run = self.run
        cdef uint32_t reason = run.exit_reason
        cdef int action = BUS_CONTINUE
        cdef uint32_t i
        cdef uint64_t start = 0
        if self.profile:
            start = now_ns()
        if reason == KVM_EXIT_MMIO:
            if run.mmio.is_write:
                self.counts.mmio_write += 1
            else:
                self.counts.mmio_read += 1
            action = self.mmio.access(&self.mmio_reader, run.mmio.phys_addr, run.mmio.data, run.mmio.len, run.mmio.is_write)
            if self.profile:
                self.counts.ns_mmio += now_ns() - start
        elif reason == KVM_EXIT_INTR or reason == KVM_EXIT_IRQ_WINDOW_OPEN:
            pass
        elif self.handle_own(reason, &action):
            if self.profile:
                self.counts.ns_pio += now_ns() - start
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

    cdef bint handle_own(self, uint32_t reason, int *action) noexcept nogil:
        """Dispatch an exit that only this architecture has; whether it is one."""
        return False

    # -- from other threads --------------------------------------------------------------------------------------

    def start(
        self, Bus pio not None, Bus mmio not None, int exit_fd=-1, bint paused=False, bint profile=False, str kind="vcpu"
    ):
        """Start the thread. Exits go to the two buses; `exit_fd`, an eventfd, is written when the guest ends itself.

        paused: come up paused, as after `pause()`. profile: also sum the nanoseconds spent handling exits. kind: of the
        thread.
        """
        if load_acquire(&self.worker.state) != IS_NEW:
            raise StateError(f"vCPU {self.index} has been started already")
        if self.fd < 0:
            raise StateError(f"vCPU {self.index} is closed")
        self.pio, self.mmio, self.exit_fd, self.profile = pio, mmio, exit_fd, profile
        self.run.immediate_exit = paused
        start_worker(&self.worker, kind, f"fc_vcpu {self.index}", thread_entry, paused)

    @property
    def name(self):
        """In messages."""
        return f"vCPU {self.index}"

    @property
    def status(self):
        """"new", "running", "paused", or why it ended: "stopped", "reset", "shutdown", "triple-fault", ..."""
        status = Worker.status.__get__(self)
        return END_NAMES[self.end.why] if status == "stopped" else status

    @property
    def exits(self):
        """Exits so far by kind, and nanoseconds spent handling them (zero unless profiling)."""
        return self.counts

    @property
    def failure(self):
        """None, or why this vCPU could not go on, in words; the registers are added by the architecture."""
        cdef end_record *end = &self.end
        if load_acquire(&self.worker.state) != IS_STOPPED or end.why in (END_ASKED, END_RESET, END_SHUTDOWN, END_PANIC):
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
            if end.error == EAGAIN:
                text += "; KVM could not start a thread for a second, which a limit of processes or threads may forbid"
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
        if self.worker.state != IS_NEW or self.fd < 0:
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
            set_flag(&self.run.immediate_exit)

    def time_exits(self, uint64_t count):
        """Nanoseconds for `count` KVM_RUN round trips that do nothing with the exit: the floor an exit can cost here."""
        cdef uint64_t _i, start
        cdef int result = 0
        if self.worker.state != IS_NEW or self.fd < 0:
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
