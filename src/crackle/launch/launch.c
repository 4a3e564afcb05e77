/* crackle-launch: has a zygote (docs/zygote.md) start the microVM, and stands in for the process that it becomes.
 *
 * It takes crackle-vmm's command line, or under a name with "jailer" in it crackle-jailer's. The zygote's child learns arguments, environment, signal mask and descriptors from
 * one message, and everything else (directory, limits, namespaces, cgroup) from this process's /proc. Afterwards this
 * process is what its parent waits for and sends signals to: it passes them on, and ends as the monitor ends. The
 * connection is the monitor's lifeline: when this process is gone, the kernel kills the monitor.
 *
 * Without a zygote, or with one that will not, it executes crackle-vmm. CRACKLE_LAUNCH_DEBUG says why, on standard error.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef CRACKLE_VERSION
#error "CRACKLE_VERSION is the package's version: launcher and zygote are of one build"
#endif

enum {
    FDS_MAX = 64,               /* descriptors handed over, the standard streams included */
    FD_LIMIT = 1024,            /* their numbers are below */
    MESSAGE_MAX = 128 << 10,    /* bytes of a request; src/crackle/runtime/inherit.py has the same three */
    ANSWER_MS = 5000,           /* for the zygote's child to begin */
    REAP_MS = 1000,             /* for the monitor to be reaped once the zygote is gone */
};

/* The request: this, and then the arguments and the environment, each string with its NUL. */
struct request {
    char version[32];
    uint64_t signal_mask;       /* bit N - 1 is signal N */
    uint32_t arguments, variables, fds;
    uint32_t fd_numbers[FDS_MAX];
};

/* What the other side says: 'S' it starts, with its number and a pidfd; 'R' it will not, and why; 'W' the status it is about to end with,
 * from the monitor; 'E' the status (wait(2)) that it has ended with, from the zygote. */
struct answer {
    char kind;
    char reason[119];
    int32_t status;
};

/* <linux/pidfd.h>, as of 6.15; older headers have none of it. */
struct exit_info {
    uint64_t mask, cgroup;
    uint32_t ids[11];
    int32_t status;     /* as wait(2) has it */
};
#define GET_EXIT_INFO _IOWR(0xFF, 11, struct exit_info)
#define HAS_EXIT ((uint64_t) 1 << 3)

static const char *name = "crackle-vmm";    /* whom it stands for */
static char message[MESSAGE_MAX];
static sigset_t mask_before;

/* Becomes the monitor itself: the executable beside this one, or the one on the PATH. */
static int execute(char **argv, const char *why) {
    static char path[PATH_MAX];
    if (getenv("CRACKLE_LAUNCH_DEBUG"))
        dprintf(STDERR_FILENO, "crackle-launch: %s; executing %s\n", why, name);
    sigprocmask(SIG_SETMASK, &mask_before, NULL);
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 32);
    while (length > 0 && path[length - 1] != '/')
        length--;
    if (length > 0) {
        strcpy(path + length, name);
        execv(path, argv);
    }
    execvp(name, argv);
    dprintf(STDERR_FILENO, "Error: crackle-launch cannot execute %s: %s\n", name, strerror(errno));
    return 1;
}

/* As crackle-vmm does: else a closed stream's number goes to something else. */
static int fill_streams(void) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            return -1;
    return 0;
}

/* Where a zygote of this user listens; as `socket_path` in src/crackle/runtime/zygote.py. */
static int zygote_path(char *path, size_t size) {
    const char *given = getenv("CRACKLE_ZYGOTE"), *directory = getenv("XDG_RUNTIME_DIR");
    int length;
    if (given)
        length = snprintf(path, size, "%s", given);
    else if (!geteuid())
        length = snprintf(path, size, "/run/crackle/zygote");
    else if (directory && *directory)
        length = snprintf(path, size, "%s/crackle/zygote", directory);
    else
        length = snprintf(path, size, "/run/user/%u/crackle/zygote", geteuid());
    return length > 0 && (size_t) length < size ? 0 : -1;
}

static int connect_zygote(const char **why) {
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct ucred peer;
    socklen_t size = sizeof peer;
    *why = "no zygote is named";
    if (zygote_path(address.sun_path, sizeof address.sun_path) < 0)
        return -1;
    *why = "no zygote answers";
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *) &address, sizeof address) < 0)
        return -1;
    *why = "the zygote is another user's";
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != geteuid())
        return -1;
    return fd;
}

/* Every descriptor that was inherited: the streams, and what else a client left open for the monitor. */
static int list_fds(uint32_t *numbers) {
    DIR *directory = opendir("/proc/self/fd");
    struct dirent *entry;
    int count = 0;
    while (directory && (entry = readdir(directory))) {
        int fd = atoi(entry->d_name);
        if (entry->d_name[0] == '.' || fcntl(fd, F_GETFD) & FD_CLOEXEC)
            continue;
        if (count == FDS_MAX || fd >= FD_LIMIT)
            return -1;
        numbers[count++] = (uint32_t) fd;
    }
    if (directory)
        closedir(directory);
    return count;
}

static int append(size_t *used, char **strings, uint32_t *count) {
    for (; *strings; strings++, ++*count) {
        size_t size = strlen(*strings) + 1;
        if (size > MESSAGE_MAX - *used)
            return -1;
        memcpy(message + *used, *strings, size);
        *used += size;
    }
    return 0;
}

