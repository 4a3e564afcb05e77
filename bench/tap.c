/*
 * The host's side of the network benchmarks, and the yardstick: what a loop in C does with a TAP and nothing else.
 *   tap read NAME SIZE MS LARGE     reads frames, as many as come, into buffers of SIZE bytes
 *   tap write NAME SIZE MS          writes frames of SIZE bytes; above 1,514 each is one TCP segment to be cut
 *   tap send NAME SIZE GROUP        sends frames of SIZE bytes to whoever reads the TAP, GROUP of them at a time, until killed
 *   tap burst NAME SIZE GROUP       the same frame by frame, past the queueing discipline, GROUP of them in each call, and
 *                                   with nobody's leave to go first: what a host that is busy with its own work does
 * The first two print frames=N bytes=B us=U cpu_us=C.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { HEADER = 12, MOST = 65562, BUFFERS = 256 };

static unsigned char message[MOST];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static unsigned long clock_us(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (unsigned long)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int open_tap(const char *name, int large)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK), size = HEADER;
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) || ioctl(fd, TUNSETVNETHDRSZ, &size) ||
        ioctl(fd, TUNSETOFFLOAD, large ? TUN_F_CSUM | TUN_F_TSO4 : 0))
        die(name);
    return fd;
}

static void put16(unsigned char *place, unsigned value)
{
    place[0] = value >> 8;
    place[1] = value;
}

/* A frame of `size` bytes with its header; with `part` a TCP segment to be cut into frames of that many bytes of data. */
static void make_frame(unsigned size, unsigned part, unsigned to, unsigned from)
{
    unsigned char *frame = message + HEADER, *ip = frame + 14;
    unsigned sum = 0;
    frame[0] = frame[6] = 6;
    frame[5] = to;
    frame[11] = from;
    put16(frame + 12, 0x88b5);
    if (!part)
        return;
    struct virtio_net_hdr_v1 header = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4};
    header.hdr_len = 54, header.gso_size = part, header.csum_start = 34, header.csum_offset = 16;
    memcpy(message, &header, HEADER);
    put16(frame + 12, 0x0800);
    ip[0] = 0x45;
    put16(ip + 2, size - 14);
    ip[8] = 64, ip[9] = 6;
    ip[12] = ip[16] = 10, ip[15] = 3, ip[19] = 2;
    for (int i = 0; i < 20; i += 2)
        sum += ip[i] << 8 | ip[i + 1];
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    put16(ip + 10, ~sum);
    put16(ip + 20, 1000);
    put16(ip + 22, 2000);
    ip[32] = 0x50, ip[33] = 0x10;
    put16(ip + 34, 0xffff);
}

static void report(unsigned long frames, unsigned long bytes, unsigned long start, unsigned long cpu)
{
    printf("frames=%lu bytes=%lu us=%lu cpu_us=%lu\n", frames, bytes, clock_us(CLOCK_MONOTONIC) - start,
           clock_us(CLOCK_PROCESS_CPUTIME_ID) - cpu);
}

static void run_read(int fd, unsigned size, unsigned long ms)
{
    /* As many buffers as a driver's ring has, filled in turn: what a cache holds decides what a copy costs. */
    struct iovec iov[2 * BUFFERS];
    unsigned long frames = 0, bytes = 0, at = 0, count = MOST / size + 1;
    unsigned char *data = calloc(BUFFERS, size);
    for (unsigned i = 0; i < 2 * BUFFERS; i++)
        iov[i] = (struct iovec){data + i % BUFFERS * size, size};
    unsigned long start = clock_us(CLOCK_MONOTONIC), cpu = clock_us(CLOCK_PROCESS_CPUTIME_ID);
    while (clock_us(CLOCK_MONOTONIC) - start < ms * 1000) {
        ssize_t n = readv(fd, iov + at, count);
        if (n > 0) {
            at = (at + (n + size - 1) / size) % BUFFERS;
            frames++;
            bytes += n - HEADER;
        } else if (errno == EAGAIN) {
            poll(&(struct pollfd){fd, POLLIN, 0}, 1, 100);
        } else {
            die("readv");
        }
    }
    report(frames, bytes, start, cpu);
}

static void run_write(int fd, unsigned size, unsigned long ms)
{
    struct iovec iov = {message, HEADER + size};
    unsigned long frames = 0, start = clock_us(CLOCK_MONOTONIC), cpu = clock_us(CLOCK_PROCESS_CPUTIME_ID);
    while (clock_us(CLOCK_MONOTONIC) - start < ms * 1000) {
        if (writev(fd, &iov, 1) < 0)
            die("writev");
        frames++;
    }
    report(frames, frames * size, start, cpu);
}

static int packet_socket(const char *name)
{
    int fd = socket(AF_PACKET, SOCK_RAW, 0), on = 1;
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (fd < 0 || ioctl(fd, SIOCGIFINDEX, &request) || setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof on))
        die(name);
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = request.ifr_ifindex};
    if (bind(fd, (struct sockaddr *)&address, sizeof address))
        die("bind");
    return fd;
}

static void run_send(const char *name, unsigned size, unsigned group)
{
    int fd = packet_socket(name);
    /* A packet socket's header has no num_buffers. */
    unsigned length = group > 1 ? 54 + group * (size - 54) : size;
    struct iovec iov[2] = {{message, sizeof(struct virtio_net_hdr)}, {message + HEADER, length}};
    struct sched_param none = {0};
    /* Where the two share a processor the reader goes first: it is the reader that is measured. */
    sched_setscheduler(0, SCHED_BATCH, &none);
    if (setpriority(PRIO_PROCESS, 0, 10))
        die("setpriority");
    for (;;)
        if (writev(fd, iov, 2) < 0 && errno != ENOBUFS && errno != ENETDOWN && errno != ENXIO)
            die("send");
}

static void run_burst(const char *name, unsigned size, unsigned group)
{
    int fd = packet_socket(name), on = 1;
    if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on))
        die("PACKET_QDISC_BYPASS");
    struct iovec iov[2] = {{message, sizeof(struct virtio_net_hdr)}, {message + HEADER, size}};
    struct mmsghdr burst[64];
    if (group > 64)
        group = 64;
    for (unsigned i = 0; i < group; i++)
        burst[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = iov, .msg_iovlen = 2}};
    for (;;)
        if (sendmmsg(fd, burst, group, 0) < 0 && errno != ENOBUFS && errno != ENETDOWN && errno != ENXIO)
            die("sendmmsg");
}

int main(int count, char **given)
{
    if (count < 5)
        return 2;
    unsigned size = atoi(given[3]), last = atoi(given[4]);
    if (!strcmp(given[1], "read")) {
        run_read(open_tap(given[2], count > 5 && atoi(given[5])), size, last);
    } else if (!strcmp(given[1], "write")) {
        make_frame(size, size > 1514 ? 1448 : 0, 2, 1);
        run_write(open_tap(given[2], 0), size, last);
    } else if (!strcmp(given[1], "send")) {
        make_frame(last > 1 ? 54 + last * (size - 54) : size, last > 1 ? size - 54 : size > 1514 ? 1448 : 0, 1, 2);
        run_send(given[2], size, last);
    } else if (!strcmp(given[1], "burst")) {
        make_frame(size, size > 1514 ? 1448 : 0, 1, 2);
        run_burst(given[2], size, last);
    }
    return 0;
}
