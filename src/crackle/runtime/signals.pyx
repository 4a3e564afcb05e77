"""Signals with the code that says where they come from (sigaction(2), si_code), those that a fault raises too among them.

A handler written in Python is of no use for SIGBUS, SIGSEGV and SIGILL: it runs when the faulting instruction has been
executed again, which is never. Here one that was sent is told through a pipe, and one that a fault has raised ends the
process as it would have done.
"""

import os


cdef extern from * nogil:
    """
    #include <errno.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <unistd.h>

    static struct { int fd; struct sigaction before[NSIG]; char heard[NSIG]; } hearing = { .fd = -1 };

    static void hear_signal(int number, siginfo_t *info, void *context) {
        int32_t said[2] = { number, info->si_code };
        int saved = errno;
        (void) context;
        /* A fault's code is positive: as it was before, and the instruction again. */
        if (info->si_code > 0 && (number == SIGBUS || number == SIGSEGV || number == SIGILL))
            sigaction(number, &hearing.before[number], NULL);
        else if (write(hearing.fd, said, sizeof(said)) < 0) {
            /* A full pipe tells of enough. */
        }
        errno = saved;
    }

    static int hear_from_now_on(int number) {
        struct sigaction action;
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = hear_signal;
        action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        if (number <= 0 || number >= NSIG) {
            errno = EINVAL;
            return -1;
        }
        if (sigaction(number, &action, hearing.heard[number] ? NULL : &hearing.before[number]))
            return -1;
        hearing.heard[number] = 1;
        return 0;
    }

    static void hear_into(int fd) {
        hearing.fd = fd;
        for (int number = 1; fd < 0 && number < NSIG; number++)
            if (hearing.heard[number]) {
                struct sigaction now;
                /* Whoever has come after us stays. */
                if (!sigaction(number, NULL, &now) && now.sa_sigaction == hear_signal)
                    sigaction(number, &hearing.before[number], NULL);
                hearing.heard[number] = 0;
            }
    }
    """
    int hear_from_now_on(int number)
    void hear_into(int fd)
    int errno


def hear(int fd, numbers):
    """Write number and code, an ``int`` each, to `fd`, a pipe, when one of these signals is sent. OSError.

    It must not wait, and stays open until `hear_no_more`. There is one for the process.
    """
    hear_into(fd)
    for number in numbers:
        if hear_from_now_on(number):
            error = errno
            hear_no_more()
            raise OSError(error, os.strerror(error))


def hear_no_more():
    """Let the signals do what they did before. Idempotent."""
    hear_into(-1)