static int send_request(int zygote, char **argv) {
    struct request *request = (struct request *) message;
    size_t used = sizeof *request;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(FDS_MAX * sizeof(int))] = { 0 };
    int count = list_fds(request->fd_numbers);
    if (count < 3 || append(&used, argv, &request->arguments) < 0 || append(&used, environ, &request->variables) < 0)
        return -1;
    strncpy(request->version, CRACKLE_VERSION, sizeof request->version - 1);
    request->fds = (uint32_t) count;
    for (int number = 1; number <= 64; number++)
        if (sigismember(&mask_before, number) == 1)
            request->signal_mask |= (uint64_t) 1 << (number - 1);

    struct iovec part = { message, used };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control };
    header.msg_controllen = CMSG_SPACE((size_t) count * sizeof(int));
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN((size_t) count * sizeof(int));
    memcpy(CMSG_DATA(rights), request->fd_numbers, (size_t) count * sizeof(int));
    return sendmsg(zygote, &header, MSG_NOSIGNAL) == (ssize_t) used ? 0 : -1;
}

/* One message: 1, or 0 at the end, when zygote and monitor are both gone. fd: what came with it, or as it was. */
static int receive(int zygote, struct answer *answer, int *fd) {
    struct iovec part = { answer, sizeof *answer };
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    if (recvmsg(zygote, &header, MSG_CMSG_CLOEXEC) != sizeof *answer)
        return 0;
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    if (rights && rights->cmsg_type == SCM_RIGHTS && rights->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(fd, CMSG_DATA(rights), sizeof *fd);
    return 1;
}

static void pass_on(int pidfd, int number) {
    int stop = number == SIGTSTP || number == SIGTTIN || number == SIGTTOU;
    if (number == SIGCHLD)
        return;
    syscall(SYS_pidfd_send_signal, pidfd, stop ? SIGSTOP : number, NULL, 0);
    if (stop)
        raise(SIGSTOP);
}

/* How a process that is a zombie ended, from its stat (proc(5), the last field); -1 if it is none. */
static int zombie_status(int pidfd, int pid) {
    char text[1024];
    snprintf(text, sizeof text, "/proc/%d/stat", pid);
    int fd = open(text, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    close(fd);
    text[length < 0 ? 0 : length] = 0;
    char *name_end = strrchr(text, ')'), *last = strrchr(text, ' ');
    /* Its number is its own for as long as it can be sent a signal. */
    if (!name_end || strncmp(name_end, ") Z", 3) || syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) < 0)
        return -1;
    return atoi(last);
}

/* How it ended when the zygote cannot tell any more: while nobody has waited for it, its stat says so, and afterwards the
 * kernel from 6.15 on. Else it is what the monitor said last; one that said nothing was killed. */
static int status_without_zygote(int pidfd, int pid, int will) {
    for (int waited = 0; waited < REAP_MS; waited += 10) {
        struct exit_info info = { .mask = HAS_EXIT };
        int status = zombie_status(pidfd, pid);
        if (status >= 0)
            return status;
        if (!ioctl(pidfd, GET_EXIT_INFO, &info) && info.mask & HAS_EXIT)
            return info.status;
        poll(NULL, 0, 10);
    }
    return will < 0 ? SIGKILL : will;
}

/* The status of wait(2) that the monitor has ended with. */
static int attend(int zygote, int pidfd, int pid, int signals) {
    int will = -1;
    for (;;) {
        struct pollfd ready[] = { { zygote, POLLIN, 0 }, { signals, POLLIN, 0 } };
        struct signalfd_siginfo signal;
        struct answer answer;
        if (poll(ready, 2, -1) < 0)
            continue;
        if (ready[1].revents && read(signals, &signal, sizeof signal) == sizeof signal)
            pass_on(pidfd, (int) signal.ssi_signo);
        if (!ready[0].revents)
            continue;
        if (!receive(zygote, &answer, &pidfd))
            return status_without_zygote(pidfd, pid, will);
        if (answer.kind == 'E')
            return answer.status;
        if (answer.kind == 'W')
            will = answer.status;
    }
}

static int end_as(int status) {
    if (WIFEXITED(status))
        return WEXITSTATUS(status);
    int number = WTERMSIG(status);
    sigset_t only;
    setrlimit(RLIMIT_CORE, &(struct rlimit) { 0, 0 });  /* the monitor has left one already */
    signal(number, SIG_DFL);
    sigemptyset(&only);
    sigaddset(&only, number);
    raise(number);
    sigprocmask(SIG_UNBLOCK, &only, NULL);
    return 128 + number;
}

int main(int argc, char **argv) {
    struct answer answer = { 0 };
    const char *why;
    int pidfd = -1;
    sigset_t all;
    sigprocmask(SIG_SETMASK, NULL, &mask_before);
    if (argc < 1)
        return 1;
    name = strstr(basename(argv[0]), "jailer") ? "crackle-jailer" : name;
    argv[0] = (char *) name;
    if (fill_streams() < 0)
        return execute(argv, "a standard stream is closed and there is no /dev/null");
    if (isatty(STDIN_FILENO))
        return execute(argv, "standard input is a terminal, whose job control needs this session");
    int zygote = connect_zygote(&why);
    if (zygote < 0)
        return execute(argv, why);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    int signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0 || send_request(zygote, argv) < 0)
        return execute(argv, "the request does not fit, or cannot be sent");
    struct pollfd ready = { zygote, POLLIN, 0 };
    if (poll(&ready, 1, ANSWER_MS) != 1 || !receive(zygote, &answer, &pidfd))
        return execute(argv, "the zygote does not answer");
    answer.reason[sizeof answer.reason - 1] = 0;
    if (answer.kind != 'S' || pidfd < 0)
        return execute(argv, answer.kind == 'R' ? answer.reason : "the zygote's child has failed");
    return end_as(attend(zygote, pidfd, answer.status, signals));
}
