"""The image: the memory that a zygote's children have alike, as a file, of which each has a private mapping.

A page that a forked child writes to is its own from then on, even when it has again what it had before: Python counts
references, in the object itself, so whoever only looks at one writes to it. Anonymous memory stays so; a private mapping
of a file can be given back, page by page, and has the file's content again. So a zygote that is warm has its memory put
into a sealed memfd (`take`), and a child that has settled gives back what is as it was (`give_back`).

Objects that the zygote has never die in a child. They get so large a count of references that a child may lose count: a
page in which nothing else has changed has its old counts again. From Python 3.12 on there is a count that is not written
to at all. Neither is done by an interpreter without a GIL, which counts otherwise.

Owns the file's mappings and, for each word of them, whether it is such a count. They are inherited, and never given back.
"""

from cpython.mem cimport PyObject_Free, PyObject_Malloc
from cpython.object cimport PyObject
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from posix.unistd cimport close, pread, pwrite

from crackle.runtime.mappings cimport *
from crackle.runtime.threads cimport now_ns

import gc
import os

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/sysmacros.h>
    #include <unistd.h>

    #ifndef MFD_NOEXEC_SEAL         /* <linux/memfd.h>, as of 6.3 */
    #define MFD_NOEXEC_SEAL 8u
    #endif

    static int make_memfd(const char *name) {
        int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
        return fd >= 0 ? fd : memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }

    #include <malloc.h>
    #if !__GLIBC_PREREQ(2, 33)
    #define mallinfo2 mallinfo
    #endif
    /* Where the part of the heap begins from which nothing has been taken yet. */
    static char *heap_top(void) {
        return (char *) sbrk(0) - mallinfo2().keepcost;
    }

    #define seal(fd) fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

    static void identify(int fd, uint64_t *inode, uint32_t *major, uint32_t *minor) {
        struct stat found = { 0 };
        fstat(fd, &found);
        *inode = found.st_ino;
        *major = gnu_dev_major(found.st_dev);
        *minor = gnu_dev_minor(found.st_dev);
    }

    /* The thread's descriptor: the kernel writes to it whenever it likes (rseq(2), set_tid_address(2)). */
    #define own_descriptor() ((uintptr_t) __builtin_thread_pointer())

    static int block_signals(sigset_t *before) {
        sigset_t all;
        sigfillset(&all);
        return pthread_sigmask(SIG_SETMASK, &all, before);
    }
    #define restore_signals(before) pthread_sigmask(SIG_SETMASK, before, NULL)

    #ifdef Py_GIL_DISABLED
    #define HAS_GIL 0
    #else
    #define HAS_GIL 1
    #endif

    /* More references than memory has room for: whatever a child forgets to count, what is left is no object's end. */
    #if PY_VERSION_HEX >= 0x030E0000
    #define COUNTS_MAY_BE_LOST 0
    #define make_immortal(object) ((object)->ob_refcnt = _Py_IMMORTAL_INITIAL_REFCNT)
    #elif PY_VERSION_HEX >= 0x030C0000
    #define COUNTS_MAY_BE_LOST 0
    #define make_immortal(object) ((object)->ob_refcnt = _Py_IMMORTAL_REFCNT)
    #else
    #define COUNTS_MAY_BE_LOST 1
    #define make_immortal(object) ((object)->ob_refcnt += (Py_ssize_t) 1 << 44)
    #endif

    #if PY_VERSION_HEX >= 0x030C0000
    static void visit_names(PyTypeObject *type, visitproc visit, void *argument) {
        PyObject *names = PyType_GetDict(type);
        if (names) {
            visit(names, argument);
            Py_DECREF(names);
        }
    }
    #else
    static void visit_names(PyTypeObject *type, visitproc visit, void *argument) {
        if (type->tp_dict)
            visit(type->tp_dict, argument);
    }
    #endif

    /* Python 3.11 counts the calls of a function, in its code, until it is worth specialising; 0 is for one that has been. */
    #if PY_VERSION_HEX < 0x030C0000
    #define stop_warming(code) ((code)->co_warmup = 0)
    #else
    #define stop_warming(code) ((void) 0)
    #endif

    /* What is noted in an object when it is first asked for, a string's hash and a type's version, is so now. */
    static void complete(PyObject *object, PyObject *name) {
        if (PyUnicode_Check(object) || PyBytes_Check(object))
            PyObject_Hash(object);
        else if (PyType_Check(object) && ((PyTypeObject *) object)->tp_mro
                 && !PyType_HasFeature((PyTypeObject *) object, Py_TPFLAGS_VALID_VERSION_TAG))
            _PyType_Lookup((PyTypeObject *) object, name);
    }

    /* What an object refers to; those of types and code objects the collector of garbage has no need to know. */
    static void visit_referents(PyObject *object, visitproc visit, void *argument) {
        #define VISIT(each) ((each) ? visit((PyObject *) (each), argument) : 0)
        visit((PyObject *) Py_TYPE(object), argument);
        if (PyType_Check(object)) {
            PyTypeObject *type = (PyTypeObject *) object;
            visit_names(type, visit, argument);
            VISIT(type->tp_mro);
            VISIT(type->tp_bases);
            VISIT(type->tp_base);
        }
        if (PyCode_Check(object)) {
            PyCodeObject *code = (PyCodeObject *) object;
            stop_warming(code);
            VISIT(code->co_consts);
            VISIT(code->co_names);
            VISIT(code->co_exceptiontable);
            VISIT(code->co_localsplusnames);
            VISIT(code->co_localspluskinds);
            VISIT(code->co_filename);
            VISIT(code->co_name);
            VISIT(code->co_qualname);
            VISIT(code->co_linetable);
        }
        if (PyObject_IS_GC(object) && Py_TYPE(object)->tp_traverse)
            Py_TYPE(object)->tp_traverse(object, visit, argument);
        #undef VISIT
    }
    """
    ctypedef struct sigset_t:
        pass
    ctypedef int (*visitproc)(PyObject *, void *) noexcept nogil
    enum:
        HAS_GIL
        COUNTS_MAY_BE_LOST
        MADV_DONTNEED
    char *heap_top()
    int make_memfd(const char *name)
    int seal(int fd)
    int ftruncate(int fd, int64_t size)
    int madvise(void *address, size_t size, int advice)
    void identify(int fd, uint64_t *inode, uint32_t *major, uint32_t *minor)
    uintptr_t own_descriptor()
    int block_signals(sigset_t *before)
    int restore_signals(const sigset_t *before)
    void make_immortal(PyObject *) nogil
    void complete(PyObject *, PyObject *) nogil
    void visit_referents(PyObject *, visitproc, void *) nogil

cdef enum:
    PAGE = 4096             # <asm/page.h>: where pages are larger, nothing is done
    DESCRIPTOR = 8192       # bytes of a thread's descriptor, and more
    # Less is not worth a mapping of its own: the data of a module.
    SPAN_MIN = 64 << 10
    SPANS = 64
    # Of Python's allocator: small objects come in sizes of so many bytes, from pools of such a size.
    SMALL_STEP = 16
    SMALL_MOST = 512
    POOL = 16 << 10
    LARGE_MOST = 64 << 10
    # Bytes that are taken of each size at most, whichever allocator there is.
    GAPS = 512 << 10
    ENTRIES = 512           # of /proc/PID/pagemap, at a time
    RESTING = 64
    # Pages of one's own that are looked at in a moment however short it is: some time goes by before the first.
    PAGES_MIN = 64

# Documentation/admin-guide/mm/pagemap.rst: bits of an entry.
cdef uint64_t PRESENT = 1ull << 63, OF_FILE = 1ull << 61, EXCLUSIVE = 1ull << 56
# A place in the file is the address at which it is mapped, so that what is remapped elsewhere is seen to be.
cdef int64_t FILE_SIZE = 1ll << 47
cdef const char *NAME = "crackle-zygote"


cdef struct span:
    uintptr_t start, end
    const uint8_t *view     # the same pages of the file, to be read only
    uint8_t *marks          # a bit for each word that is the count of references of an object which never dies

cdef span[SPANS] spans
cdef int span_count = 0
cdef uint64_t image_inode = 0
cdef uint32_t image_major = 0, image_minor = 0
# Where the next call goes on; 0 is at the beginning.
cdef uintptr_t next_page = 0
cdef int looked_at = 0


# -- the zygote --------------------------------------------------------------------------------------------------------

def take():
    """Have this process's memory in a file from here on, and all objects that it has for good; the file's size in bytes.

    By a process without other threads, when it is warm, once. 0 where that is not to be had: then nothing has changed
    but that gc.freeze() has been called, or less is in the file.
    """
    if not HAS_GIL or span_count or os.sysconf("SC_PAGE_SIZE") != PAGE or len(os.listdir("/proc/self/task")) > 1:
        gc.freeze()
        return 0
    find_spans()
    immortalise(gc.get_objects())
    gc.freeze()
    fill_gaps()
    return put_into_file()


cdef void fill_gaps() noexcept:
    """Take what is free between that which is in use, for good: what a child makes lies together then, elsewhere."""
    cdef size_t size, taken
    cdef char *block
    cdef char *last
    for size in range(SMALL_STEP, SMALL_MOST + 1, SMALL_STEP):
        last, taken = NULL, 0
        while taken < GAPS:
            block = <char *> PyObject_Malloc(size)
            # One behind the other: those of a pool that nobody has used yet.
            if block == NULL or (last != NULL and block == last + size and is_first(last)):
                PyObject_Free(block)
                PyObject_Free(last)
                break
            last = block
            taken += size
    fill_heap()


cdef bint is_first(const char *block) noexcept nogil:
    """Whether it is the first of its pool."""
    return (<uintptr_t> block & (POOL - 1)) < 64


cdef void fill_heap() noexcept nogil:
    cdef size_t size = LARGE_MOST, taken
    cdef char *block
    cdef char *top
    while size >= SMALL_STEP:
        taken, top = 0, heap_top()
        while taken < GAPS:
            block = <char *> malloc(size)
            # Cut off what has not been in use yet.
            if block == NULL or block >= top:
                free(block)
                break
            taken += size
        size = size // 2 if size > 2048 else size - SMALL_STEP


cdef void find_spans() noexcept:
    """Private memory that is worth it, but the stack and what the kernel writes to by itself."""
    cdef listing maps
    cdef mapping m
    cdef uintptr_t stack = <uintptr_t> &maps, descriptor = own_descriptor() & ~<uintptr_t> (PAGE - 1)
    list_mappings(&maps, READABLE | WRITABLE)
    while next_mapping(&maps, &m):
        if not has_access(&m, "rw-p") or m.start <= stack < m.end:
            continue
        if m.start <= descriptor < m.end:
            add_span(m.start, descriptor)
            m.start = min(descriptor + DESCRIPTOR, m.end)
        add_span(m.start, m.end)
    forget_mappings(&maps)


cdef void add_span(uintptr_t start, uintptr_t end) noexcept:
    global span_count
    cdef span *s = &spans[span_count]
    if end - start < SPAN_MIN or span_count == SPANS:
        return
    s.marks = <uint8_t *> mmap(
        NULL, (end - start) // 64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if s.marks == <uint8_t *> MAP_FAILED:
        return
    s.start, s.end, s.view = start, end, NULL
    span_count += 1


cdef span *span_of(uintptr_t address) noexcept nogil:
    cdef int i
    for i in range(span_count):
        if spans[i].start <= address < spans[i].end:
            return &spans[i]
    return NULL


cdef struct pending:
    PyObject **objects
    size_t count


cdef immortalise(list objects):
    """Mark and make immortal what is in the spans and can be reached from `objects`."""
    cdef pending found
    cdef size_t size = 0
    cdef int i
    for i in range(span_count):
        # No object is smaller than its count and its type.
        size += (spans[i].end - spans[i].start) // 2
    found.count = 0
    found.objects = <PyObject **> mmap(
        NULL, max(size, <size_t> PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    )
    if found.objects == <PyObject **> MAP_FAILED:
        return
    name = "__class__"
    for each in objects:
        reach(<PyObject *> each, &found)
    while found.count:
        found.count -= 1
        complete(found.objects[found.count], <PyObject *> name)
        visit_referents(found.objects[found.count], reach, &found)
    munmap(found.objects, max(size, <size_t> PAGE))


cdef int reach(PyObject *each, void *argument) noexcept nogil:
    cdef pending *found = <pending *> argument
    cdef span *s = span_of(<uintptr_t> each)
    cdef uintptr_t word
    if s == NULL:
        return 0
    word = (<uintptr_t> each - s.start) >> 3
    if not s.marks[word >> 3] >> (word & 7) & 1:
        s.marks[word >> 3] |= 1 << (word & 7)
        make_immortal(each)
        found.objects[found.count] = each
        found.count += 1
    return 0


cdef int64_t put_into_file() noexcept nogil:
    """Map the spans from a memfd, which has been made of them. Nothing here writes to any, but by system calls that fail."""
    global image_inode, image_major, image_minor
    cdef listing maps
    cdef mapping m
    cdef sigset_t before
    cdef span *s
    cdef int64_t size = 0
    cdef int fd = make_memfd(NAME), i
    if fd < 0 or ftruncate(fd, FILE_SIZE):
        close(fd)
        return 0
    identify(fd, &image_inode, &image_major, &image_minor)
    list_mappings(&maps, READABLE | WRITABLE)
    block_signals(&before)
    while next_mapping(&maps, &m):
        for i in range(span_count):
            s = &spans[i]
            # What has been unmapped since, or in part, is no longer there.
            if has_access(&m, "rw-p") and m.start <= s.start < m.end:
                s.end = min(s.end, m.end)
                if map_from(fd, s):
                    size += s.end - s.start
    restore_signals(&before)
    forget_mappings(&maps)
    seal(fd)
    close(fd)
    return size


cdef bint map_from(int fd, span *s) noexcept nogil:
    cdef size_t done = 0, size = s.end - s.start
    cdef ssize_t part
    cdef void *view
    view = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, <int64_t> s.start)
    if view == MAP_FAILED:
        return False
    while done < size:
        part = pwrite(fd, <char *> s.start + done, size - done, <int64_t> (s.start + done))
        if part <= 0:
            munmap(view, size)
            return False
        done += part
    if mmap(<void *> s.start, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, <int64_t> s.start) == MAP_FAILED:
        munmap(view, size)
        return False
    s.view = <const uint8_t *> view
    return True


# -- its children ------------------------------------------------------------------------------------------------------

def give_back(resting=(), unsigned int microseconds=0):
    """Give back the pages that are as the zygote had them, and those of which only reference counts differ; their bytes.

    To be called where no other thread of this process can write to anything but its stack: all are workers that stand
    still, `resting`, and this one has the GIL. microseconds: when that has been long enough, 0 for no limit; `unfinished`
    says whether there is more, with which the next call goes on.
    """
    cdef uintptr_t[2 * RESTING] places
    cdef int count = 0
    if not span_count:
        return 0
    if len(resting) > RESTING:
        raise ValueError(f"at most {RESTING} workers, not {len(resting)}")
    for worker in resting:
        # What it waits on is in it, and may be written to by those who wait.
        places[2 * count] = <uintptr_t> <void *> worker
        places[2 * count + 1] = places[2 * count] + <size_t> type(worker).__basicsize__
        count += 1
    return drop_unchanged(places, count, now_ns() + 1000 * <uint64_t> microseconds if microseconds else UINT64_MAX)


def taken():
    """Whether this process, or the zygote that it comes from, has its memory in a file."""
    return span_count > 0


def unfinished():
    """Whether the last `give_back` has not come to the end."""
    return next_page != 0


cdef int64_t drop_unchanged(const uintptr_t *places, int count, uint64_t until) noexcept nogil:
    global next_page, looked_at
    cdef listing maps
    cdef mapping m
    cdef sigset_t before
    cdef int64_t dropped = 0
    cdef uintptr_t begin = next_page
    cdef span *s
    cdef int pages, i = 0
    cdef bint more
    next_page = 0
    looked_at = 0
    pages = open_pagemap()
    if pages < 0:
        return 0
    # A handler would write to what the interpreter has.
    block_signals(&before)
    list_mappings(&maps, READABLE | WRITABLE | OF_A_FILE)
    skip_to(&maps, begin)
    more = next_mapping(&maps, &m)
    while more and i < span_count and not next_page:
        s = &spans[i]
        if s.view == NULL or s.end <= max(m.start, begin):
            i += 1
        elif m.end <= s.start:
            skip_to(&maps, s.start)
            more = next_mapping(&maps, &m)
        else:
            if is_of_image(&m):
                dropped += drop_from(
                    s, max(m.start, s.start, begin), min(m.end, s.end), pages, places, count, until
                )
            if m.end < s.end:
                more = next_mapping(&maps, &m)
            else:
                i += 1
    forget_mappings(&maps)
    restore_signals(&before)
    close(pages)
    return dropped


cdef bint is_of_image(mapping *m) noexcept nogil:
    """Still mapped from the image, and where it was: anything may have come in its place."""
    return (
        has_access(m, "rw-p") and m.offset == m.start and m.inode == image_inode
        and m.major == image_major and m.minor == image_minor
    )


cdef int64_t drop_from(
    span *s, uintptr_t start, uintptr_t end, int pages, const uintptr_t *places, int count, uint64_t until
) noexcept nogil:
    """Drop what can be of a part of a span, until then."""
    global next_page, looked_at
    cdef uint64_t[ENTRIES] entries
    cdef uintptr_t at = start, run = start
    cdef int64_t dropped = 0
    cdef ssize_t got
    cdef int i
    while at < end and not next_page:
        got = pread(pages, entries, min(<size_t> ENTRIES, (end - at) // PAGE) * 8, <int64_t> (at // PAGE * 8)) // 8
        if got <= 0:
            break
        for i in range(<int> got):
            if not (
                entries[i] & PRESENT and entries[i] & EXCLUSIVE and not entries[i] & OF_FILE
                and not is_written(places, count, at) and is_as_before(s, at)
            ):
                dropped += drop(run, at)
                run = at + PAGE
            at += PAGE
            # Pages that are not one's own cost next to nothing.
            if entries[i] & EXCLUSIVE:
                looked_at += 1
                if looked_at >= PAGES_MIN and now_ns() >= until:
                    next_page = at
                    break
    # What it was compared with.
    madvise(<void *> (s.view + (start - s.start)), at - start, MADV_DONTNEED)
    return dropped + drop(run, at)


cdef int64_t drop(uintptr_t start, uintptr_t end) noexcept nogil:
    return 0 if start >= end or madvise(<void *> start, end - start, MADV_DONTNEED) else <int64_t> (end - start)


cdef bint is_written(const uintptr_t *places, int count, uintptr_t page) noexcept nogil:
    """Whether a worker that rests has something in it."""
    cdef int i
    for i in range(count):
        if page < places[2 * i + 1] and places[2 * i] < page + PAGE:
            return True
    return False


cdef bint is_as_before(span *s, uintptr_t page) noexcept nogil:
    cdef const uint64_t *own = <const uint64_t *> page
    cdef const uint64_t *old = <const uint64_t *> (s.view + (page - s.start))
    cdef const uint8_t *marks = s.marks + ((page - s.start) >> 6)
    cdef int i
    if not memcmp(own, old, PAGE):
        return True
    if not COUNTS_MAY_BE_LOST:
        return False
    for i in range(PAGE // 8):
        if own[i] != old[i] and not marks[i >> 3] >> (i & 7) & 1:
            return False
    return True
