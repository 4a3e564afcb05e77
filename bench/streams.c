/*
 * Streams over Unix sockets at the speed of C, from the host's side. Prints `bytes=B us=U cpu_us=C`.
 *   streams pair SIZE MS                  a socket pair between two processes: one writes, this one reads
 *   streams send PATH PORT SIZE MS        CONNECT to PORT through PATH, write for MS, finish
 *   streams receive PATH SIZE             listen at PATH, accept one, read until its end
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static unsigned long now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ul + t.tv_nsec / 1000;
}

static unsigned long cpu_us(int who)
{
    struct rusage used;
    getrusage(who, &used);
    return (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000ul + used.ru_utime.tv_usec + used.ru_stime.tv_usec;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static struct sockaddr_un address_of(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("path");
    strcpy(address.sun_path, path);
    return address;
}

static unsigned long write_for(int fd, size_t size, unsigned long ms)
{
    char *data = calloc(1, size);
    unsigned long total = 0, end = now_us() + ms * 1000;
    memset(data, 0x5a, size);
    while (now_us() < end) {
        ssize_t n = write(fd, data, size);
        if (n <= 0)
            die("write");
        total += n;
    }
    return total;
}

static void read_all(int fd, size_t size)
{
    char *data = calloc(1, size);
    unsigned long total = 0, start = 0;
    for (;;) {
        ssize_t n = read(fd, data, size);
        if (!start)
            start = now_us();
        if (n < 0)
            die("read");
        if (!n)
            break;
        total += n;
    }
    unsigned long end = now_us();
    while (wait(NULL) > 0)
        ;
    printf("bytes=%lu us=%lu cpu_us=%lu\n", total, end - start, cpu_us(RUSAGE_SELF) + cpu_us(RUSAGE_CHILDREN));
}

int main(int count, char **argument)
{
    if (count == 4 && !strcmp(argument[1], "pair")) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
            die("socketpair");
        if (!fork()) {
            close(ends[0]);
            write_for(ends[1], atol(argument[2]), atol(argument[3]));
            _exit(0);
        }
        close(ends[1]);
        read_all(ends[0], atol(argument[2]));
    } else if (count == 6 && !strcmp(argument[1], "send")) {
        struct sockaddr_un address = address_of(argument[2]);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0), size;
        char line[64];
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            die("connect");
        size = snprintf(line, sizeof line, "CONNECT %s\n", argument[3]);
        if (write(fd, line, size) != size)
            die("CONNECT");
        do
            if (read(fd, line, 1) != 1)
                die("OK");
        while (line[0] != '\n');
        unsigned long start = now_us(), total = write_for(fd, atol(argument[4]), atol(argument[5]));
        close(fd);
        printf("bytes=%lu us=%lu cpu_us=%lu\n", total, now_us() - start, cpu_us(RUSAGE_SELF));
    } else if (count == 4 && !strcmp(argument[1], "receive")) {
        struct sockaddr_un address = address_of(argument[2]);
        int listener = socket(AF_UNIX, SOCK_STREAM, 0);
        unlink(argument[2]);
        if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
            die("listen");
        puts("ready");
        fflush(stdout);
        read_all(accept(listener, NULL, NULL), atol(argument[3]));
        unlink(argument[2]);
    } else {
        fputs("streams pair SIZE MS | send PATH PORT SIZE MS | receive PATH SIZE\n", stderr);
        return 2;
    }
    return 0;
}
