/*
 * Streams over AF_VSOCK from inside a Linux guest, any number at once, checked with CRC-32.
 *   vsock sum PORT COUNT         listens on PORT; of each of COUNT connections reads everything, then answers "BYTES CRC\n" and closes.
 *                                Prints "listening", and at the end "sum connections=N bytes=B"
 *   vsock send PORT COUNT SIZE   makes COUNT connections to PORT of the host, writes SIZE bytes on each, finishes sending, and
 *                                reads the same answer. Prints "send connections=N bytes=B right=N"
 * Numbers of answers are decimal.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

struct stream {
    uint64_t bytes; /* read, or written */
    uint32_t crc;
    int answered; /* bytes of the answer that were written, or read */
    char answer[40];
};

static struct stream *streams;
static struct pollfd *polled;
static char buffer[65536];

static void die(const char *what)
{
    fprintf(stderr, "vsock: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint32_t crc32(uint32_t crc, const char *data, size_t size)
{
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            table[i] = i;
            for (int bit = 0; bit < 8; bit++)
                table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
        }
    crc = ~crc;
    while (size--)
        crc = table[(crc ^ (uint8_t)*data++) & 255] ^ crc >> 8;
    return ~crc;
}

static struct sockaddr_vm address_of(unsigned cid, const char *port)
{
    return (struct sockaddr_vm){.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = strtoul(port, NULL, 0)};
}

static void make_room(int count)
{
    streams = calloc(count + 1, sizeof *streams);
    polled = calloc(count + 1, sizeof *polled);
    if (!streams || !polled)
        die("memory");
}

static void wait_for_some(int count)
{
    if (poll(polled, count, 60000) <= 0)
        die("nothing comes any more");
}

static int sum(const char *port, int count)
{
    struct sockaddr_vm address = address_of(VMADDR_CID_ANY, port);
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0), accepted = 0, ended = 0;
    uint64_t total = 0;
    make_room(count);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024))
        die("listen");
    polled[count] = (struct pollfd){listener, POLLIN, 0};
    for (int i = 0; i < count; i++)
        polled[i].fd = -1;
    puts("listening");
    fflush(stdout);
    while (ended < count) {
        wait_for_some(count + 1);
        if (polled[count].revents) {
            polled[accepted] = (struct pollfd){accept(listener, NULL, NULL), POLLIN, 0};
            if (polled[accepted].fd < 0)
                die("accept");
            if (++accepted == count)
                polled[count].fd = -1;
        }
        for (int i = 0; i < accepted; i++) {
            struct stream *s = &streams[i];
            if (polled[i].fd < 0 || !polled[i].revents)
                continue;
            ssize_t n = read(polled[i].fd, buffer, sizeof buffer);
            if (n < 0)
                die("read");
            s->crc = crc32(s->crc, buffer, n);
            s->bytes += n;
            if (n)
                continue;
            int size = sprintf(s->answer, "%llu %u\n", (unsigned long long)s->bytes, s->crc);
            if (write(polled[i].fd, s->answer, size) != size)
                die("answer");
            close(polled[i].fd);
            polled[i].fd = -1;
            total += s->bytes;
            ended++;
        }
    }
    printf("sum connections=%d bytes=%llu\n", ended, (unsigned long long)total);
    return 0;
}

static int is_right(const struct stream *s)
{
    char wanted[40];
    sprintf(wanted, "%llu %u\n", (unsigned long long)s->bytes, s->crc);
    return !strcmp(wanted, s->answer);
}

static int send_all(const char *port, int count, uint64_t size)
{
    struct sockaddr_vm address = address_of(VMADDR_CID_HOST, port);
    int ended = 0, right = 0;
    uint64_t total = 0, state = 88172645463325252ull;
    make_room(count);
    for (int i = 0; i < count; i++) {
        int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
            die("connect");
        fcntl(fd, F_SETFL, O_NONBLOCK);
        polled[i] = (struct pollfd){fd, POLLOUT, 0};
    }
    while (ended < count) {
        wait_for_some(count);
        for (int i = 0; i < count; i++) {
            struct stream *s = &streams[i];
            if (polled[i].fd < 0 || !polled[i].revents)
                continue;
            if (polled[i].events == POLLOUT) {
                size_t part = size - s->bytes < sizeof buffer ? size - s->bytes : sizeof buffer;
                for (size_t at = 0; at + 8 <= part; at += 8) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    memcpy(buffer + at, &state, 8);
                }
                ssize_t n = write(polled[i].fd, buffer, part);
                if (n < 0 && errno == EAGAIN)
                    continue;
                if (n < 0)
                    die("write");
                s->crc = crc32(s->crc, buffer, n);
                s->bytes += n;
                if (s->bytes == size) {
                    shutdown(polled[i].fd, SHUT_WR);
                    polled[i].events = POLLIN;
                }
                continue;
            }
            ssize_t n = read(polled[i].fd, s->answer + s->answered, sizeof s->answer - 1 - s->answered);
            if (n < 0)
                die("read");
            s->answered += n;
            if (n)
                continue;
            close(polled[i].fd);
            polled[i].fd = -1;
            total += s->bytes;
            right += is_right(s);
            ended++;
        }
    }
    printf("send connections=%d bytes=%llu right=%d\n", ended, (unsigned long long)total, right);
    return right != count;
}

int main(int count, char **argument)
{
    if (count == 4 && !strcmp(argument[1], "sum"))
        return sum(argument[2], atoi(argument[3]));
    if (count == 5 && !strcmp(argument[1], "send"))
        return send_all(argument[2], atoi(argument[3]), strtoull(argument[4], NULL, 0));
    fputs("vsock sum PORT COUNT | vsock send PORT COUNT SIZE\n", stderr);
    return 2;
}
